"""What does one program do in a step of Adam? Mix the arrived wires into its tile, update it, encode it; each element once.

One launch for all parameters: a map names the piece of every tile, a table holds 14 words of int64 a piece (``adam.py``)."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton.language as tl

from dtrain.kernels._triton.launch import kernel
from dtrain.kernels._triton.memory import float_of, load_float, rounded_as, store_float, typed
from dtrain.kernels._triton.mix import add_wires
from dtrain.kernels._triton.tiles import decode_again, encode_tile

WORDS = tl.constexpr(14)


@kernel
def step_kernel(
    pieces, tiles, wires, out, grad_scale, num_wires: tl.int64, wires_whole: tl.int64, self_weight: tl.float32, gamma: tl.float32,
    one1: tl.float32, one2: tl.float32, beta1: tl.float32, beta2: tl.float32, root: tl.float32, eps: tl.float32,
    step_size: tl.float32, share: tl.float32, accumulates: tl.int64, closes: tl.int64, seed: tl.int64, first: tl.int64,
    ELEMENT: tl.constexpr, MODE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
    NOISY: tl.constexpr,
):  # fmt: skip
    """MODE none, mix or choco. beta and share: decay of the moments at a close, 1 / every."""
    tile = tl.program_id(0).to(tl.int64)
    piece = pieces + tl.load(tiles + tile).to(tl.int64) * WORDS
    start = (tile - tl.load(piece + 8)) * (R * B)
    left = tl.minimum(tl.load(piece + 7) - start, R * B).to(tl.int32)
    at = tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    inside = at < left
    flags = tl.load(piece + 13)
    full = left == R * B
    whole = ((flags & 1) != 0) & full
    codes_whole = ((flags & 2) != 0) & (wires_whole != 0) & full
    p = typed(tl.load(piece), ELEMENT) + start
    x = load_float(p, at, inside, whole)
    if MODE != "none":
        code_byte = tl.load(piece + 10) + start * BITS // 8
        scale_byte = tl.load(piece + 9) + start // B * (4 if KIND == "lut4" else 2)
    if MODE == "mix":
        x = add_wires(x * self_weight, wires, num_wires, code_byte, scale_byte, at, inside, left, codes_whole, KIND, R, B)
        x = rounded_as(x, p)
    if MODE == "choco":
        xhat_at, s_at = typed(tl.load(piece + 5), tl.float32) + start, typed(tl.load(piece + 6), tl.float32) + start
        s = load_float(s_at, at, inside, whole)
        xhat = load_float(xhat_at, at, inside, whole)
        s = add_wires(s, wires, num_wires, code_byte, scale_byte, at, inside, left, codes_whole, KIND, R, B)
        x = rounded_as(x + (s - xhat) * gamma, p)

    g = load_float(typed(tl.load(piece + 1), ELEMENT) + start, at, inside, whole) * tl.load(grad_scale)
    m_at, v_at = typed(tl.load(piece + 2), tl.float32) + start, typed(tl.load(piece + 3), tl.float32) + start
    m, v = load_float(m_at, at, inside, whole), load_float(v_at, at, inside, whole)
    a_at = typed(tl.load(piece + 4), tl.float32) + start
    a = g
    if accumulates != 0:
        a = load_float(a_at, at, inside, whole) + g * share
    m_now, v_now = m + g * one1, v + g * one2 * g
    x = x * float_of(tl.load(piece + 12))
    x = rounded_as(x - tl.div_rn(m_now, tl.sqrt_rn(v_now) * root + eps) * step_size, p)
    store_float(p, at, x, inside, whole)
    if closes != 0:
        store_float(m_at, at, (m + a * one1) * beta1, inside, whole)
        store_float(v_at, at, (v + a * one2 * a) * beta2, inside, whole)
    if accumulates != 0:
        store_float(a_at, at, tl.where(closes != 0, 0.0, a), inside, whole)

    if MODE != "none":
        sent = tl.where(inside, x, 0.0)
        if MODE == "choco":
            sent = tl.where(inside, x - xhat, 0.0)
        wire = out + code_byte
        scales = out + scale_byte
        code, scale, second = encode_tile(
            sent, at, inside, left, codes_whole, wire, scales, seed, first + tl.load(piece + 11) + start, KIND, R, B, NOISY
        )
        if MODE == "choco":
            store_float(xhat_at, at, xhat + decode_again(sent, code, scale, second, 1.0, KIND), inside, whole)
            store_float(s_at, at, s + decode_again(sent, code, scale, second, self_weight, KIND), inside, whole)

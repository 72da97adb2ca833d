"""How is one row of a tensor mixed, updated and encoded? The parts that the one-pass kernels are made of.

A row is a few whole blocks, or the short last block of a tensor in a copy that is filled with zeros. ``half`` is 1 where a tensor
is bf16. ``fmt`` is (address of encode, of decode, groups, code bytes and scale bytes of a block, k, bits); a format's machine
code is called by its address, so it is compiled once, and only where it is used."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

import numpy as np

from dtrain.kernels._numba.formats import (
    AHEAD, _ONE, as_floats, called, fetch2, inlined, read32, round_half, write32,
)  # fmt: skip
from dtrain.kernels._numba.memory import (
    bits_float, call_decode, call_encode, clear_bytes, copy_bytes, fetch, load_f32x8, load_f32x32, load_i16x8, load_long, stack,
    store,
)  # fmt: skip
from dtrain.kernels._numba.simd import floats8, low_half, root, wider16
from dtrain.kernels.operands import MAX_BLOCK

WIRE_FIELDS = 3
"""int64 numbers that stand for a wire: the addresses of its codes and scales, and the bits of its weight."""
PLAIN, DIFFERENCE, FEEDBACK, CHOCO = range(4)
MINUS_ONE = np.float32(-1.0)

_code_room = stack(4 * MAX_BLOCK)


@inlined
def short_bytes(fmt, valid):
    """Bytes of the codes of a short block; a chunk of topk has all of them."""
    if fmt[5] > 0:
        return fmt[3]
    return (valid * fmt[3] + 32 * fmt[2] - 1) // (32 * fmt[2])


@inlined
def borrow(room, address, valid, block, half):
    """A copy of a short block, filled with zeros."""
    num_bytes = valid << (2 - half)
    copy_bytes(room, address, num_bytes)
    clear_bytes(room + num_bytes, (block << (2 - half)) - num_bytes)
    return room


@inlined
def give_back(address, room, valid, half):
    copy_bytes(address, room, valid << (2 - half))


@inlined
def add_wires(fmt, wires, num_wires, code_offset, scale_offset, blocks, valid, src, half, src_weight, dst):
    """dst (fp32) = src src_weight + the wires in their order."""
    _, decode, groups, _, _, k, bits = fmt
    if num_wires == 0:
        step = 64 if half else 128
        for g in range(blocks * groups):
            store(dst + 128 * g, read32(src + step * g, half) * src_weight)
    short = valid < 32 * blocks * groups
    room = _code_room()
    for j in range(num_wires):
        at = wires + 8 * WIRE_FIELDS * j
        codes, scales = load_long(at) + code_offset, load_long(at + 8) + scale_offset
        weight = bits_float(load_long(at + 16))
        if short:
            copy_bytes(room, codes, short_bytes(fmt, valid))
            codes = room
        call_decode(decode, codes, scales, weight, blocks, groups, k, bits, valid, src, half, src_weight, dst)
        src, half, src_weight = dst, 0, _ONE


@inlined
def decode_into(fmt, codes, scales, weight, blocks, valid, src, dst):
    """dst = src + weight decode(codes), all fp32."""
    call_decode(fmt[1], codes, scales, weight, blocks, fmt[2], fmt[5], fmt[6], valid, src, 0, _ONE, dst)


@inlined
def encode_any(fmt, src, blocks, valid, codes, scales, seed, index):
    call_encode(fmt[0], src, blocks, fmt[2], fmt[5], fmt[6], valid, codes, scales, seed, index)


@inlined
def narrow(src, dst, groups):
    """fp32 -> bf16."""
    for g in range(groups):
        write32(dst + 64 * g, 1, load_f32x32(src + 128 * g))


@inlined
def round_in_place(y, groups):
    """fp32 -> bf16 -> fp32, where a reference would have written and read a bf16 tensor."""
    for g in range(groups):
        store(y + 128 * g, as_floats(round_half(load_f32x32(y + 128 * g)) << 16))


@inlined
def towards(x, half, xhat, s, gamma, groups, dst):
    """dst = x + gamma (s - xhat)."""
    step = 64 if half else 128
    for g in range(groups):
        fetch2(s + 128 * g + AHEAD)
        fetch2(xhat + 128 * g + AHEAD)
        fetch2(x + step * g + AHEAD)
        moved = (load_f32x32(s + 128 * g) - load_f32x32(xhat + 128 * g)) * gamma
        store(dst + 128 * g, read32(x + step * g, half) + moved)


@inlined
def subtract(a, a_half, b, b_half, groups, dst):
    for g in range(groups):
        fetch2(a + (64 if a_half else 128) * g + AHEAD)
        fetch2(b + (64 if b_half else 128) * g + AHEAD)
        left = read32(a + (64 if a_half else 128) * g, a_half)
        store(dst + 128 * g, left - read32(b + (64 if b_half else 128) * g, b_half))


@inlined
def read8(address, half):
    if half:
        return as_floats(wider16(load_i16x8(address)) << 16)
    return load_f32x8(address)


@inlined
def write8(address, half, v):
    if half:
        store(address, low_half(round_half(v)))
    else:
        store(address, v)


@called
def adam_row(x, x_half, g, g_half, m, v, a, groups, src, numbers):
    """One step of AccumAdam on 32 ``groups`` elements: x = the step from ``src`` (fp32), which is x where that is fp32.

    ``numbers`` is (grad_scale, 1 / s, 1 - beta1, 1 - beta2, step size, root, eps, decay of x, beta1, beta2, closes, s > 1).
    8 lanes at a time: five tensors and their results are then in registers."""
    grad_scale, part, one1, one2, step_size, over_root, eps, decay, beta1, beta2, closes, gathers = numbers
    for first in range(0, 32 * groups, 16):
        ahead = 4 * first + AHEAD
        fetch(src + ahead)
        fetch(g + (ahead >> g_half))
        fetch(m + ahead)
        fetch(v + ahead)
        if gathers:
            fetch(a + ahead)
        for i in range(first, first + 16, 8):
            at = 4 * i
            grad = read8(g + (i << (2 - g_half)), g_half) * grad_scale
            m0, v0 = load_f32x8(m + at), load_f32x8(v + at)
            m1, v1 = m0 + grad * one1, v0 + grad * one2 * grad
            new = load_f32x8(src + at) * decay - m1 / (root(v1) * over_root + eps) * step_size
            if gathers:
                total = load_f32x8(a + at) + grad * part
                if closes:
                    m1, v1 = m0 + total * one1, v0 + total * one2 * total
                    store(a + at, floats8(0.0))
                else:
                    store(a + at, total)
            if closes:
                store(m + at, m1 * beta1)
                store(v + at, v1 * beta2)
            write8(x + (i << (2 - x_half)), x_half, new)
            if x_half:
                store(src + at, as_floats(round_half(new) << 16))

"""How is one tensor encoded, with or without state? A program reads each element once and writes codes, scales and state."""

# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.check import CASTS, kind_rows, same_length, wire_lengths
from dtrain.kernels._triton.launch import aligned, kernel, launch
from dtrain.kernels._triton.memory import bytes_at, load_float, store
from dtrain.kernels._triton.tiles import decode_again, encode_tile
from dtrain.kernels._triton.topk import topk_encode
from dtrain.kernels.operands import Coded, Format, Noise


@kernel
def encode_kernel(
    x, b, s, codes, scales, numel: tl.int64, factor: tl.float32, seed: tl.int64, first: tl.int64, whole: tl.int64,
    MODE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (R * B)
    left = tl.minimum(numel - start, R * B).to(tl.int32)
    at = tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    inside = at < left
    whole = (whole != 0) & (left == R * B)
    value = load_float(x + start, at, inside, whole)
    if MODE == "difference" or MODE == "choco":
        before = load_float(b + start, at, inside, whole)
        value = value - before
    if MODE == "feedback":
        value = load_float(b + start, at, inside, whole) * factor + value
    codes += start * BITS // 8
    scales = bytes_at(scales, start // B * (4 if KIND == "lut4" else 2))
    code, scale, second = encode_tile(value, at, inside, left, whole, codes, scales, seed, first + start, KIND, R, B, NOISY)
    if MODE == "feedback":
        store(b + start, at, value + decode_again(value, code, scale, second, -1.0, KIND), inside, whole)
    if MODE == "choco":
        store(b + start, at, before + decode_again(value, code, scale, second, 1.0, KIND), inside, whole)
        own = load_float(s + start, at, inside, whole)
        store(s + start, at, own + decode_again(value, code, scale, second, factor, KIND), inside, whole)


def encode(x: Tensor, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    _encode("plain", x, x, x, 0.0, out, fmt, noise)


def encode_difference(a: Tensor, b: Tensor, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    _encode("difference", a, b, b, 0.0, out, fmt, noise)


def encode_feedback(x: Tensor, residual: Tensor, decay: float, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    _encode("feedback", x, residual, residual, decay, out, fmt, noise)


def choco_encode(
    x: Tensor, xhat: Tensor, s: Tensor, self_weight: float, out: Coded, fmt: Format, noise: Noise | None = None
) -> None:
    _encode("choco", x, xhat, s, self_weight, out, fmt, noise)


def quantize_int8(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    encode(x, Coded(codes, scales), Format("int8", block), noise)


def quantize_int4(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    encode(x, Coded(codes, scales), Format("int4", block), noise)


def quantize_e3m0(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    encode(x, Coded(codes, scales), Format("e3m0", block), noise)


def quantize_lut4(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    encode(x, Coded(codes, scales), Format("lut4", block), noise)


def quantize_sign(x: Tensor, codes: Tensor, scales: Tensor, block: int, noise: Noise | None = None) -> None:
    encode(x, Coded(codes, scales), Format("sign", block), noise)


def cast_bf16(x: Tensor, wire: Tensor) -> None:
    encode(x, Coded(wire, wire[:0]), Format("bf16"))


def topk_chunks(x: Tensor, codes: Tensor, scales: Tensor, chunk: int, k: int, bits: int) -> None:
    encode(x, Coded(codes, scales), Format("topk", chunk, k, bits))


def _encode(mode: str, x: Tensor, b: Tensor, s: Tensor, factor: float, out: Coded, fmt: Format, noise: Noise | None) -> None:
    same_length(x, b, s)
    wire_lengths(out, fmt, x.numel())
    if fmt.kind == "topk":
        topk_encode(mode, x, b, s, factor, out, fmt)
        return
    rows, block, warps, bits = kind_rows(fmt, mode)
    seed, first = noise or (0, 0)
    noisy = noise is not None and fmt.kind not in CASTS
    launch(
        encode_kernel, -(-x.numel() // (rows * block)), warps, x, b, s, out.codes, out.scales, x.numel(), float(factor), seed,
        first, int(aligned(x, b, s, out.codes)), MODE=mode, KIND=fmt.kind, BITS=bits, R=rows, B=block, NOISY=noisy,
    )  # fmt: skip

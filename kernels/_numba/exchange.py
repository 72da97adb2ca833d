"""The operations on wires, as ``reference.py`` defines them: into codes, out of codes, and both with what a method keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dtrain.kernels._numba import kernels, rows
from dtrain.kernels._numba.pool import run
from dtrain.kernels._numba.tables import coded, float_bits, format_numbers, noise_numbers, state, values, wire_rows
from dtrain.kernels.operands import Coded, Format, Noise

_NONE = torch.empty(0, dtype=torch.bfloat16)
_BF16 = Format("bf16")


def _encode(
    mode: int, x: Tensor, b: Tensor | None, s: Tensor | None, alpha: float, out: Coded, fmt: Format, noise: Noise | None
) -> None:
    n = x.numel()
    first, second = values(x, n, "x"), (0, 0)
    if b is not None:
        second = values(b, n, "b") if mode == rows.DIFFERENCE else (state(b, n, "residual or xhat"), 0)
    third = 0 if s is None else state(s, n, "s")
    args = (*first, *second, third, float_bits(alpha), *coded(out, fmt, n, "the wire"), *noise_numbers(noise))
    run(kernels.encode, (mode, *format_numbers(fmt), n, *args), n)


def encode(x: Tensor, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    _encode(rows.PLAIN, x, None, None, 0.0, out, fmt, noise)


def encode_difference(a: Tensor, b: Tensor, out: Coded, fmt: Format, noise: Noise | None = None) -> None:
    _encode(rows.DIFFERENCE, a, b, None, 0.0, out, fmt, noise)


def encode_feedback(
    x: Tensor, residual: Tensor, decay: float, out: Coded, fmt: Format, noise: Noise | None = None
) -> None:
    _encode(rows.FEEDBACK, x, residual, None, decay, out, fmt, noise)


def choco_encode(
    x: Tensor, xhat: Tensor, s: Tensor, self_weight: float, out: Coded, fmt: Format, noise: Noise | None = None
) -> None:
    _encode(rows.CHOCO, x, xhat, s, self_weight, out, fmt, noise)


def mix(x: Tensor, self_weight: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format) -> None:
    n = x.numel()
    table = wire_rows(wires, weights, fmt, n)
    args = (0, *format_numbers(fmt), n, *values(x, n, "x"), 0, 0, float_bits(self_weight), len(wires))
    run(kernels.mix, args, n, table)


def decode_add(wire: Coded, y: Tensor, weight: float, fmt: Format) -> None:
    state(y, y.numel(), "y")
    mix(y, 1.0, (wire,), (weight,), fmt)


def choco_mix(
    x: Tensor, xhat: Tensor, s: Tensor, gamma: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format
) -> None:
    n = x.numel()
    table = wire_rows(wires, weights, fmt, n)
    args = (n, *values(x, n, "x"), state(xhat, n, "xhat"), state(s, n, "s"), float_bits(gamma), len(wires))
    run(kernels.mix, (1, *format_numbers(fmt), *args), n, table)


# ---- one format each


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


def dequantize_add_int8(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("int8", block))


def dequantize_add_int4(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("int4", block))


def dequantize_add_e3m0(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("e3m0", block))


def dequantize_add_lut4(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("lut4", block))


def dequantize_add_sign(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("sign", block))


def cast_bf16(x: Tensor, wire: Tensor) -> None:
    encode(x, Coded(wire, _NONE), _BF16)


def add_bf16(wire: Tensor, y: Tensor, weight: float) -> None:
    decode_add(Coded(wire, _NONE), y, weight, _BF16)


def topk_chunks(x: Tensor, codes: Tensor, scales: Tensor, chunk: int, k: int, bits: int) -> None:
    encode(x, Coded(codes, scales), Format("topk", chunk, k, bits))


def topk_add(codes: Tensor, scales: Tensor, y: Tensor, weight: float, chunk: int, k: int, bits: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("topk", chunk, k, bits))

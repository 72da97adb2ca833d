"""How are arrived wires added to a tensor? Every element is read and written once, every wire read once."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.check import kind_rows, same_length, wire_lengths
from dtrain.kernels._triton.launch import aligned, kernel, launch
from dtrain.kernels._triton.memory import bytes_at, float_of, load_float, store_float, typed
from dtrain.kernels._triton.tables import float_bits, on_device
from dtrain.kernels._triton.tiles import decode_tile
from dtrain.kernels._triton.topk_add import topk_add as _topk_add
from dtrain.kernels._triton.topk_add import topk_mix
from dtrain.kernels.operands import Coded, Format


@triton.jit
def add_wires(
    y, wires, num_wires, code_byte, scale_byte, at, inside, left, whole,
    KIND: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """y + sum_j weight_j decode(wire_j), in order. A row of the table: addresses of codes and scales, bits of the weight."""
    for j in range(num_wires):
        codes = typed(tl.load(wires + 3 * j) + code_byte, tl.uint8)
        scales = typed(tl.load(wires + 3 * j + 1) + scale_byte, tl.uint8)
        weight = float_of(tl.load(wires + 3 * j + 2))
        y += decode_tile(at, inside, left, whole, codes, scales, weight, KIND, R, B)
    return y


@kernel
def decode_add_kernel(
    y, codes, scales, weight: tl.float32, numel: tl.int64, whole: tl.int64,
    KIND: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * (R * B)
    left = tl.minimum(numel - start, R * B).to(tl.int32)
    at = tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    inside = at < left
    whole = (whole != 0) & (left == R * B)
    codes += start * BITS // 8
    scales = bytes_at(scales, start // B * (4 if KIND == "lut4" else 2))
    before = load_float(y + start, at, inside, whole)
    part = decode_tile(at, inside, left, whole, codes, scales, weight, KIND, R, B)
    store_float(y + start, at, before + part, inside, whole)


@kernel
def mix_kernel(
    x, xhat, s, wires, num_wires: tl.int64, factor: tl.float32, numel: tl.int64, whole: tl.int64,
    MODE: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """factor: self_weight, for MODE choco gamma."""
    start = tl.program_id(0).to(tl.int64) * (R * B)
    left = tl.minimum(numel - start, R * B).to(tl.int32)
    at = tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    inside = at < left
    whole = (whole != 0) & (left == R * B)
    code_byte, scale_byte = start * BITS // 8, start // B * (4 if KIND == "lut4" else 2)
    value = load_float(x + start, at, inside, whole)
    if MODE == "choco":
        own = load_float(s + start, at, inside, whole)
        own = add_wires(own, wires, num_wires, code_byte, scale_byte, at, inside, left, whole, KIND, R, B)
        store_float(s + start, at, own, inside, whole)
        value = value + (own - load_float(xhat + start, at, inside, whole)) * factor
    else:
        value = add_wires(value * factor, wires, num_wires, code_byte, scale_byte, at, inside, left, whole, KIND, R, B)
    store_float(x + start, at, value, inside, whole)


def decode_add(wire: Coded, y: Tensor, weight: float, fmt: Format) -> None:
    same_length(y)
    wire_lengths(wire, fmt, y.numel())
    if fmt.kind == "topk":
        _topk_add(wire, y, weight, fmt)
        return
    rows, block, warps, bits = kind_rows(fmt, "plain")
    launch(
        decode_add_kernel, -(-y.numel() // (rows * block)), warps, y, wire.codes, wire.scales, float(weight), y.numel(),
        int(aligned(y, wire.codes)), KIND=fmt.kind, BITS=bits, R=rows, B=block,
    )  # fmt: skip


def mix(x: Tensor, self_weight: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format) -> None:
    _mix("mix", x, x, x, self_weight, wires, weights, fmt)


def choco_mix(
    x: Tensor, xhat: Tensor, s: Tensor, gamma: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format
) -> None:
    _mix("choco", x, xhat, s, gamma, wires, weights, fmt)


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


def add_bf16(wire: Tensor, y: Tensor, weight: float) -> None:
    decode_add(Coded(wire, wire[:0]), y, weight, Format("bf16"))


def topk_add(codes: Tensor, scales: Tensor, y: Tensor, weight: float, chunk: int, k: int, bits: int) -> None:
    decode_add(Coded(codes, scales), y, weight, Format("topk", chunk, k, bits))


def _mix(
    mode: str, x: Tensor, xhat: Tensor, s: Tensor, factor: float, wires: Sequence[Coded], weights: Sequence[float], fmt: Format
) -> None:
    same_length(x, xhat, s)
    for wire in wires:
        wire_lengths(wire, fmt, x.numel())
    words = [
        word
        for wire, weight in zip(wires, weights, strict=True)
        for word in (wire.codes.data_ptr(), wire.scales.data_ptr(), float_bits(weight))
    ]
    table = on_device(words, x.device)
    if fmt.kind == "topk":
        topk_mix(mode, x, xhat, s, factor, table, len(wires), fmt)
        return
    rows, block, warps, bits = kind_rows(fmt, mode)
    launch(
        mix_kernel, -(-x.numel() // (rows * block)), warps, x, xhat, s, table, len(wires), float(factor), x.numel(),
        int(aligned(x, xhat, s, *(wire.codes for wire in wires))), MODE=mode, KIND=fmt.kind, BITS=bits, R=rows, B=block,
    )  # fmt: skip

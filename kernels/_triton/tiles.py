"""How is a tile written into a wire, and read from one? (R, B): R blocks of B elements; casts have one, without scales."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl

from dtrain.kernels._triton.arithmetic import pack4, pack_bits, unpack4, unpack_bits
from dtrain.kernels._triton.formats import dequantize, quantize
from dtrain.kernels._triton.memory import bf16_bits, from_bf16_bits, load, load_float, store, store_float


@triton.jit
def encode_tile(
    x, at, inside, left, whole, codes, scales, seed, first,
    KIND: tl.constexpr, R: tl.constexpr, B: tl.constexpr, NOISY: tl.constexpr,
):  # fmt: skip
    """Write a tile's codes and scales, whose first are at the pointers (bytes); -> what a reader needs for ``dequantize``."""
    if KIND == "identity" or KIND == "bf16":
        ELEMENT: tl.constexpr = tl.float32 if KIND == "identity" else tl.bfloat16
        store_float(codes.to(tl.pointer_type(ELEMENT), bitcast=True), at, x, inside, whole)
        code, scale, second = x, x, x
    else:
        code, scale, second = quantize(x, inside, left, seed, first, KIND, R, B, NOISY)
        row = tl.arange(0, R)
        there = row * B < left
        scales = scales.to(tl.pointer_type(tl.uint16), bitcast=True)
        if KIND == "lut4":
            tl.store(scales + row * 2, scale.to(tl.uint16), mask=there)
            tl.store(scales + row * 2 + 1, second.to(tl.uint16), mask=there)
        else:
            tl.store(scales + row, scale.to(tl.uint16), mask=there)
        if KIND == "int8":
            store(codes, at, code.to(tl.uint8), inside, whole)
        else:
            A: tl.constexpr = 8 if KIND == "sign" else 2
            at_byte = tl.arange(0, R)[:, None] * (B // A) + tl.arange(0, B // A)[None, :]
            if KIND == "sign":
                packed = pack_bits(code, R, B)
            else:
                packed = pack4(code, R, B)
            store(codes, at_byte, packed, at_byte * A < left, whole)
    return code, scale, second


@triton.jit
def decode_tile(at, inside, left, whole, codes, scales, weight, KIND: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """-> weight times the tile that stands at the pointers (bytes)."""
    if KIND == "identity" or KIND == "bf16":
        ELEMENT: tl.constexpr = tl.float32 if KIND == "identity" else tl.bfloat16
        y = load_float(codes.to(tl.pointer_type(ELEMENT), bitcast=True), at, inside, whole) * weight
    else:
        row = tl.arange(0, R)
        there = row * B < left
        scales = scales.to(tl.pointer_type(tl.uint16), bitcast=True)
        if KIND == "lut4":
            scale = tl.load(scales + row * 2, mask=there, other=0)
            second = tl.load(scales + row * 2 + 1, mask=there, other=0)
        else:
            scale = tl.load(scales + row, mask=there, other=0)
            second = scale
        if KIND == "int8":
            code = load(codes.to(tl.pointer_type(tl.int8), bitcast=True), at, inside, whole).to(tl.int32)
        else:
            A: tl.constexpr = 8 if KIND == "sign" else 2
            at_byte = tl.arange(0, R)[:, None] * (B // A) + tl.arange(0, B // A)[None, :]
            packed = load(codes, at_byte, at_byte * A < left, whole)
            if KIND == "sign":
                code = unpack_bits(packed, R, B)
            else:
                code = unpack4(packed, R, B)
        y = dequantize(code, scale, second, weight, KIND)
    return y


@triton.jit
def decode_again(x, code, scale, second, weight, KIND: tl.constexpr):
    """``decode_tile`` of what ``encode_tile`` has just written, from registers."""
    if KIND == "identity":
        y = x * weight
    elif KIND == "bf16":
        y = from_bf16_bits(bf16_bits(x)) * weight
    else:
        y = dequantize(code, scale, second, weight, KIND)
    return y

"""How do codes become numbers again? Each format's way out, 32 elements at a time: dst = src src_weight + weight decode(codes).

``dst`` is fp32 and ``src`` too, or bf16 (``half``). Both reach to the end of the last block."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

import numpy as np

from dtrain.kernels._numba.formats import AHEAD, fetch2, half_value, inlined, read32
from dtrain.kernels._numba.memory import load_f32x32, load_half, load_i8x16, load_i8x32, load_word, store
from dtrain.kernels._numba.simd import (
    as_bits, as_floats, bits32, bits_mask, floats32, select, split_nibbles, to_float, wider8, wider8_signed,
)  # fmt: skip
from dtrain.kernels.reference import LUT4 as LUT4_TABLE

_TOP = tuple(np.array(LUT4_TABLE[8:], np.float32))


@inlined
def pick8(index, t):
    """t[index & 7] by selects: a gather takes a load a lane."""
    odd, second, fourth = (index & 1) == 1, (index & 2) == 2, (index & 4) == 4
    low = select(second, select(odd, t[3], floats32(t[2])), select(odd, t[1], floats32(t[0])))
    high = select(second, select(odd, t[7], floats32(t[6])), select(odd, t[5], floats32(t[4])))
    return select(fourth, high, low)


@inlined
def lut_values(code):
    above = code & 8
    magnitude = pick8(code ^ select(above == 8, 0, bits32(7)), _TOP)
    return as_floats(as_bits(magnitude) | ((above ^ 8) << 28))


@inlined
def _mixed(src, half, src_weight, g):
    at = src + (64 if half else 128) * g
    fetch2(at + AHEAD)
    return read32(at, half) * src_weight


@inlined
def _scale(scales, i, weight):
    return half_value(load_half(scales + 2 * i)) * weight


def decode_identity(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for g in range(blocks * groups):
        fetch2(codes + 128 * g + AHEAD)
        store(dst + 128 * g, _mixed(src, half, src_weight, g) + load_f32x32(codes + 128 * g) * weight)


def decode_bf16(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for g in range(blocks * groups):
        store(dst + 128 * g, _mixed(src, half, src_weight, g) + read32(codes + 64 * g, 1) * weight)


def decode_int8(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for b in range(blocks):
        s = _scale(scales, b, weight)
        for g in range(b * groups, (b + 1) * groups):
            values = to_float(wider8_signed(load_i8x32(codes + 32 * g)))
            store(dst + 128 * g, _mixed(src, half, src_weight, g) + values * s)


def decode_int4(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for b in range(blocks):
        s = _scale(scales, b, weight)
        for g in range(b * groups, (b + 1) * groups):
            values = to_float(wider8(split_nibbles(load_i8x16(codes + 16 * g))) - 8)
            store(dst + 128 * g, _mixed(src, half, src_weight, g) + values * s)


def decode_e3m0(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for b in range(blocks):
        s = _scale(scales, b, weight)
        for g in range(b * groups, (b + 1) * groups):
            nibbles = wider8(split_nibbles(load_i8x16(codes + 16 * g)))
            c = nibbles & 7
            values = as_floats(select(c == 0, 0, (c + 120) << 23) | ((nibbles & 8) << 28))
            store(dst + 128 * g, _mixed(src, half, src_weight, g) + values * s)


def decode_lut4(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for b in range(blocks):
        mean, sigma = _scale(scales, 2 * b, weight), _scale(scales, 2 * b + 1, weight)
        for g in range(b * groups, (b + 1) * groups):
            values = lut_values(wider8(split_nibbles(load_i8x16(codes + 16 * g)))) * sigma + mean
            store(dst + 128 * g, _mixed(src, half, src_weight, g) + values)


def decode_sign(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    for b in range(blocks):
        s = _scale(scales, b, weight)
        for g in range(b * groups, (b + 1) * groups):
            values = select(bits_mask(load_word(codes + 4 * g)), -s, floats32(s))
            store(dst + 128 * g, _mixed(src, half, src_weight, g) + values)

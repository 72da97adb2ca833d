"""What do the formats share? Rounding, random bits, scales, sums, and a row's way between fp32 and bf16."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from dtrain.kernels._numba.memory import bits_float, fetch, float_bits, load_f32x32, load_i16x32, load_i32x32, store, store_half
from dtrain.kernels._numba.simd import (
    as_bits, as_floats, bits32, count32, largest, largest_lane, low_half, select, to_float, tree_of_lanes, wider16,
)  # fmt: skip

inlined: Any = njit(error_model="numpy", forceinline=True)
called: Any = njit(error_model="numpy")

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_UNIT24 = np.float32(2.0**-24)
MASK32 = 0xFFFFFFFF
_INFINITE, _ABS = 0x7F800000, 0x7FFFFFFF
_NAN16 = 0x7FC0

AHEAD = 1024
"""Bytes that a loop asks for in advance. A CPU stops fetching by itself at the end of each page of 4 KiB, and every stream
ends there at once; with five of them a step of AccumAdam takes 0.63 of the time."""


@inlined
def round_half(v):
    """fp32 -> the bits of the nearest bf16, in the low half of each lane; NaN is 0x7FC0."""
    bits = as_bits(v)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return select((bits & _ABS) > _INFINITE, _NAN16, rounded)


@inlined
def fetch2(address):
    """The lines of 32 fp32."""
    fetch(address)
    fetch(address + 64)


@inlined
def read32(address, half):
    if half:
        return as_floats(wider16(load_i16x32(address)) << 16)
    return load_f32x32(address)


@inlined
def write32(address, half, v):
    if half:
        store(address, low_half(round_half(v)))
    else:
        store(address, v)


@inlined
def mix_scalar(h):
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & MASK32
    h = ((h ^ (h >> 15)) * 0x846CA68B) & MASK32
    return h ^ (h >> 16)


@inlined
def mix_lanes(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@inlined
def random32(seed, index):
    """The random bits of elements index .. index + 31."""
    low = index & MASK32
    key = mix_scalar(((index >> 32) + seed) & MASK32)
    next_key = mix_scalar(((index >> 32) + 1 + seed) & MASK32)
    lanes = count32() + low
    return mix_lanes(lanes + select(lanes < bits32(low), bits32(next_key), key))


@inlined
def uniform32(seed, index):
    return to_float(random32(seed, index) >> 8) * _UNIT24


@inlined
def half_of(value):
    """The bits of the bf16 nearest to a float32 that is not NaN."""
    bits = float_bits(value)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


@inlined
def half_value(bits):
    return bits_float(bits << 16)


@inlined
def safe_inverse(scale):
    inverse = _ONE / scale
    return _ZERO if (float_bits(inverse) & _ABS) == _INFINITE else inverse


@inlined
def put_scale(value, scale_address):
    """Write a scale that is not negative; returns its inverse and a mask, both 0 where the scale is not finite."""
    bits = half_of(value)
    if (float_bits(value) & _ABS) > _INFINITE or bits >= 0x7F80:
        store_half(scale_address, _NAN16)
        return _ZERO, 0
    store_half(scale_address, bits)
    return safe_inverse(half_value(bits)), MASK32


@inlined
def largest_bits(src, groups):
    """The largest magnitude as bits, in whose order inf and NaN come last."""
    fetch2(src + AHEAD)
    most = load_i32x32(src) & _ABS
    for g in range(1, groups):
        fetch2(src + 128 * g + AHEAD)
        most = largest(most, load_i32x32(src + 128 * g) & _ABS)
    return largest_lane(most)


@inlined
def fold(work, groups):
    """Add halves of a power of two of groups, destroying them, until one value is left."""
    while groups > 1:
        groups >>= 1
        for g in range(groups):
            store(work + 128 * g, load_f32x32(work + 128 * g) + load_f32x32(work + 128 * (g + groups)))
    return tree_of_lanes(load_f32x32(work))

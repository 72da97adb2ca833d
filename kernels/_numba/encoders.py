"""How do numbers become codes? Each format's way in, 32 elements at a time. Seed -1 rounds to nearest.

``src`` is fp32 and reaches to the end of the last block, filled with zeros behind ``valid`` elements."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

import numpy as np

from dtrain.kernels._numba.formats import (
    AHEAD, MASK32, _ABS, _INFINITE, _NAN16, _ONE, _UNIT24, _ZERO, fold, half_of, half_value, inlined, largest_bits, put_scale,
    random32, round_half, safe_inverse, uniform32, write32,
)  # fmt: skip
from dtrain.kernels._numba.memory import (
    bits_float, fetch, float_bits, load_f32x32, load_f32x8, load_float, load_i32x32, stack, store, store_word,
)  # fmt: skip
from dtrain.kernels._numba.simd import (
    as_bits, as_floats, bits32, count32, floats32, floor, join_nibbles, largest_lane, largest_signed, least_signed, low_byte,
    low_half, mask_bits, rint, root, saturated_byte, select, size, to_float, to_integer,
)  # fmt: skip
from dtrain.kernels.reference import LUT4 as LUT4_TABLE
from dtrain.kernels.operands import MAX_BLOCK

_HALF, _TWELVE, _EIGHT, _FIFTEEN = (np.float32(v) for v in (0.5, 0.375, 8.0, 15.0))
_E3M0_LEAST, _E3M0_HALF, _E3M0_UP = (np.float32(v) for v in (2.0**-6, 2.0**-7, 2.0**6))
_MOST8, _MOST4 = np.float32(127.0), np.float32(7.0)
_LUT = np.array(LUT4_TABLE, np.float32)
_EDGES, _GAPS = tuple(_LUT), (*(np.float32(1.0) / np.diff(_LUT)), np.float32(0.0))
_work_room, _inverse_room = stack(4 * MAX_BLOCK), stack(32)


@inlined
def kept(src, keep):
    return as_floats(load_i32x32(src) & keep)


@inlined
def integers(t, most):
    """Whole numbers as bytes, between -most and most. Bytes that saturate take a quarter of the work of words."""
    return least_signed(largest_signed(saturated_byte(to_integer(t)), -most), most)


@inlined
def _int8_group(x, inverse, codes, seed, index):
    t = x * inverse
    t = rint(t) if seed < 0 else floor(t + uniform32(seed, index))
    store(codes, integers(t, 127))


@inlined
def _int4_group(x, inverse, codes, seed, index):
    t = x * inverse
    t = rint(t) if seed < 0 else floor(t + uniform32(seed, index))
    store(codes, join_nibbles(integers(t, 7) + 8))


@inlined
def _int8_block(src, groups, codes, scale_address, seed, index):
    inverse, keep = put_scale(bits_float(largest_bits(src, groups)) / _MOST8, scale_address)
    for g in range(groups):
        _int8_group(kept(src + 128 * g, keep), inverse, codes + 32 * g, seed, index + 32 * g)


@inlined
def _int4_block(src, groups, codes, scale_address, seed, index):
    inverse, keep = put_scale(bits_float(largest_bits(src, groups)) / _MOST4, scale_address)
    for g in range(groups):
        _int4_group(kept(src + 128 * g, keep), inverse, codes + 16 * g, seed, index + 32 * g)


@inlined
def put_eight_scales(src, groups, most, scales, inverses):
    """What ``put_scale`` does, for the scales max / most of eight blocks, with their inverses into a room; False, and no
    scale written, where one is not finite.

    One by one, two divisions and the way through scalar registers and back took more than half of the time of an encoder."""
    for b in range(8):
        store_word(inverses + 4 * b, largest_bits(src + 128 * groups * b, groups))
    halves = round_half(load_f32x8(inverses) / most)
    if largest_lane(halves) >= 0x7F80:
        return False
    store(scales, low_half(halves))
    inverse = _ONE / as_floats(halves << 16)
    store(inverses, select((as_bits(inverse) & _ABS) == _INFINITE, _ZERO, inverse))
    return True


@inlined
def _e3m0_block(src, groups, codes, scale_address, seed, index):
    inverse, keep = put_scale(bits_float(largest_bits(src, groups)), scale_address)
    for g in range(groups):
        x = kept(src + 128 * g, keep)
        r = size(x) * inverse
        if seed < 0:
            up = bits32(0x400000)
            grown = r >= _E3M0_HALF
        else:
            random = random32(seed, index + 32 * g)
            up = random >> 9
            grown = to_float(random >> 8) * _UNIT24 < r * _E3M0_UP
        c = least_signed(largest_signed(((as_bits(r) + up) >> 23) - 120, 1), 7)
        c = select(r < _E3M0_LEAST, select(grown, 1, bits32(0)), c)
        store(codes + 16 * g, join_nibbles(low_byte(c | select(x < _ZERO, 8, bits32(0)))))


@inlined
def lut_at_random(z, uniform):
    """The code below z and, at random, the one above: a select replaces the code, its value and 1 / gap at each edge passed."""
    code, low, gap = bits32(0), floats32(_EDGES[0]), floats32(_GAPS[0])
    for i in range(1, 16):
        passed = z >= _EDGES[i]
        code = select(passed, i, code)
        low = select(passed, _EDGES[i], low)
        gap = select(passed, _GAPS[i], gap)
    return select(uniform < (z - low) * gap, code + 1, code)


@inlined
def _lut4_block(src, groups, valid, codes, scale_address, work, seed, index):
    for g in range(groups):
        store(work + 128 * g, load_f32x32(src + 128 * g))
    count = np.float32(valid)
    sum_ = fold(work, groups) / count
    mean_bits = half_of(sum_)
    mean = half_value(mean_bits)
    for g in range(groups):
        off = select(count32() < bits32(max(0, valid - 32 * g)), load_f32x32(src + 128 * g) - mean, _ZERO)
        store(work + 128 * g, off * off)
    variance = root(fold(work, groups) / count)
    sigma_bits = half_of(variance)
    keep, sigma = MASK32, half_value(sigma_bits)
    if (
        (float_bits(sum_) & _ABS) > _INFINITE or (mean_bits & 0x7FFF) >= 0x7F80
        or (float_bits(variance) & _ABS) > _INFINITE or sigma_bits >= 0x7F80
    ):  # fmt: skip
        mean_bits, sigma_bits, keep, sigma = _NAN16, _NAN16, 0, _ZERO
    store_word(scale_address, mean_bits | (sigma_bits << 16))
    inverse = safe_inverse(sigma * _TWELVE) if seed < 0 else safe_inverse(sigma)
    for g in range(groups):
        inside = count32() < bits32(max(0, valid - 32 * g))
        off = as_floats(as_bits(load_f32x32(src + 128 * g) - mean) & select(inside, keep, bits32(0)))
        if seed < 0:
            t = floor(off * inverse + _EIGHT)
            t = select(t < _ZERO, _ZERO, select(t > _FIFTEEN, _FIFTEEN, t))
            code = to_integer(t)
        else:
            code = select(inside, lut_at_random(off * inverse, uniform32(seed, index + 32 * g)), bits32(8))
        store(codes + 16 * g, join_nibbles(low_byte(code)))


@inlined
def _sign_block(src, groups, valid, codes, scale_address, work, seed, index):
    if seed < 0:
        for g in range(groups):
            store(work + 128 * g, size(load_f32x32(src + 128 * g)))
        _, keep = put_scale(fold(work, groups) / np.float32(valid), scale_address)
        for g in range(groups):
            store_word(codes + 4 * g, mask_bits(kept(src + 128 * g, keep) < _ZERO))
    else:
        inverse, keep = put_scale(bits_float(largest_bits(src, groups)), scale_address)
        for g in range(groups):
            t = (kept(src + 128 * g, keep) * inverse + _ONE) * _HALF
            bits = mask_bits(uniform32(seed, index + 32 * g) >= t)
            inside = mask_bits(count32() < bits32(max(0, valid - 32 * g)))
            store_word(codes + 4 * g, bits & inside)


def encode_identity(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    for g in range(blocks * groups):
        store(codes + 128 * g, load_f32x32(src + 128 * g))


def encode_bf16(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    for g in range(blocks * groups):
        write32(codes + 64 * g, 1, load_f32x32(src + 128 * g))


def encode_int8(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    size = 32 * groups
    inverses = _inverse_room()
    b = 0
    while b < blocks:
        at = size * b
        if b + 8 <= blocks and put_eight_scales(src + 4 * at, groups, _MOST8, scales + 2 * b, inverses):
            for i in range(8):
                inverse = load_float(inverses + 4 * i)
                for e in range(at + size * i, at + size * (i + 1), 32):
                    fetch(codes + e + AHEAD)
                    _int8_group(load_f32x32(src + 4 * e), inverse, codes + e, seed, index + e)
            b += 8
        else:
            _int8_block(src + 4 * at, groups, codes + at, scales + 2 * b, seed, index + at)
            b += 1


def encode_int4(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    size = 32 * groups
    inverses = _inverse_room()
    b = 0
    while b < blocks:
        at = size * b
        if b + 8 <= blocks and put_eight_scales(src + 4 * at, groups, _MOST4, scales + 2 * b, inverses):
            for i in range(8):
                inverse = load_float(inverses + 4 * i)
                for e in range(at + size * i, at + size * (i + 1), 32):
                    fetch(codes + e // 2 + AHEAD)
                    _int4_group(load_f32x32(src + 4 * e), inverse, codes + e // 2, seed, index + e)
            b += 8
        else:
            _int4_block(src + 4 * at, groups, codes + at // 2, scales + 2 * b, seed, index + at)
            b += 1


def encode_e3m0(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    for b in range(blocks):
        at = 32 * groups * b
        _e3m0_block(src + 4 * at, groups, codes + at // 2, scales + 2 * b, seed, index + at)


def encode_lut4(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    work = _work_room()
    for b in range(blocks):
        at = 32 * groups * b
        inside = min(32 * groups, valid - at)
        _lut4_block(src + 4 * at, groups, inside, codes + at // 2, scales + 4 * b, work, seed, index + at)


def encode_sign(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    work = _work_room()
    for b in range(blocks):
        at = 32 * groups * b
        inside = min(32 * groups, valid - at)
        _sign_block(src + 4 * at, groups, inside, codes + at // 8, scales + 2 * b, work, seed, index + at)

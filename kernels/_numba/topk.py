"""How are the k largest magnitudes of a chunk found without sorting it?

A magnitude's bits order as the magnitude does. The k-th largest of the groups' maxima is a bound that at least k elements reach,
and few more do; only those are counted, bit by bit, until the k-th largest value is known."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

import numpy as np

from dtrain.kernels._numba.formats import (
    _ABS, _INFINITE, _NAN16, _ONE, _ZERO, fold, half_of, half_value, inlined, put_scale, read32,
)  # fmt: skip
from dtrain.kernels._numba.memory import (
    clear_bytes, load_byte, load_float, load_half, load_i32x16, load_i32x32,
    load_signed_byte, load_word, lowest_set, stack, store, store_byte, store_half, store_word,
)  # fmt: skip
from dtrain.kernels._numba.simd import bits16, largest, largest_lane, mask_bits, rint, select, tree_of_lanes
from dtrain.kernels.operands import MAX_BLOCK

_most_room = stack(4 * MAX_BLOCK // 32 + 64)
_key_room = stack(4 * MAX_BLOCK + 128)
_place_room = stack(4 * MAX_BLOCK + 128)
_value_room = stack(4 * MAX_BLOCK + 128)
_part_room = stack(4 * MAX_BLOCK + 128)


@inlined
def reaching(keys, vectors, bound):
    """How many of 16 ``vectors`` keys are at least ``bound``, none of which is 0."""
    total = bits16(0)
    for i in range(vectors):
        total += select(load_i32x16(keys + 64 * i) >= bits16(bound), 1, bits16(0))
    return np.int64(tree_of_lanes(total))


@inlined
def kth_largest(keys, vectors, k, low):
    """The largest bound that k of the keys reach, given one that they do; a bound that exactly k reach is as good."""
    high = np.int64(_INFINITE)
    while high - low > 1:
        middle = (low + high) >> 1
        count = reaching(keys, vectors, middle)
        if count >= k:
            low = middle
            if count == k:
                break
        else:
            high = middle
    return low


@inlined
def candidates(src, groups, bound, keys, places):
    """Gather the keys that reach the bound, and where they are, in order; returns how many."""
    count = 0
    for g in range(groups):
        bits = mask_bits((load_i32x32(src + 128 * g) & _ABS) >= bound)
        while bits != 0:
            at = 32 * g + lowest_set(bits)
            store_word(keys + 4 * count, load_word(src + 4 * at) & _ABS)
            store_word(places + 4 * count, at)
            count += 1
            bits &= bits - 1
    return count


@inlined
def choose(src, chunk, k, places):
    """Put the places of the k largest at ``places``, rising; of equal ones the first."""
    groups = chunk // 32
    maxima, keys = _most_room(), _key_room()
    clear_bytes(maxima, 4 * MAX_BLOCK // 32 + 64)
    for g in range(groups):
        store_word(maxima + 4 * g, largest_lane(load_i32x32(src + 128 * g) & _ABS))
    bound = 0
    if k <= groups:
        bound = kth_largest(maxima, (groups + 15) // 16, k, 0)
    count = candidates(src, groups, bound, keys, places)
    clear_bytes(keys + 4 * count, 64)
    least = kth_largest(keys, (count + 15) // 16, k, bound)
    above = 0
    for i in range(count):
        above += load_word(keys + 4 * i) > least
    ties = k - above
    kept = 0
    for i in range(count):
        key, place = load_word(keys + 4 * i), load_word(places + 4 * i)
        store_word(places + 4 * kept, place)
        equal = np.int64(key == least) & np.int64(ties > 0)
        kept += np.int64(key > least) | equal
        ties -= equal
        if kept == k:
            break


@inlined
def _sum(values, k):
    """Of k values, a power of two from 4, in tree order."""
    if k >= 32:
        return fold(values, k // 32)
    while k > 1:
        k >>= 1
        for i in range(k):
            store(values + 4 * i, load_float(values + 4 * i) + load_float(values + 4 * (k + i)))
    return load_float(values)


@inlined
def _put_bytes(values, k, codes, scale_address):
    most = _ZERO
    for i in range(k):
        most = max(most, abs(load_float(values + 4 * i)))
    inverse, _ = put_scale(most / np.float32(127.0), scale_address)
    for i in range(k):
        code = np.int64(rint(load_float(values + 4 * i) * inverse))
        store_byte(codes + i, max(-127, min(127, code)))


@inlined
def _put_pairs(values, k, codes, scale_address):
    part = _part_room()
    for i in range(k):
        store(part + 4 * i, abs(load_float(values + 4 * i)))
    mean = _sum(part, k) / np.float32(k)
    num_high = 0
    for i in range(k):
        v = abs(load_float(values + 4 * i))
        num_high += v >= mean
        store(part + 4 * i, _ZERO if v >= mean else v)
    low = half_of(_sum(part, k) / np.float32(max(1, k - num_high)))
    for i in range(k):
        v = abs(load_float(values + 4 * i))
        store(part + 4 * i, v if v >= mean else _ZERO)
    high = half_of(_sum(part, k) / np.float32(max(1, num_high)))
    if low >= 0x7F80 or high >= 0x7F80:
        low, high = _NAN16, _NAN16
    store_half(scale_address, low)
    store_half(scale_address + 2, high)
    for i in range(0, k, 4):
        quad = 0
        for j in range(4):
            v = load_float(values + 4 * (i + j))
            quad |= (np.int64(abs(v) >= mean) | (np.int64(v < _ZERO) << 1)) << (2 * j)
        store_byte(codes + i // 4, quad)


def encode_topk(src, blocks, groups, k, bits, valid, codes, scales, seed, index):
    """As ``reference.topk_chunks``, for chunks of fp32 that are filled with zeros."""
    chunk = 32 * groups
    places, values = _place_room(), _value_room()
    index_bytes, scale_bytes = k * 12 // 8, 4 if bits == 2 else 2
    for c in range(blocks):
        x, scale_address = src + 4 * chunk * c, scales + scale_bytes * c
        record = codes + k * (12 + bits) // 8 * c
        most = load_i32x32(x) & _ABS
        for g in range(1, groups):
            most = largest(most, load_i32x32(x + 128 * g) & _ABS)
        if largest_lane(most) >= _INFINITE:
            for i in range(k):
                store_word(places + 4 * i, i)
                store(values + 4 * i, _ZERO)
        else:
            choose(x, chunk, k, places)
            for i in range(k):
                store(values + 4 * i, load_float(x + 4 * load_word(places + 4 * i)))
        for i in range(0, k, 2):
            pair = load_word(places + 4 * i) | (load_word(places + 4 * i + 4) << 12)
            store_half(record + i // 2 * 3, pair)
            store_byte(record + i // 2 * 3 + 2, pair >> 16)
        if bits == 8:
            _put_bytes(values, k, record + index_bytes, scale_address)
        else:
            _put_pairs(values, k, record + index_bytes, scale_address)
        if largest_lane(most) >= _INFINITE:
            store_half(scale_address, _NAN16)
            store_half(scale_address + scale_bytes - 2, _NAN16)


def decode_topk(codes, scales, weight: float, blocks, groups, k, bits, valid, src, half, src_weight: float, dst):
    """dst[index] += value (scale weight); places at or behind ``valid`` are skipped."""
    chunk = 32 * groups
    if src != dst or src_weight != _ONE:
        for g in range(blocks * groups):
            store(dst + 128 * g, read32(src + (64 if half else 128) * g, half) * src_weight)
    index_bytes, scale_bytes = k * 12 // 8, 4 if bits == 2 else 2
    for c in range(blocks):
        record = codes + k * (12 + bits) // 8 * c
        low = half_value(load_half(scales + scale_bytes * c)) * weight
        high = half_value(load_half(scales + scale_bytes * c + scale_bytes - 2)) * weight
        for i in range(k):
            at = record + i // 2 * 3 + (i & 1)
            place = chunk * c + ((load_half(at) >> (4 * (i & 1))) & 4095)
            if bits == 8:
                value = np.float32(load_signed_byte(record + index_bytes + i)) * low
            else:
                code = load_byte(record + index_bytes + i // 4) >> (2 * (i & 3))
                value = high if code & 1 else low
                value = -value if code & 2 else value
            if place < valid:
                store(dst + 4 * place, load_float(dst + 4 * place) + value)

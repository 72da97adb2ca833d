"""Which kernels treat a tensor as a plain row of numbers? The outer step, sums, checks, a scale: 8 or 32 elements at a time."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

import numpy as np

from dtrain.kernels._numba.compiled import kernel
from dtrain.kernels._numba.formats import AHEAD, _ABS, _INFINITE, called, inlined, mix_lanes, read32
from dtrain.kernels._numba.memory import (
    add_shared, bits_float, clear_bytes, copy_bytes, fetch, load_f32x8, load_float, load_i16x32, load_i32x8, load_i32x32,
    load_long, longs, stack, store, store_byte, store_double, take,
)  # fmt: skip
from dtrain.kernels._numba.rows import borrow, give_back, read8, write8, write32
from dtrain.kernels._numba.simd import (
    as_bits, bits8, bits32, count8, doubles32, fma, largest, largest_lane, longs8, select, to_double, tree_of_lanes, wider16,
    wider32,
)  # fmt: skip
from dtrain.kernels.operands import SUM_TILE

UNIT = 32768
TENSOR_FIELDS = 4
"""int64 numbers that stand for a tensor in a list: its first unit, length, address and whether it is bf16."""

_x_room, _sent_room, _anchor_room = stack(128), stack(128), stack(128)
_momentum_room, _delta_room = stack(128), stack(128)
_three, _four, _five, _ten = longs(3), longs(4), longs(5), longs(10)


@called
def _outer(x, x_half, sent, sent_half, anchor, momentum, delta, groups, minus_lr, mu):
    for first in range(0, 32 * groups, 16):
        ahead = 4 * first + AHEAD
        fetch(x + (ahead >> x_half))
        fetch(sent + (ahead >> sent_half))
        fetch(anchor + ahead)
        fetch(momentum + ahead)
        fetch(delta + ahead)
        for i in range(first, first + 16, 8):
            at = 4 * i
            d = load_f32x8(delta + at)
            u = load_f32x8(momentum + at) * mu + d
            new = fma(fma(u, mu, d), minus_lr, load_f32x8(anchor + at))
            moved = read8(x + (i << (2 - x_half)), x_half) - read8(sent + (i << (2 - sent_half)), sent_half)
            store(momentum + at, u)
            store(anchor + at, new)
            write8(x + (i << (2 - x_half)), x_half, moved + new)


@kernel
def outer(arguments):
    n, x, x_half, sent, sent_half, anchor, momentum, delta, minus_lr_bits, mu_bits = _ten(arguments)
    minus_lr, mu, counter = bits_float(minus_lr_bits), bits_float(mu_bits), arguments + 80
    x_room, sent_room, anchor_room, momentum_room, delta_room = (
        _x_room(), _sent_room(), _anchor_room(), _momentum_room(), _delta_room()
    )  # fmt: skip
    while True:
        lo = take(counter) * UNIT
        if lo >= n:
            return
        length = min(UNIT, n - lo)
        _outer(
            x + (lo << (2 - x_half)), x_half, sent + (lo << (2 - sent_half)), sent_half, anchor + 4 * lo, momentum + 4 * lo,
            delta + 4 * lo, length // 32, minus_lr, mu,
        )  # fmt: skip
        rest = length % 32
        if rest:
            at = lo + length - rest
            borrow(x_room, x + (at << (2 - x_half)), rest, 32, x_half)
            borrow(sent_room, sent + (at << (2 - sent_half)), rest, 32, sent_half)
            borrow(anchor_room, anchor + 4 * at, rest, 32, 0)
            borrow(momentum_room, momentum + 4 * at, rest, 32, 0)
            borrow(delta_room, delta + 4 * at, rest, 32, 0)
            _outer(x_room, x_half, sent_room, sent_half, anchor_room, momentum_room, delta_room, 1, minus_lr, mu)
            give_back(x + (at << (2 - x_half)), x_room, rest, x_half)
            give_back(anchor + 4 * at, anchor_room, rest, 0)
            give_back(momentum + 4 * at, momentum_room, rest, 0)


@inlined
def _find(tensors, count, i, u):
    """The tensor of a list that a unit belongs to, from the i-th on."""
    while i + 1 < count and load_long(tensors + 8 * TENSOR_FIELDS * (i + 1)) <= u:
        i += 1
    return i


@kernel
def scale(arguments):
    tensors, count, factor = _three(arguments)
    counter = arguments + 24
    room = _x_room()
    by = load_float(factor)
    i = 0
    while True:
        u = take(counter)
        i = _find(tensors, count, i, u)
        t = tensors + 8 * TENSOR_FIELDS * i
        n, x, half = load_long(t + 8), load_long(t + 16), load_long(t + 24)
        lo = (u - load_long(t)) * UNIT
        if lo >= n:
            return
        x += lo << (2 - half)
        length = min(UNIT, n - lo)
        step = 64 if half else 128
        for g in range(length // 32):
            write32(x + step * g, half, read32(x + step * g, half) * by)
        rest = length % 32
        if rest:
            x += step * (length // 32)
            borrow(room, x, rest, 32, half)
            write32(room, half, read32(room, half) * by)
            give_back(x, room, rest, half)


@kernel
def squares(arguments):
    """The units are the tiles of ``SUM_TILE``: 32 running sums in fp64, in which each square is exact."""
    tensors, count, partial = _three(arguments)
    counter = arguments + 24
    room = _x_room()
    i = 0
    while True:
        u = take(counter)
        i = _find(tensors, count, i, u)
        t = tensors + 8 * TENSOR_FIELDS * i
        n, x, half = load_long(t + 8), load_long(t + 16), load_long(t + 24)
        lo = (u - load_long(t)) * SUM_TILE
        if lo >= n:
            return
        x += lo << (2 - half)
        length = min(SUM_TILE, n - lo)
        step = 64 if half else 128
        total = doubles32(0.0)
        for g in range(length // 32):
            v = to_double(read32(x + step * g, half))
            total += v * v
        rest = length % 32
        if rest:
            borrow(room, x + step * (length // 32), rest, 32, half)
            v = to_double(read32(room, half))
            total += v * v
        store_double(partial + 8 * u, tree_of_lanes(total))


@kernel
def check_sum(arguments):
    """Adds to ``out``. A unit is ``UNIT`` words; lanes are widened before they are added."""
    num_bytes, data, first_word, out = _four(arguments)
    counter = arguments + 32
    room = _x_room()
    num_words = (num_bytes + 3) // 4
    while True:
        lo = take(counter) * UNIT
        if lo >= num_words:
            return
        hi = min(num_words, lo + UNIT)
        total = longs8(0)
        whole = min(hi, num_bytes // 32 * 8)
        for i in range(lo, whole, 8):
            index = count8() + (first_word + i)
            total += wider32(mix_lanes(load_i32x8(data + 4 * i) ^ mix_lanes(index)))
        if whole < hi:
            clear_bytes(room, 32)
            copy_bytes(room, data + 4 * whole, num_bytes - 4 * whole)
            index = count8() + (first_word + whole)
            words = wider32(mix_lanes(load_i32x8(room) ^ mix_lanes(index)))
            total += select(count8() < bits8(hi - whole), words, 0)
        add_shared(out, tree_of_lanes(total))


@kernel
def put(arguments):
    """Values into an identity wire, and its flag: as ``not_finite``, of what is copied."""
    n, x, half, out, flag = _five(arguments)
    counter = arguments + 40
    room = _x_room()
    step = 64 if half else 128
    while True:
        lo = take(counter) * UNIT
        if lo >= n:
            return
        length = min(UNIT, n - lo)
        start, to = x + (lo << (2 - half)), out + 4 * lo
        most = bits32(0)
        for g in range(length // 32):
            v = read32(start + step * g, half)
            store(to + 128 * g, v)
            most = largest(most, as_bits(v) & _ABS)
        rest = length % 32
        if rest:
            borrow(room, start + step * (length // 32), rest, 32, half)
            v = read32(room, half)
            store(room, v)
            copy_bytes(to + 128 * (length // 32), room, 4 * rest)
            most = largest(most, as_bits(v) & _ABS)
        found = largest_lane(most) >= _INFINITE
        if found or n <= UNIT:
            store_byte(flag, np.int64(found))


@kernel
def not_finite(arguments):
    """The flag of a single unit is written, that of several raised."""
    n, x, half, flag = _four(arguments)
    counter = arguments + 32
    room = _x_room()
    step = 64 if half else 128
    while True:
        lo = take(counter) * UNIT
        if lo >= n:
            return
        length = min(UNIT, n - lo)
        start = x + (lo << (2 - half))
        most = bits32(0)
        for g in range(length // 32):
            if half:
                most = largest(most, wider16(load_i16x32(start + 64 * g)) << 16 & _ABS)
            else:
                most = largest(most, load_i32x32(start + 128 * g) & _ABS)
        rest = length % 32
        if rest:
            borrow(room, start + step * (length // 32), rest, 32, half)
            if half:
                most = largest(most, wider16(load_i16x32(room)) << 16 & _ABS)
            else:
                most = largest(most, load_i32x32(room) & _ABS)
        found = largest_lane(most) >= _INFINITE
        if found or n <= UNIT:
            store_byte(flag, np.int64(found))

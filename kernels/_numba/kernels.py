"""Which loops over whole tensors does Python call? With the address of their arguments, all int64: tensors are addresses, floats
the bits of a float32.

Every kernel takes work units from ``counter``, behind the arguments, which threads share, until none is left; so a late thread
takes none, and a unit is computed the same way by whoever takes it. A unit is a whole number of rows, a row of blocks."""
# ruff: noqa: I001 -- many names fill lines, not a line each

from __future__ import annotations

from dtrain.kernels._numba.compiled import kernel
from dtrain.kernels._numba.formats import _ONE, AHEAD, called, inlined
from dtrain.kernels._numba.memory import bits_float, clear_bytes, copy_bytes, fetch, load_float, load_long, longs, stack, take
from dtrain.kernels._numba.rows import (
    CHOCO, FEEDBACK, MINUS_ONE, PLAIN, adam_row, add_wires, borrow, decode_into, encode_any, give_back,
    narrow, read32, round_in_place, short_bytes, store, subtract, towards,
)  # fmt: skip
from dtrain.kernels.operands import MAX_BLOCK

ROW = MAX_BLOCK
"""Elements, whole blocks of any length: fp32 rows of five tensors stay in the second cache, that of x in the first."""
UNIT = 32768
"""Elements that a thread takes at a time."""
PIECE_FIELDS = 14

_y_room, _out_room = stack(4 * MAX_BLOCK), stack(4 * MAX_BLOCK)
_x_room, _g_room, _m_room, _v_room, _a_room = (stack(4 * MAX_BLOCK) for _ in range(5))
_hat_room, _s_room = stack(4 * MAX_BLOCK), stack(4 * MAX_BLOCK)
_encode_arguments, _mix_arguments, _step_arguments = longs(19), longs(15), longs(29)


@called
def _encode_part(mode, fmt, x, x_half, b, b_half, s, alpha, blocks, valid, codes, scales, seed, index):
    groups = blocks * fmt[2]
    y = _y_room()
    if mode == PLAIN:
        if x_half:
            for g in range(groups):
                store(y + 128 * g, read32(x + 64 * g, 1))
        else:
            y = x
    elif mode == FEEDBACK:
        for g in range(groups):
            decayed = read32(b + 128 * g, 0) * alpha
            store(y + 128 * g, decayed + read32(x + (64 if x_half else 128) * g, x_half))
    else:
        subtract(x, x_half, b, b_half, groups, y)
    encode_any(fmt, y, blocks, valid, codes, scales, seed, index)
    if mode == FEEDBACK:
        decode_into(fmt, codes, scales, MINUS_ONE, blocks, valid, y, b)
    elif mode == CHOCO:
        decode_into(fmt, codes, scales, _ONE, blocks, valid, b, b)
        decode_into(fmt, codes, scales, alpha, blocks, valid, s, s)


@kernel
def encode(arguments):
    (
        mode, encode_at, decode_at, block, code_bytes, scale_bytes, k, bits, n, x, x_half, b, b_half, s, factor, codes, scales,
        seed, first,
    ) = _encode_arguments(arguments)  # fmt: skip
    fmt = (encode_at, decode_at, block // 32, code_bytes, scale_bytes, k, bits)
    alpha, counter = bits_float(factor), arguments + 8 * 19
    x_size, b_size = 2 - x_half, 2 - b_half
    out, x_room, b_room, s_room = _out_room(), _x_room(), _hat_room(), _s_room()
    while True:
        lo = take(counter) * UNIT
        if lo >= n:
            return
        for at in range(lo, min(n, lo + UNIT), ROW):
            blocks, rest = min(n - at, ROW) // block, min(n - at, ROW) % block
            _encode_part(
                mode, fmt, x + (at << x_size), x_half, b + (at << b_size), b_half, s + 4 * at, alpha, blocks, blocks * block,
                codes + at // block * code_bytes, scales + at // block * scale_bytes, seed, first + at,
            )  # fmt: skip
            if rest == 0:
                continue
            at = at + blocks * block
            borrow(x_room, x + (at << x_size), rest, block, x_half)
            if mode != PLAIN:
                borrow(b_room, b + (at << b_size), rest, block, b_half)
            if mode == CHOCO:
                borrow(s_room, s + 4 * at, rest, block, 0)
            _encode_part(
                mode, fmt, x_room, x_half, b_room, b_half, s_room, alpha, 1, rest, out, scales + at // block * scale_bytes,
                seed, first + at,
            )  # fmt: skip
            copy_bytes(codes + at // block * code_bytes, out, short_bytes(fmt, rest))
            if mode >= FEEDBACK:
                give_back(b + 4 * at, b_room, rest, 0)
            if mode == CHOCO:
                give_back(s + 4 * at, s_room, rest, 0)


@called
def _mix_part(choco, fmt, x, x_half, xhat, s, alpha, wires, num_wires, code_offset, scale_offset, blocks, valid, y):
    """Mix into y (fp32), which is x where that is fp32; a bf16 x is left as it was."""
    if choco:
        add_wires(fmt, wires, num_wires, code_offset, scale_offset, blocks, valid, s, 0, _ONE, s)
        towards(x, x_half, xhat, s, alpha, blocks * fmt[2], y)
    else:
        add_wires(fmt, wires, num_wires, code_offset, scale_offset, blocks, valid, x, x_half, alpha, y)


@kernel
def mix(arguments):
    """The wires' rows of ``WIRE_FIELDS`` numbers lie behind the counter."""
    (
        choco, encode_at, decode_at, block, code_bytes, scale_bytes, k, bits, n, x, x_half, xhat, s, factor, num_wires,
    ) = _mix_arguments(arguments)  # fmt: skip
    fmt = (encode_at, decode_at, block // 32, code_bytes, scale_bytes, k, bits)
    alpha, counter, wires = bits_float(factor), arguments + 8 * 15, arguments + 8 * 16
    size = 2 - x_half
    y, x_room, hat_room, s_room = _y_room(), _x_room(), _hat_room(), _s_room()
    while True:
        lo = take(counter) * UNIT
        if lo >= n:
            return
        for at in range(lo, min(n, lo + UNIT), ROW):
            blocks, rest = min(n - at, ROW) // block, min(n - at, ROW) % block
            to = y if x_half else x + 4 * at
            _mix_part(
                choco, fmt, x + (at << size), x_half, xhat + 4 * at, s + 4 * at, alpha, wires, num_wires,
                at // block * code_bytes, at // block * scale_bytes, blocks, blocks * block, to,
            )  # fmt: skip
            if x_half:
                narrow(y, x + 2 * at, blocks * fmt[2])
            if rest == 0:
                continue
            at = at + blocks * block
            borrow(x_room, x + (at << size), rest, block, x_half)
            if choco:
                borrow(hat_room, xhat + 4 * at, rest, block, 0)
                borrow(s_room, s + 4 * at, rest, block, 0)
            _mix_part(
                choco, fmt, x_room, x_half, hat_room, s_room, alpha, wires, num_wires,
                at // block * code_bytes, at // block * scale_bytes, 1, rest, y,
            )  # fmt: skip
            if x_half:
                narrow(y, x_room, fmt[2])
                give_back(x + 2 * at, x_room, rest, 1)
            else:
                give_back(x + 4 * at, y, rest, 0)
            if choco:
                give_back(s + 4 * at, s_room, rest, 0)


@called
def _step_part(
    gossips, choco, fmt, x, x_half, g, g_half, m, v, a, xhat, s, alpha, self_weight, wires, num_wires, code_offset, scale_offset,
    blocks, valid, codes, scales, numbers, seed, index,
):  # fmt: skip
    """Mix, Adam and encode one row."""
    y = _y_room() if x_half else x
    groups = blocks * fmt[2]
    if gossips:
        _mix_part(choco, fmt, x, x_half, xhat, s, alpha, wires, num_wires, code_offset, scale_offset, blocks, valid, y)
        if x_half:
            round_in_place(y, groups)
    elif x_half:
        for i in range(groups):
            store(y + 128 * i, read32(x + 64 * i, 1))
    adam_row(x, x_half, g, g_half, m, v, a, groups, y, numbers)
    if not gossips:
        return
    for i in range(AHEAD, 2 * AHEAD, 64):  # of the next row: the memory is not idle while this one is encoded (7 %)
        fetch(g + ((128 * groups + i) >> g_half))
        fetch(m + 128 * groups + i)
        fetch(v + 128 * groups + i)
        if numbers[11]:
            fetch(a + 128 * groups + i)
    if valid < 32 * groups:
        clear_bytes(y + 4 * valid, 4 * (32 * groups - valid))
    if choco:
        d = _out_room()
        subtract(y, 0, xhat, 0, groups, d)
        encode_any(fmt, d, blocks, valid, codes, scales, seed, index)
        decode_into(fmt, codes, scales, _ONE, blocks, valid, xhat, xhat)
        decode_into(fmt, codes, scales, self_weight, blocks, valid, s, s)
    else:
        encode_any(fmt, y, blocks, valid, codes, scales, seed, index)


@inlined
def _field(piece, i):
    return load_long(piece + 8 * i)


@kernel
def step(arguments):
    """Of a piece the table holds: its first unit, length, x, x_half, g, g_half, m, v, a, xhat, s, 1 - lr wd, the place of its
    scales, that of its codes (in a wire); and its element's place in the model is the sum of the lengths before it."""
    (
        gossips, choco, encode_at, decode_at, block, code_bytes, scale_bytes, k, bits, pieces, num_pieces, factor, own, wires,
        num_wires, out, grad_scale, part, one1, one2, step_size, over_root, eps, beta1, beta2, closes, gathers, seed, first,
    ) = _step_arguments(arguments)  # fmt: skip
    counter = arguments + 8 * 29
    fmt = (encode_at, decode_at, block // 32, code_bytes, scale_bytes, k, bits)
    alpha, self_weight, scaling = bits_float(factor), bits_float(own), load_float(grad_scale)
    out_codes, x_room, g_room, m_room, v_room = _x_room(), _y_room(), _g_room(), _m_room(), _v_room()
    a_room, hat_room, s_room = _a_room(), _hat_room(), _s_room()
    i = 0
    while True:
        u = take(counter)
        while i + 1 < num_pieces and _field(pieces + 8 * PIECE_FIELDS * (i + 1), 0) <= u:
            first += _field(pieces + 8 * PIECE_FIELDS * i, 1)
            i += 1
        p = pieces + 8 * PIECE_FIELDS * i
        n, lo = _field(p, 1), (u - _field(p, 0)) * UNIT
        if lo >= n:
            return
        x, x_half, g, g_half = _field(p, 2), _field(p, 3), _field(p, 4), _field(p, 5)
        m, v, a, xhat, s = _field(p, 6), _field(p, 7), _field(p, 8), _field(p, 9), _field(p, 10)
        numbers = (
            scaling, bits_float(part), bits_float(one1), bits_float(one2), bits_float(step_size), bits_float(over_root),
            bits_float(eps), load_float(p + 88), bits_float(beta1), bits_float(beta2), closes, gathers,
        )  # fmt: skip
        scales_at, codes_at = _field(p, 12), _field(p, 13)
        for at in range(lo, min(n, lo + UNIT), ROW):
            blocks, rest = min(n - at, ROW) // block, min(n - at, ROW) % block
            code_offset, scale_offset = codes_at + at // block * code_bytes, scales_at + at // block * scale_bytes
            _step_part(
                gossips, choco, fmt, x + (at << (2 - x_half)), x_half, g + (at << (2 - g_half)), g_half, m + 4 * at, v + 4 * at,
                a + 4 * at, xhat + 4 * at, s + 4 * at, alpha, self_weight, wires, num_wires, code_offset, scale_offset,
                blocks, blocks * block, out + code_offset, out + scale_offset, numbers, seed, first + at,
            )  # fmt: skip
            if rest == 0:
                continue
            at = at + blocks * block
            code_offset, scale_offset = codes_at + at // block * code_bytes, scales_at + at // block * scale_bytes
            borrow(x_room, x + (at << (2 - x_half)), rest, block, x_half)
            borrow(g_room, g + (at << (2 - g_half)), rest, block, g_half)
            borrow(m_room, m + 4 * at, rest, block, 0)
            borrow(v_room, v + 4 * at, rest, block, 0)
            if gathers:
                borrow(a_room, a + 4 * at, rest, block, 0)
            if choco:
                borrow(hat_room, xhat + 4 * at, rest, block, 0)
                borrow(s_room, s + 4 * at, rest, block, 0)
            _step_part(
                gossips, choco, fmt, x_room, x_half, g_room, g_half, m_room, v_room, a_room, hat_room, s_room, alpha, self_weight,
                wires, num_wires, code_offset, scale_offset, 1, rest, out_codes, out + scale_offset, numbers, seed, first + at,
            )  # fmt: skip
            give_back(x + (at << (2 - x_half)), x_room, rest, x_half)
            if closes:
                give_back(m + 4 * at, m_room, rest, 0)
                give_back(v + 4 * at, v_room, rest, 0)
            if gathers:
                give_back(a + 4 * at, a_room, rest, 0)
            if choco:
                give_back(xhat + 4 * at, hat_room, rest, 0)
                give_back(s + 4 * at, s_room, rest, 0)
            if gossips:
                copy_bytes(out + code_offset, out_codes, short_bytes(fmt, rest))

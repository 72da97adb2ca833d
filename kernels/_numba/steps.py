"""The operations on parameters and on plain tensors, as ``reference.py`` defines them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from dtrain.kernels._numba import flat, kernels
from dtrain.kernels._numba.pool import run
from dtrain.kernels._numba.tables import address, body_table, float_bits, format_numbers, noise_numbers, place, state
from dtrain.kernels._numba.tables import values as floats
from dtrain.kernels.operands import SUM_TILE, Adam, Format, Noise, Piece, Public

_ALONE = Format("identity")


def _adam_numbers(adam: Adam) -> tuple[int, ...]:
    numbers = (
        *(1.0 / adam.every, 1.0 - adam.beta1, 1.0 - adam.beta2),
        *(adam.lr / (1.0 - adam.power1), (1.0 - adam.power2) ** -0.5, adam.eps, adam.beta1, adam.beta2),
    )
    return *map(float_bits, numbers), int(adam.closes), int(adam.every > 1)


def _piece_table(pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, fmt: Format) -> tuple[array[int], int]:
    """A row of ``PIECE_FIELDS`` numbers a piece, and the elements. The wires' zones follow each other as ``zones`` says."""
    table, total = array("q"), 0
    first_unit, scales_at, codes_at = 0, 0, 2 * sum(fmt.num_scales(p.x.numel()) for p in pieces)
    for i, p in enumerate(pieces):
        n = p.x.numel()
        a = state(p.a, n, "a") if adam.every > 1 else 0
        hat, s = (state(public[i].xhat, n, "xhat"), state(public[i].s, n, "s")) if public else (0, 0)
        table.extend((first_unit, n, *floats(p.x, n, "x"), *floats(p.g, n, "g"), state(p.m, n, "m"), state(p.v, n, "v"), a))
        table.extend((hat, s, float_bits(1.0 - adam.lr * p.weight_decay), scales_at, codes_at))
        first_unit += -(-n // kernels.UNIT)
        scales_at += 2 * fmt.num_scales(n)
        codes_at += fmt.code_bytes(n)
        total += n
    return table, total


def accum_adam(pieces: Sequence[Piece], adam: Adam, grad_scale: Tensor) -> None:
    table, total = _piece_table(pieces, (), adam, _ALONE)
    args = (address(table), len(pieces), 0, 0, 0, 0, 0, state(grad_scale, 1, "grad_scale"))
    run(kernels.step, (0, 0, *format_numbers(_ALONE), *args, *_adam_numbers(adam), -1, 0), total)


def _gossip(
    pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, grad_scale: Tensor, alpha: float, self_weight: float,
    wires: Sequence[Tensor], weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None,
) -> None:  # fmt: skip
    if fmt.kind == "topk":
        raise ValueError("a one-pass step does not write topk wires; call mix or choco_mix, accum_adam and an encode one by one")
    table, total = _piece_table(pieces, public, adam, fmt)
    num_bytes = sum(2 * fmt.num_scales(p.x.numel()) + fmt.code_bytes(p.x.numel()) for p in pieces)
    wires_table = body_table(wires, weights, num_bytes)
    args = (
        *(address(table), len(pieces), float_bits(alpha), float_bits(self_weight), address(wires_table), len(wires)),
        *(place(out, num_bytes, torch.uint8, "the next wire"), state(grad_scale, 1, "grad_scale")),
    )
    numbers = (*_adam_numbers(adam), *noise_numbers(noise))
    run(kernels.step, (1, int(bool(public)), *format_numbers(fmt), *args, *numbers), total)


def gossip_adam(
    pieces: Sequence[Piece], adam: Adam, grad_scale: Tensor, self_weight: float, wires: Sequence[Tensor],
    weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None = None,
) -> None:  # fmt: skip
    _gossip(pieces, (), adam, grad_scale, self_weight, 0.0, wires, weights, out, fmt, noise)


def choco_gossip_adam(
    pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, grad_scale: Tensor, gamma: float, self_weight: float,
    wires: Sequence[Tensor], weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None = None,
) -> None:  # fmt: skip
    if len(public) != len(pieces):
        raise ValueError(f"{len(pieces)} pieces have {len(public)} public copies; give each its own")
    _gossip(pieces, public, adam, grad_scale, gamma, self_weight, wires, weights, out, fmt, noise)


def outer_step(
    x: Tensor, sent: Tensor, anchor: Tensor, momentum: Tensor, delta: Tensor, lr: float, mu: float
) -> None:
    n = x.numel()
    states = (state(anchor, n, "anchor"), state(momentum, n, "momentum"), state(delta, n, "delta"))
    run(flat.outer, (n, *floats(x, n, "x"), *floats(sent, n, "sent"), *states, float_bits(-lr), float_bits(mu)), n)


def _tensor_table(tensors: Sequence[Tensor], unit: int) -> tuple[array[int], int, int]:
    """A row of ``TENSOR_FIELDS`` numbers a tensor; the elements; the units."""
    table, units, total = array("q"), 0, 0
    for x in tensors:
        n = x.numel()
        at, half = floats(x, n, "x")
        table.extend((units, n, at, half))
        units += -(-n // unit)
        total += n
    return table, total, units


def sum_of_squares(tensors: Sequence[Tensor], partial: Tensor) -> None:
    table, total, units = _tensor_table(tensors, SUM_TILE)
    if tensors:
        run(flat.squares, (address(table), len(tensors), place(partial, units, torch.float64, "partial")), total)


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    table, total, _ = _tensor_table(tensors, flat.UNIT)
    if tensors:
        run(flat.scale, (address(table), len(tensors), state(factor, 1, "factor")), total)


def checksum(data: Tensor, first_word: int, start: int, out: Tensor) -> None:
    n = data.numel()
    at = place(data, n, torch.uint8, "data")
    result = place(out, 1, torch.int64, "out")
    out.fill_(start)
    run(flat.check_sum, (n, at, first_word, result), n // 4)


def put_identity(x: Tensor, wire: Tensor, first: int, flag: int) -> None:
    n, wire_bytes = x.numel(), wire.numel()
    at, half = floats(x, n, "x")
    if not (0 <= flag < wire_bytes and 0 <= first <= wire_bytes - 4 * n):
        raise ValueError(f"{n} values from byte {first} on and a flag at {flag} do not fit into a wire of {wire_bytes} bytes")
    start = place(wire, wire_bytes, torch.uint8, "the wire")
    if not 0 < n <= flat.UNIT:  # else the kernel writes it whatever it finds
        wire[flag].zero_()
    run(flat.put, (n, at, half, start + first, start + flag), n)


def flag_non_finite(values: Tensor, flag: Tensor) -> None:
    n = values.numel()
    at, half = floats(values, n, "values")
    result = place(flag, 1, torch.uint8, "flag")
    if not 0 < n <= flat.UNIT:  # else the kernel writes it whatever it finds
        flag.zero_()
    run(flat.not_finite, (n, at, half, result), n)

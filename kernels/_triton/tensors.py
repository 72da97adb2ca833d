"""How are many tensors measured or scaled at once? One launch for all of one dtype.

A row of the table is a tensor: address, numel, first tile, and whether it may be read 16 bytes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.check import same_length
from dtrain.kernels._triton.launch import TILE, aligned, kernel, launch
from dtrain.kernels._triton.memory import load_float, store_float, typed
from dtrain.kernels._triton.tables import on_device, tile_map
from dtrain.kernels.operands import SUM_TILE


@kernel
def sum_of_squares_kernel(tensors, tiles, partial, ELEMENT: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr):
    """STEP elements at a time; always in one order, so that a sum can be had again."""
    tile = tl.program_id(0).to(tl.int64)
    row = tensors + tl.load(tiles + tile).to(tl.int64) * 4
    start = (tile - tl.load(row + 2)) * TILE
    x = typed(tl.load(row), ELEMENT) + start
    left = tl.minimum(tl.load(row + 1) - start, TILE).to(tl.int32)
    fast = tl.load(row + 3) != 0
    at = tl.arange(0, STEP)
    total = tl.zeros((STEP,), tl.float64)
    for done in range(0, left, STEP):
        inside = at < left - done
        value = load_float(x + done, at, inside, fast & (left - done >= STEP)).to(tl.float64)
        total += value * value
    tl.store(partial + tile, tl.sum(total))


@kernel
def scale_kernel(tensors, tiles, factor, ELEMENT: tl.constexpr, TILE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    row = tensors + tl.load(tiles + tile).to(tl.int64) * 4
    start = (tile - tl.load(row + 2)) * TILE
    x = typed(tl.load(row), ELEMENT) + start
    left = tl.minimum(tl.load(row + 1) - start, TILE).to(tl.int32)
    at = tl.arange(0, TILE)
    inside = at < left
    whole = (tl.load(row + 3) != 0) & (left == TILE)
    store_float(x, at, load_float(x, at, inside, whole) * tl.load(factor), inside, whole)


def sum_of_squares(tensors: Sequence[Tensor], partial: Tensor) -> None:
    first = 0
    for element, group in _by_element(tensors):
        table, tiles = _table(group, SUM_TILE)
        num_tiles = sum(tiles)
        launch(
            sum_of_squares_kernel, num_tiles, 4, on_device(table, partial.device), tile_map(tiles, partial.device),
            partial[first : first + num_tiles], ELEMENT=element, TILE=SUM_TILE, STEP=2 * TILE,
        )  # fmt: skip
        first += num_tiles
    if first != partial.numel():
        raise ValueError(f"these tensors have {first} partial sums, got room for {partial.numel()}")


def scale(tensors: Sequence[Tensor], factor: Tensor) -> None:
    for element, group in _by_element(tensors):
        table, tiles = _table(group, TILE)
        launch(
            scale_kernel, sum(tiles), 4, on_device(table, factor.device), tile_map(tiles, factor.device), factor,
            ELEMENT=element, TILE=TILE,
        )  # fmt: skip


def _by_element(tensors: Sequence[Tensor]) -> list[tuple[tl.dtype, list[Tensor]]]:
    """Runs of one dtype, in order: mostly one."""
    runs: list[tuple[tl.dtype, list[Tensor]]] = []
    for x in tensors:
        element = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float32
        if not runs or runs[-1][0] != element:
            runs.append((element, []))
        runs[-1][1].append(x)
    return runs


def _table(tensors: Sequence[Tensor], tile: int) -> tuple[list[int], list[int]]:
    num_tiles = [-(-x.numel() // tile) for x in tensors]
    first_tile = [0, *accumulate(num_tiles)]
    table: list[int] = []
    for x, first in zip(tensors, first_tile, strict=False):
        same_length(x)
        table += [x.data_ptr(), x.numel(), first, int(aligned(x))]
    return table, num_tiles

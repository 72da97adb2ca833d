"""Is a wire intact, and is it finite? Results are the same in any order, so that programs may add them as they come."""

# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.arithmetic import mix32
from dtrain.kernels._triton.check import same_length
from dtrain.kernels._triton.launch import TILE, aligned, kernel, launch
from dtrain.kernels._triton.memory import load_float, sixteenth, store_float

WORDS = 4 * TILE
"""Words of a program. The fewer programs, the fewer additions to one address."""


@kernel
def checksum_kernel(data, numel: tl.int64, first_word: tl.int64, out, whole: tl.int64, WORDS: tl.constexpr):
    """``out`` holds the start."""
    start = tl.program_id(0).to(tl.int64) * WORDS
    at = tl.arange(0, WORDS)
    left = tl.minimum(numel - start * 4, WORDS * 4).to(tl.int32)
    bytes_here = data + start * 4
    if (whole != 0) & (left == WORDS * 4):
        word = tl.load(sixteenth(bytes_here.to(tl.pointer_type(tl.uint32), bitcast=True)) + at)
    else:
        word = tl.load(bytes_here + at * 4, mask=at * 4 < left, other=0).to(tl.uint32)
        for i in tl.static_range(1, 4):
            word |= tl.load(bytes_here + at * 4 + i, mask=at * 4 + i < left, other=0).to(tl.uint32) << (8 * i)
    index = (first_word + start).to(tl.uint32) + at.to(tl.uint32)
    mixed = tl.where(at * 4 < left, mix32(word ^ mix32(index)), 0)
    tl.atomic_add(out, tl.sum(mixed.to(tl.int64)), sem="relaxed")


@kernel
def flag_kernel(values, numel: tl.int64, flag, whole: tl.int64, TILE: tl.constexpr):
    """Whoever finds one writes 1; ``flag`` holds 0."""
    start = tl.program_id(0).to(tl.int64) * TILE
    at = tl.arange(0, TILE)
    left = tl.minimum(numel - start, TILE).to(tl.int32)
    inside = at < left
    x = load_float(values + start, at, inside, (whole != 0) & (left == TILE))
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(flag, 1, mask=largest >= 0x7F800000)


@kernel
def put_kernel(x, numel: tl.int64, out, flag, whole: tl.int64, TILE: tl.constexpr):
    """``out`` (fp32) = x, and ``flag_kernel`` of it."""
    start = tl.program_id(0).to(tl.int64) * TILE
    at = tl.arange(0, TILE)
    left = tl.minimum(numel - start, TILE).to(tl.int32)
    inside, full = at < left, (whole != 0) & (left == TILE)
    value = load_float(x + start, at, inside, full)
    store_float(out + start, at, value, inside, full)
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(flag, 1, mask=largest >= 0x7F800000)


def checksum(data: Tensor, first_word: int, start: int, out: Tensor) -> None:
    same_length(data)
    out.fill_(start)
    launch(
        checksum_kernel, -(-data.numel() // (4 * WORDS)), 8, data, data.numel(), first_word, out, int(aligned(data)), WORDS=WORDS
    )


def flag_non_finite(values: Tensor, flag: Tensor) -> None:
    same_length(values)
    flag.zero_()
    launch(flag_kernel, -(-values.numel() // (2 * TILE)), 4, values, values.numel(), flag, int(aligned(values)), TILE=2 * TILE)


def put_identity(x: Tensor, wire: Tensor, first: int, flag: int) -> None:
    n = x.numel()
    out, flagged = wire[first : first + 4 * n].view(torch.float32), wire[flag : flag + 1]
    same_length(x, out)
    flagged.zero_()
    whole = int(aligned(x) and aligned(out))
    launch(put_kernel, -(-n // (2 * TILE)), 4, x, n, out, flagged, whole, TILE=2 * TILE)

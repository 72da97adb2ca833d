"""How do 8 bits stand for values that are spread as a bell? 256 bins of equal width, each decoded as the mean of what fell in.

INTELLECT-1 (arXiv 2412.01152): the int8 payload of its all-reduce. Of each block, mu and sigma its mean and standard deviation,
    bin(x) = clamp(floor((x - mu) / w) + 128, 0, 255),   w = 12 sigma / 256;   decoded: mu + mean of x - mu over the bin.
So values are clipped at +-6 sigma, but the outermost bins' means are of the values themselves; and the sum of a block is kept,
but for bf16's rounding of the means.
Of 256 bins a block of n elements has no more than n: its codebook holds min(256, n) means, those of the bins that hold any in
rising order, and a code is a place in it. Wires: ``kernels/WIRE.md``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.bucket import Layout
from dtrain.torch_codec import BoundTorch
from dtrain.wire import torch_header

BINS = 256
SIGMAS = 6.0
"""To each side."""
_LEAST = 1e-38
"""Nothing is divided by less."""


@dataclass(frozen=True, slots=True)
class Codebook:
    """``"codebook8:4096"``."""

    block: int

    @property
    def grain(self) -> int:
        return self.block

    def bind(self, layout: Layout, node: int = 0) -> BoundTorch:
        runs = layout.runs(self.block)
        code = _Code([piece for run in runs for piece in _pieces(*run, self.block)])
        header = torch_header("codebook8", tuple(b - a for a, b in runs), layout.numel, block=self.block)
        return BoundTorch(code, header, layout.numel, code.num_bytes, f"codec codebook8:{self.block}")


class _Piece(NamedTuple):
    """Blocks of one length, one behind the other."""

    start: int
    blocks: int
    length: int

    @property
    def numel(self) -> int:
        return self.blocks * self.length

    @property
    def entries(self) -> int:
        """Means in a block's codebook."""
        return min(BINS, self.length)

    def of(self, x: Tensor) -> Tensor:
        """(blocks, length) of a vector as long as the bucket."""
        return x[self.start : self.start + self.numel].view(self.blocks, self.length)


def _pieces(start: int, stop: int, block: int) -> Iterator[_Piece]:
    whole, rest = divmod(stop - start, block)
    if whole:
        yield _Piece(start, whole, block)
    if rest:
        yield _Piece(stop - rest, 1, rest)


class _Views(NamedTuple):
    """A piece's part of the body, one row a block."""

    means: Tensor
    """fp32 (blocks, 1)."""
    books: Tensor
    """bf16 (blocks, entries)."""
    codes: Tensor
    """uint8 (blocks, length)."""


class _Code:
    """[means][codebooks][codes] of all pieces."""

    def __init__(self, pieces: list[_Piece]) -> None:
        self._pieces = pieces
        self._books_at = 4 * sum(p.blocks for p in pieces)
        self._codes_at = self._books_at + 2 * sum(p.blocks * p.entries for p in pieces)
        self.num_bytes = self._codes_at + sum(p.numel for p in pieces)

    def encode(self, x: Tensor, out: Tensor) -> None:
        for piece, views in self._cut(out):
            rows = piece.of(x)
            mean = rows.mean(1, keepdim=True, dtype=torch.float64).float()
            codes, books = _coded(rows - mean, piece.entries)
            views.means.copy_(mean)
            views.books.copy_(books)
            views.codes.copy_(codes)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        for piece, (means, books, codes) in self._cut(wire):
            # A code behind a short book's end is no code: NaN, which is refused.
            table = torch.full((piece.blocks, BINS), torch.nan, device=out.device)
            table[:, : piece.entries] = means + books.float()
            piece.of(out).copy_(table.gather(1, codes.long()))

    def _cut(self, body: Tensor) -> Iterator[tuple[_Piece, _Views]]:
        mean, book, code = 0, self._books_at, self._codes_at
        for p in self._pieces:
            ends = mean + 4 * p.blocks, book + 2 * p.blocks * p.entries, code + p.numel
            means = body[mean : ends[0]].view(torch.float32).view(p.blocks, 1)
            books = body[book : ends[1]].view(torch.bfloat16).view(p.blocks, p.entries)
            yield p, _Views(means, books, body[code : ends[2]].view(p.blocks, p.length))
            mean, book, code = ends


def _coded(off: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Distances from the mean (blocks, length) -> codes (the same, int64), codebooks (blocks, entries).

    Sums are of fp64, in which those of a bin are exact or all but: their order, which a GPU chooses anew each time, does not show
    in a bf16. Squares are of distances in units of the largest, so that none overflows; where a distance itself does, its bin's
    mean is inf, for which the wire is never sent."""
    unit = off / off.abs().amax(1, keepdim=True).clamp_min(_LEAST)
    sigma = unit.square().mean(1, keepdim=True, dtype=torch.float64).sqrt().float()
    at = (unit / (sigma * (2 * SIGMAS / BINS)).clamp_min(_LEAST)).floor()
    bins = at.nan_to_num_(0.0).clamp_(-BINS // 2, BINS // 2 - 1).long() + BINS // 2
    filled = torch.zeros(len(off), BINS, dtype=torch.int64, device=off.device).scatter_(1, bins, 1)
    codes = (filled.cumsum(1) - 1).gather(1, bins)
    total, count = (torch.zeros(len(off), entries, dtype=torch.float64, device=off.device) for _ in range(2))
    total.scatter_add_(1, codes, off.double())
    count.scatter_add_(1, codes, torch.ones_like(off, dtype=torch.float64))
    return codes, (total / count.clamp_min(1)).float()

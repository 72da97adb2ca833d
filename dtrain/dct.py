"""How do few numbers stand for a smooth matrix? The largest coefficients of its cosine transform, chunk by chunk.

DeMo (Peng et al. 2024, arXiv 2411.19870). Of a chunk x of a rows and b columns, D_n the orthonormal DCT-II,
    D_n[k, i] = sqrt((1 + [k > 0]) / n) cos(pi (2 i + 1) k / (2 n)),   c = D_a x D_b^T;
the K largest |c| are sent, and x is decoded as D_a^T c D_b. A matrix (of more dimensions: its last one's rows) is cut into
squares of CHUNK, the last of a row or column being as small as what is left; a vector, and the part of a row at which a bucket
begins or ends, into pieces of CHUNK. Transforms are of fp64: what islands decode must be the same bits on all of them, and a
sum's order is the machine's. Wires: ``kernels/WIRE.md``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.bucket import Layout, Span
from dtrain.torch_codec import BoundTorch
from dtrain.wire import torch_header


@dataclass(frozen=True, slots=True)
class Dct:
    """``"dct:32/64"``."""

    k: int
    chunk: int

    @property
    def grain(self) -> int:
        return self.chunk**2

    def bind(self, layout: Layout, node: int = 0) -> BoundTorch:
        panels = [panel for span in layout.spans for panel in _panels(span)]
        code = _Code([tiles for panel in panels for tiles in _tiles(panel, self.chunk)], self.k)
        cut = tuple(number for panel in panels for number in (panel.rows, panel.columns))
        header = torch_header("dct", cut, layout.numel, block=self.chunk, k=self.k)
        return BoundTorch(code, header, layout.numel, code.num_bytes, f"codec dct:{self.k}/{self.chunk}")


class _Panel(NamedTuple):
    """Whole rows of a matrix, or one row of any length."""

    start: int
    rows: int
    columns: int


def _panels(s: Span) -> Iterator[_Panel]:
    columns = s.shape[-1] if len(s.shape) > 1 else s.numel
    head = min(s.numel, -s.offset % columns) if len(s.shape) > 1 else 0
    rows, tail = divmod(s.numel - head, columns)
    if head:
        yield _Panel(s.start, 1, head)
    if rows:
        yield _Panel(s.start + head, rows, columns)
    if tail:
        yield _Panel(s.stop - tail, 1, tail)


class _Tiles(NamedTuple):
    """Chunks of one shape: ``down`` x ``across`` of ``height`` x ``width``, from row ``top`` and column ``left`` of a panel."""

    panel: _Panel
    top: int
    down: int
    height: int
    left: int
    across: int
    width: int

    @property
    def chunks(self) -> int:
        return self.down * self.across

    @property
    def size(self) -> int:
        return self.height * self.width

    def of(self, x: Tensor) -> Tensor:
        """(down, across, height, width), a view of a vector as long as the bucket."""
        matrix = x[self.panel.start : self.panel.start + self.panel.rows * self.panel.columns].view(-1, self.panel.columns)
        part = matrix[self.top : self.top + self.down * self.height, self.left : self.left + self.across * self.width]
        return part.unflatten(0, (self.down, self.height)).unflatten(2, (self.across, self.width)).transpose(1, 2)


def _tiles(panel: _Panel, chunk: int) -> Iterator[_Tiles]:
    for rows, columns in product(_sides(panel.rows, chunk), _sides(panel.columns, chunk)):
        yield _Tiles(panel, *rows, *columns)


def _sides(length: int, chunk: int) -> Iterator[tuple[int, int, int]]:
    """(first, how many, how long)."""
    whole, rest = divmod(length, chunk)
    if whole:
        yield 0, whole, chunk
    if rest:
        yield length - rest, 1, rest


@cache
def matrix(n: int, device: torch.device) -> Tensor:
    """D_n, fp64 (n, n): D D^T = 1."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    d = (math.pi / (2 * n) * (2 * i + 1) * k).cos() * math.sqrt(2 / n)
    d[0] = math.sqrt(1 / n)
    return d.to(device)


class _Code:
    """[values][indices] of all chunks; a chunk of fewer than K elements keeps all."""

    def __init__(self, tiles: list[_Tiles], k: int) -> None:
        self._tiles = [(t, min(k, t.size)) for t in tiles]
        self._kept = sum(t.chunks * kept for t, kept in self._tiles)
        self.num_bytes = 4 * self._kept + 3 * ((self._kept + 1) // 2)

    def encode(self, x: Tensor, out: Tensor) -> None:
        values, indices = out[: 4 * self._kept].view(torch.float32), out.new_zeros(self._kept + self._kept % 2, dtype=torch.int32)
        at = 0
        for t, kept in self._tiles:
            rows, columns = matrix(t.height, x.device), matrix(t.width, x.device)
            c = (rows @ t.of(x).double() @ columns.T).float().reshape(t.chunks, t.size)
            index = c.abs().topk(kept, dim=1).indices.sort(dim=1).values
            end = at + t.chunks * kept
            values[at:end] = c.gather(1, index).view(-1)
            indices[at:end] = index.view(-1)
            at = end
        first, second = indices.view(-1, 2).unbind(1)
        triples = torch.stack((first & 255, first >> 8 | (second & 15) << 4, second >> 4), 1)
        out[4 * self._kept :] = triples.view(-1).to(torch.uint8)

    def decode(self, wire: Tensor, out: Tensor) -> None:
        a, b, c = wire[4 * self._kept :].view(-1, 3).long().unbind(1)
        indices = torch.stack((a | (b & 15) << 8, b >> 4 | c << 4), 1).view(-1)
        values = wire[: 4 * self._kept].view(torch.float32)
        at = 0
        for t, kept in self._tiles:
            end = at + t.chunks * kept
            index = indices[at:end].view(t.chunks, kept)
            is_code = (index.diff(dim=1) > 0).all(1) & (index[:, -1] < t.size)
            found = torch.zeros(t.chunks, t.size, dtype=torch.float64, device=out.device)
            found.scatter_(1, index.clamp_max(t.size - 1), values[at:end].view(t.chunks, kept).double())
            found.masked_fill_(~is_code[:, None], torch.nan)
            rows, columns = matrix(t.height, out.device), matrix(t.width, out.device)
            t.of(out).copy_(rows.T @ found.view(t.down, t.across, t.height, t.width) @ columns)
            at = end

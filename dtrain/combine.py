"""How are the islands' contributions combined?

A combine starts the output, then adds one decoded contribution after another, in node order, so that every island
computes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dtrain.bucket import Layout
from dtrain.codec import BoundCodec

Combine = Callable[[Tensor, Sequence[Tensor], Sequence[int], BoundCodec], None]
"""(out, one wire a node in node order, how much each counts in proportion, the codec that reads them): fills out. A wire's weight
w_i is its share of the sum of all."""


def mean(out: Tensor, wires: Sequence[Tensor], shares: Sequence[int], codec: BoundCodec) -> None:
    """out = sum_i w_i decode(wire_i)."""
    total = sum(shares)
    out.zero_()
    for share, wire in zip(shares, wires, strict=True):
        codec.decode_add(wire, out, weight=share / total)


_NO_LENGTH = 1e-30
"""Below it a tensor has no direction: 1 / length would be no fp32 any more."""
_NO_DIRECTION = 1e-6
"""Below it a mean of unit vectors is what rounding left of none, 1e-7 in fp32."""
_TILE = 2**20


def radial(layout: Layout) -> Combine:
    """Lengths and directions are averaged apart, for each matrix, so that islands that disagree do not shorten the step
    (Decoupled DiLoCo 2026, arXiv 2604.21428):
        out = mean_i |y_i| * d / |d|,   d = mean_i y_i / |y_i|,   y_i = decode(wire_i);   0 where d is;   mean_i = sum_i w_i.
    Embeddings, whose rows islands do not meet alike, and vectors: the plain mean. No tensor may be cut by a bucket."""
    matrices = [slice(s.start, s.stop) for s in layout.spans if len(s.shape) > 1 and not s.embedding]

    def combine(out: Tensor, wires: Sequence[Tensor], shares: Sequence[int], codec: BoundCodec) -> None:
        total = sum(shares)
        out.zero_()
        one = torch.empty_like(out)
        lengths = [torch.zeros((), dtype=torch.float64, device=out.device) for _ in matrices]
        for share, wire in zip(shares, wires, strict=True):
            codec.decode_add(wire, one.zero_(), weight=1.0)
            for k, part in enumerate(matrices):
                length = _length(one[part])
                lengths[k] += share * length / total
                one[part].mul_(_ratio(1.0, length))
            out.add_(one, alpha=share / total)
        for part, length in zip(matrices, lengths, strict=True):
            out[part].mul_(_ratio(length, _length(out[part]), least=_NO_DIRECTION))

    return combine


def _ratio(above: Tensor | float, below: Tensor, *, least: float = _NO_LENGTH) -> Tensor:
    return torch.where(below > least, above / below, 0.0).float()


def _length(x: Tensor) -> Tensor:
    """|x| in fp64, by sums of two that have the same order, and so the same bits, on every device."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for tile in x.split(_TILE) if x.device.type != "meta" else ():  # the plan's, which has no values and many tiles
        squares = tile.double().square_()
        while (n := squares.numel()) > 1:
            half = (n + 1) // 2
            squares[: n - half] += squares[half:]
            squares = squares[:half]
        total += squares.sum()
    return total.sqrt()

"""How are the islands' contributions combined?

A combine starts the output, then adds one decoded contribution after another, in node order, so that every island
computes the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dtrain.codec import BoundCodec

Combine = Callable[[Tensor, Sequence[Tensor], BoundCodec], None]
"""(out, one wire a node in node order, the codec that reads them): fills out."""


def weighted_mean(weights: Sequence[float]) -> Combine:
    """out = sum_i w_i decode(wire_i); the weights sum to one."""

    def combine(out: Tensor, wires: Sequence[Tensor], codec: BoundCodec) -> None:
        out.zero_()
        for weight, wire in zip(weights, wires, strict=True):
            codec.decode_add(wire, out, weight=weight)

    return combine


def mean(num_nodes: int) -> Combine:
    return weighted_mean([1 / num_nodes] * num_nodes)

"""Where are Adam's moments of a bucket's elements? In the optimizers that a loop joined with, parameter by parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.bucket import MOMENTS, Bucket, Flat
from dtrain.optim.accum_adam import AccumAdamW


@dataclass(frozen=True, slots=True)
class _Part:
    """What a bucket has of one parameter."""

    parameter: Tensor
    optimizer: Optimizer
    inside: slice
    """Of the parameter's elements."""
    start: int
    stop: int
    """Of the bucket's."""

    def moment(self, name: str) -> Tensor | None:
        """The bucket's part of it, flat; None before the optimizer has made it, at the parameter's first gradient."""
        state = self.optimizer.state.get(self.parameter, {})
        if name not in state:
            return None
        if not state[name].is_contiguous():  # of a model that was channels_last before join
            state[name] = state[name].contiguous()
        return state[name].view(-1)[self.inside]

    @property
    def updates(self) -> int:
        """By the optimizer, so far."""
        return int(self.optimizer.state.get(self.parameter, {}).get("step", 0))

    def left(self, name: str, since: int) -> float:
        """Of what the moment was after ``since`` updates: b to the power of how often it has decayed."""
        group = next(g for g in self.optimizer.param_groups if any(p is self.parameter for p in g["params"]))
        every = group.get("every", 1)  # AccumAdamW's moments decay once in so many updates
        return float(group["betas"][MOMENTS.index(name)]) ** (self.updates // every - since // every)


class AdamMoments:
    """``bucket.Moments`` of one bucket. A moment that was not made yet is read as 0, and stays unmade."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    def read(self, name: str, out: Tensor) -> None:
        for part in self._parts:
            moment = part.moment(name)
            room = out[part.start : part.stop]
            room.zero_() if moment is None else room.copy_(moment)

    def write(self, name: str, values: Tensor) -> None:
        for part in self._parts:
            moment = part.moment(name)
            if moment is not None:
                moment.copy_(values[part.start : part.stop])

    def updates(self) -> Tensor:
        return torch.tensor([part.updates for part in self._parts])

    def carry(self, name: str, sent: Tensor, mean: Tensor, since: Tensor) -> None:
        for part, before in zip(self._parts, since.tolist(), strict=True):
            moment = part.moment(name)
            if moment is not None:
                left, span = part.left(name, before), slice(part.start, part.stop)
                ours, theirs = (x[span].to(moment.device) for x in (sent, mean))  # they may lie in CPU memory
                moment.sub_(ours, alpha=left).add_(theirs, alpha=left)


class Unmade:
    """``bucket.Moments`` where nothing trains: 0, and written nowhere."""

    def __init__(self, num_spans: int) -> None:
        self._num_spans = num_spans

    def read(self, name: str, out: Tensor) -> None:
        out.zero_()

    def write(self, name: str, values: Tensor) -> None:
        """There is nothing to write to."""

    def updates(self) -> Tensor:
        return torch.zeros(self._num_spans, dtype=torch.int64)

    def carry(self, name: str, sent: Tensor, mean: Tensor, since: Tensor) -> None:
        """As ``write``."""


def with_moments(recipe: str, buckets: Sequence[Bucket], flat: Flat, optimizers: Sequence[Optimizer]) -> list[Bucket]:
    """The buckets with the moments of their elements; raises ValueError for a loop whose optimizers have none."""
    owner = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    named = dict(zip(flat.names, flat.parameters, strict=True))
    for name, p in named.items():
        _check(recipe, name, owner.get(id(p)))

    def of(bucket: Bucket) -> AdamMoments:
        parts = []
        for s in bucket.layout.spans:
            p = named[s.name]
            parts.append(_Part(p, owner[id(p)], slice(s.offset, s.offset + s.numel), s.start, s.stop))
        return AdamMoments(parts)

    return [replace(b, moments=of(b)) for b in buckets]


def _check(recipe: str, name: str, optimizer: Optimizer | None) -> None:
    if optimizer is None:
        raise ValueError(
            f"recipe {recipe!r} averages Adam's moments, and no optimizer that dtrain.join was given has parameter {name}; give "
            'join all optimizers, or use recipe = "fedavg"'
        )
    if not isinstance(optimizer, AccumAdamW | torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"recipe {recipe!r} averages Adam's moments, and {type(optimizer).__name__}, which steps parameter {name}, has none; "
            'use torch.optim.AdamW, torch.optim.Adam or dtrain.optim.AccumAdamW, or recipe = "fedavg"'
        )
    if any(group.get("amsgrad") for group in optimizer.param_groups):
        raise ValueError(
            f"recipe {recipe!r} averages Adam's two moments, and amsgrad keeps a third, the largest that v was; use "
            'amsgrad=False, or recipe = "fedavg"'
        )

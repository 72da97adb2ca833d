"""How do the ranks of an island that each hold the whole model work as one?

Each rank carries its own buckets over the link. When rounds have landed, every bucket's owner sends the new values to
its island, over the island's own process group. Before that the ranks agree that none of them failed, so that no one
waits for a rank that gave up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.bucket import Bucket


class Island(Protocol):
    rank: int
    num_ranks: int

    def worst(self, code: int) -> int:
        """The highest code that any rank of the island brought."""
        ...

    def total(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the island's ranks (float64)."""
        ...

    def refresh(self, buckets: Sequence[Bucket], *, gradients: bool) -> None:
        """Give every rank the owners' values of these buckets."""
        ...

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank rank 0's values."""
        ...


class Alone:
    """An island of one rank."""

    rank = 0
    num_ranks = 1

    def worst(self, code: int) -> int:
        return code

    def total(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def refresh(self, buckets: Sequence[Bucket], *, gradients: bool) -> None:
        """One rank is always equal to itself."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """One rank is always equal to itself."""


class Replicas:
    """An island of several ranks over its default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self._device = device

    def worst(self, code: int) -> int:
        value = torch.tensor([code], device=self._device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def total(self, values: Sequence[float]) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return sums.tolist()

    def refresh(self, buckets: Sequence[Bucket], *, gradients: bool) -> None:
        _broadcast([(_values(b, gradients), b.owner) for b in buckets])

    def share(self, tensors: Sequence[Tensor]) -> None:
        _broadcast([(x, 0) for x in tensors])


def _broadcast(values: Sequence[tuple[Tensor, int]]) -> None:
    works = [dist.broadcast(x, src=owner, async_op=True) for x, owner in values]
    for work in works:
        assert work is not None
        work.wait()


def _values(b: Bucket, gradients: bool) -> Tensor:
    if not gradients:
        return b.x
    assert b.g is not None
    return b.g

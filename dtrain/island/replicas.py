"""How do the ranks of an island work as one? Here those that each hold the whole model; ``stages.py`` has those that share it.

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
    replica: int
    num_replicas: int
    """Ranks that hold the parameters which this one holds, and its number among them: they share its buckets."""
    prefix: str
    """In a checkpoint, before what this rank keeps of parameters that no other rank holds."""

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
        """Give every rank the values of the first that holds the same parameters."""
        ...

    def joined(self, values: Tensor) -> Tensor:
        """Values of this rank's parameters, flat, become those of the whole model's, in the model's order."""
        ...

    def before(self, count: int) -> int:
        """How much of what this rank's parameters have ``count`` of lies before them in the model."""
        ...


class Alone:
    """An island of one rank."""

    rank = replica = 0
    num_ranks = num_replicas = 1
    prefix = ""

    def worst(self, code: int) -> int:
        return code

    def total(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def refresh(self, buckets: Sequence[Bucket], *, gradients: bool) -> None:
        """One rank is always equal to itself."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """One rank is always equal to itself."""

    def joined(self, values: Tensor) -> Tensor:
        return values

    def before(self, count: int) -> int:
        return 0


class Replicas:
    """An island of several ranks over its default process group."""

    prefix = ""

    def __init__(self, device: torch.device) -> None:
        self.rank = self.replica = dist.get_rank()
        self.num_ranks = self.num_replicas = dist.get_world_size()
        self._device = device

    def worst(self, code: int) -> int:
        return highest(code, self._device)

    def total(self, values: Sequence[float]) -> list[float]:
        return sums(values, self._device)

    def refresh(self, buckets: Sequence[Bucket], *, gradients: bool) -> None:
        _broadcast([(_values(b, gradients), b.owner) for b in buckets])

    def share(self, tensors: Sequence[Tensor]) -> None:
        _broadcast([(x, 0) for x in tensors])

    def joined(self, values: Tensor) -> Tensor:
        return values

    def before(self, count: int) -> int:
        return 0


def highest(code: int, device: torch.device) -> int:
    """Of the codes of all ranks."""
    value = torch.tensor([code], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def sums(values: Sequence[float], device: torch.device) -> list[float]:
    """Element by element, over all ranks."""
    added = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(added)
    return added.tolist()


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

"""How do the ranks of an island work as one? Here those that each hold the whole model; ``stages.py`` has those that hold some of
its layers, ``parts.py`` those that hold a part of each parameter.

Each rank carries its own buckets over the link. When rounds have landed, every bucket's owner sends the new values to
its island, over the island's own process group. Before that the ranks agree that none of them failed, so that no one
waits for a rank that gave up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.bucket import Bucket, Flat


class Island(Protocol):
    rank: int
    num_ranks: int
    replica: int
    num_replicas: int
    """Ranks that share the buckets of this one's parameters, and its number among them: each carries some over the link."""
    whole: bool
    """Whether each of these holds all of the buckets' parameters."""
    prefix: str
    """In a checkpoint, before what this rank keeps of parameters that no other rank holds."""

    def worst(self, code: int) -> int:
        """The highest code that any rank of the island brought."""
        ...

    def total(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over the island's ranks (float64)."""
        ...

    def hold(self, flat: Flat) -> Flat:
        """Of these parameters, which this rank trains, all that follows is; called once, before it. Returns those that its
        buckets are cut from, which all ranks that share them find alike."""
        ...

    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> AbstractContextManager[None]:
        """While it lasts the owners' ``x`` of these buckets are the parameters. At its end, where ``changes``, all ranks have
        the owners' values. All ranks enter it together."""
        ...

    def share_gradients(self, buckets: Sequence[Bucket]) -> None:
        """Give every rank the owners' ``g`` of these buckets."""
        ...

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values of the first that holds the same parameters."""
        ...

    def joined(self, values: Tensor) -> Tensor:
        """Values of this rank's parameters, flat, become those of the whole model's, in the model's order."""
        ...


class Alone:
    """An island of one rank."""

    rank = replica = 0
    num_ranks = num_replicas = 1
    prefix = ""
    whole = True

    def worst(self, code: int) -> int:
        return code

    def total(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def hold(self, flat: Flat) -> Flat:
        return flat

    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> AbstractContextManager[None]:
        return nullcontext()  # buckets are views of the parameters

    def share_gradients(self, buckets: Sequence[Bucket]) -> None:
        """One rank is always equal to itself."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """One rank is always equal to itself."""

    def joined(self, values: Tensor) -> Tensor:
        return values


class Replicas:
    """An island of several ranks over its default process group."""

    prefix = ""
    whole = True

    def __init__(self, device: torch.device) -> None:
        self.rank = self.replica = dist.get_rank()
        self.num_ranks = self.num_replicas = dist.get_world_size()
        self._device = device

    def worst(self, code: int) -> int:
        return highest(code, self._device)

    def total(self, values: Sequence[float]) -> list[float]:
        return sums(values, self._device)

    def hold(self, flat: Flat) -> Flat:
        return flat

    @contextmanager
    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> Iterator[None]:
        yield  # buckets are views of the parameters
        if changes:
            broadcast([(b.x, b.owner) for b in buckets])

    def share_gradients(self, buckets: Sequence[Bucket]) -> None:
        broadcast([(b.g, b.owner) for b in buckets if b.g is not None])

    def share(self, tensors: Sequence[Tensor]) -> None:
        broadcast([(x, 0) for x in tensors])

    def joined(self, values: Tensor) -> Tensor:
        return values


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


def broadcast(values: Sequence[tuple[Tensor, int]]) -> None:
    """Each tensor becomes what it is on its rank."""
    works = [dist.broadcast(x, src=owner, async_op=True) for x, owner in values]
    for work in works:
        assert work is not None
        work.wait()


def lengths(count: int, device: torch.device) -> list[int]:
    """Of each rank."""
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([count], device=device))
    return [int(c) for c in counts]


def joined(values: Tensor, device: torch.device) -> Tensor:
    """Of all ranks, one after another, of whatever length each."""
    each = lengths(values.numel(), device)
    own = torch.zeros(max(each), dtype=values.dtype, device=device)
    own[: values.numel()].copy_(values)
    parts = [torch.empty_like(own) for _ in each]
    dist.all_gather(parts, own)  # of one length each, as NCCL and gloo have it
    return torch.cat([part[:length] for part, length in zip(parts, each, strict=True)])

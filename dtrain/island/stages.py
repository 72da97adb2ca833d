"""How do the ranks of an island that each hold a part of the layers work as one?

Rank s is stage s: it keeps parameters, inner and outer optimizer state of its own layers, carries these and nothing else over the
link, to stage s of the other islands, and refreshes nobody (DiLoCoX, arXiv 2506.21263: its dual optimizer policy). What the
stages do as one is to wait with one outcome, and to find what is a whole model's: its gradient's norm, its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.bucket import Bucket
from dtrain.island.replicas import highest, sums


class Stages:
    """An island of several stages over its default process group, in the model's order."""

    replica, num_replicas = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self.prefix = f"stage{self.rank}."
        self._device = device

    def worst(self, code: int) -> int:
        return highest(code, self._device)

    def total(self, values: Sequence[float]) -> list[float]:
        return sums(values, self._device)

    def refresh(self, buckets: Sequence[Bucket], *, gradients: bool) -> None:
        """No other rank holds them."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """No other rank holds them."""

    def joined(self, values: Tensor) -> Tensor:
        lengths = self._lengths(values.numel())
        own = torch.zeros(max(lengths), dtype=values.dtype, device=self._device)
        own[: values.numel()].copy_(values)
        parts = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(parts, own)  # of one length each, as NCCL and gloo have it
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def before(self, count: int) -> int:
        return sum(self._lengths(count)[: self.rank])

    def _lengths(self, count: int) -> list[int]:
        counts = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.num_ranks)]
        dist.all_gather(counts, torch.tensor([count], device=self._device))
        return [int(c) for c in counts]


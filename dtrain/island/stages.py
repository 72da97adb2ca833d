"""How do the ranks of an island that each hold a part of the layers work as one?

Rank s is stage s: it keeps parameters, inner and outer optimizer state of its own layers, carries these and nothing else over the
link, to stage s of the other islands, and refreshes nobody (DiLoCoX, arXiv 2506.21263: its dual optimizer policy). What the
stages do as one is to wait with one outcome, and to find what is a whole model's: its gradient's norm, its weights."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.bucket import Bucket, Flat
from dtrain.island.replicas import highest, joined, lengths, sums


class Stages:
    """An island of several stages over its default process group, in the model's order."""

    replica, num_replicas = 0, 1
    whole = True

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self.prefix = f"stage{self.rank}."
        self._device = device

    def worst(self, code: int) -> int:
        return highest(code, self._device)

    def total(self, values: Sequence[float]) -> list[float]:
        return sums(values, self._device)

    def hold(self, flat: Flat) -> Flat:
        """Those of its stage: it shares their buckets with nobody."""
        return replace(flat, first=sum(lengths(flat.numel, self._device)[: self.rank]))

    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> AbstractContextManager[None]:
        return nullcontext()  # buckets are views of the parameters, and no other rank holds them

    def share_gradients(self, buckets: Sequence[Bucket]) -> None:
        """No other rank holds them."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """No other rank holds them."""

    def joined(self, values: Tensor) -> Tensor:
        return joined(values, self._device)

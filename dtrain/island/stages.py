"""How do the ranks of an island that each hold a part of the layers work as one?

Of n ranks, rank r holds stage r, or, where a rank has several, the stages r, r + n, r + 2n, ...: it keeps parameters, inner and
outer optimizer state of its own layers, carries these and nothing else over the link, to the same rank of the other islands, and
refreshes nobody (DiLoCoX, arXiv 2506.21263: its dual optimizer policy). What the stages do as one is to wait with one outcome,
and to find what is a whole model's: its gradient's norm, its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.bucket import Bucket, Flat
from dtrain.island.replicas import highest, joined, sums
from dtrain.shards import named_parameters


class StagesOfRank(nn.Module):
    """The stages that one rank trains, as one model: by the names that their modules have in the whole model."""

    def __init__(self, stages: Mapping[int, nn.Module], group: dist.ProcessGroup | None = None) -> None:
        """``stages``: by their numbers, in order. ``group``: the ranks that pass a batch on, each to the next; None: all of the
        island's."""
        super().__init__()
        self.stages, self.group = dict(stages), group  # in a dict, which torch does not look into: each module has one name
        for stage in stages.values():
            for name, module in stage.named_children():
                if not isinstance(module, nn.ModuleList):
                    self.add_module(name, module)
                    continue
                if name not in self._modules:
                    self.add_module(name, nn.ModuleList())
                for inner, layer in module.named_children():
                    self.get_submodule(name).add_module(inner, layer)

    @property
    def numbers(self) -> dict[str, int]:
        """Each parameter's stage."""
        return {name: number for number, stage in self.stages.items() for name, _ in named_parameters(stage)}


class Stages:
    """An island of several ranks of a pipeline over its default process group."""

    replica, num_replicas = 0, 1
    whole = True

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        self.prefix = f"stage{self.rank}."
        self._device = device
        self._places: list[list[int]] = []

    def worst(self, code: int) -> int:
        return highest(code, self._device)

    def total(self, values: Sequence[float]) -> list[float]:
        return sums(values, self._device)

    def hold(self, flat: Flat) -> Flat:
        """Those of its stages: it shares their buckets with nobody."""
        told: list[list[tuple[int, int]]] = [[] for _ in range(self.num_ranks)]
        dist.all_gather_object(told, [(s, p.numel()) for s, p in zip(flat.stages, flat.parameters, strict=True)])
        # By their stages, and those of one as its rank has them.
        ordered = sorted((stage, rank, i) for rank, each in enumerate(told) for i, (stage, _) in enumerate(each))
        self._places = [[0] * len(each) for each in told]
        starts, at = [0] * len(flat.parameters), 0
        for place, (_, rank, i) in enumerate(ordered):
            self._places[rank][i] = place
            if rank == self.rank:
                starts[i] = at
            at += told[rank][i][1]
        return in_runs(flat, starts)

    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> AbstractContextManager[None]:
        return nullcontext()  # buckets are views of the parameters, and no other rank holds them

    def share_gradients(self, buckets: Sequence[Bucket]) -> None:
        """No other rank holds them."""

    def share(self, tensors: Sequence[Tensor]) -> None:
        """No other rank holds them."""

    def joined(self, values: Tensor) -> Tensor:
        """Of ranks that have a value for each parameter; of others, whose parameters have one or more each, a rank's are behind
        those of the rank before."""
        found, places = joined(values, self._device), [place for each in self._places for place in each]
        if found.numel() != len(places):
            return found
        return torch.empty_like(found).index_copy_(0, torch.tensor(places, device=found.device), found)


def in_runs(flat: Flat, starts: Sequence[int]) -> Flat:
    """A storage for each run of parameters that follow each other in the whole model, so that a bucket's elements do. ``starts``:
    where each parameter begins there, in elements."""
    order, storages, begins = list[tuple[int, ...]](), list[Tensor](), list[int]()
    for storage, members in zip(flat.storages, flat.order, strict=True):
        at, run = 0, list[int]()
        for i, following in zip(members, (*members[1:], None), strict=True):
            run.append(i)
            if following is not None and starts[following] == starts[i] + flat.parameters[i].numel():
                continue
            numel = sum(flat.parameters[k].numel() for k in run)
            order.append(tuple(run))
            storages.append(storage[at : at + numel])
            begins.append(starts[run[0]])
            at, run = at + numel, []
    return replace(flat, storages=tuple(storages), order=tuple(order), begins=tuple(begins))

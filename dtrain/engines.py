"""What does a rank train under each of an island's engines, and what makes its gradients?

    ddp            the whole model; gradients are added up (``inside.py``)
    fsdp           a part of every parameter (FSDP2); ``islands.shards`` ranks have all of them, and copies of those are HSDP
    deepspeed      a part of its state, as the stage of ZeRO has it (``inside_zero.py``)
    pipeline       a stage of its layers, or ``islands.stages_per_rank`` of them (``inside_stages.py``)
    fsdp+pipeline  of a stage a part of every parameter: ranks r, r + 1, ... of ``islands.shards`` share theirs"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from dtrain import zero_config
from dtrain.build import build_optimizers
from dtrain.config import Job
from dtrain.connect import Connection
from dtrain.inside import Batches, Inside, Whole
from dtrain.island.parts import Parts
from dtrain.island.replicas import Island, Replicas
from dtrain.island.stages import Stages, StagesOfRank
from dtrain.island.zero import Zero
from dtrain.models.gpt import GPT
from dtrain.models.gpt_stage import GPTStage
from dtrain.optim import adamw
from dtrain.recipes import Recipe
from dtrain.sections_each import PIPELINES
from dtrain.updates import Stepped, Updates

_RANKS: Mapping[str, Callable[[torch.device], Island]] = {
    "ddp": Replicas, "fsdp": Parts, "deepspeed": Parts, "pipeline": Stages, "fsdp+pipeline": Parts,
}  # fmt: skip

Heldout = tuple[Tensor, Tensor]


def ranks_of(engine: str, *, uneven: bool) -> Callable[[torch.device], Island]:
    """What the ranks of an island are to each other, where there are several. ``uneven``: other islands have another engine or
    number of ranks, so that a stage has no counterpart there."""
    return Parts if uneven and engine == "pipeline" else _RANKS[engine]


def trained(job: Job, whole: nn.Module, ranks: Island, device: torch.device) -> nn.Module:
    """Of the whole model what this rank trains, on its device; ``whole`` may become it."""
    if ranks.num_ranks == 1:
        return whole.to(device)
    if job.islands.engine in PIPELINES:
        return _stages(job, cast(GPT, whole), ranks, device)
    if job.islands.engine == "fsdp":
        from dtrain.island.sharded import shard  # torch's FSDP takes a second to import, which no other run is to wait for

        shards = job.islands.shards or ranks.num_ranks
        return shard(
            whole, device, shards=shards, bf16=job.train.precision == "bf16", recompute=job.islands.recompute
        )
    if job.islands.engine == "deepspeed":
        config, train = zero_config.of_job(job), job.train
        own = None if "optimizer" in config else adamw(whole, lr=train.lr, weight_decay=train.weight_decay)
        return Zero(whole, device, config, own)
    return whole.to(device)


def _stages(job: Job, whole: GPT, ranks: Island, device: torch.device) -> StagesOfRank:
    shards = job.islands.shards_of_stage
    first, num_ranks = ranks.rank // shards, ranks.num_ranks // shards
    num_stages = num_ranks * job.islands.stages_per_rank
    stages = {number: GPTStage(whole, number, num_stages).to(device) for number in range(first, num_stages, num_ranks)}
    if shards == 1:
        return StagesOfRank(stages)
    from dtrain.island.sharded import shard_stages

    group = shard_stages(
        list(stages.values()), device, shards=shards, bf16=job.train.precision == "bf16", recompute=job.islands.recompute
    )
    return StagesOfRank(stages, group)


def updates_of(job: Job, recipe: Recipe, model: nn.Module) -> Updates:
    """``model``: what ``trained`` gave."""
    if isinstance(model, Zero):
        from dtrain.inside_zero import ZeroUpdates

        return ZeroUpdates(model)
    return Stepped(build_optimizers(job, recipe, model))


def inside_of(
    job: Job, model: nn.Module, whole: Mapping[str, Tensor], batches: Batches, heldout: Heldout, connection: Connection,
    computing: AbstractContextManager[object],
) -> Inside:  # fmt: skip
    """``model``: what ``trained`` gave; ``whole``: names, shapes and dtypes of the whole model's state."""
    if isinstance(model, StagesOfRank):
        from dtrain.inside_stages import Staged  # torch's pipelines take a second to import, too

        return Staged(job, model, whole, batches, heldout, connection)
    if isinstance(model, Zero):
        from dtrain.inside_zero import ZeroInside

        return ZeroInside(job, model, batches, heldout, connection)
    if not connection.ranks.whole:
        from dtrain.inside_shards import Sharded

        return Sharded(job, model, batches, heldout, connection)
    return Whole(job, model, batches, heldout, connection, computing)

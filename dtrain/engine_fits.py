"""Do the engines inside islands, and what a job says of them, go together? Each answer that is no is one line. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dtrain.sections import Islands, ModelSection, Train
from dtrain.sections_each import PIPELINES
from dtrain.sections_sync import Sync

MOST_SHARED_STAGES = 3
"""Of a rank whose neighbours share them: of more torch's schedules (``max_active_stages`` of their plan of gathering) let some go
within a step, and gather them again for a later micro-batch."""


class Shape(NamedTuple):
    """Of an island, or of all that are alike."""

    key: str
    """That says its ranks: islands.ranks, or its own table's."""
    ranks: int
    engine: str


def sharing_batch(islands: Islands, shape: Shape) -> tuple[int, tuple[str, ...]]:
    """Among how many ranks an island's batch is divided, and the keys that say so: all of a share passes through each stage of a
    pipeline."""
    match shape.engine:
        case "pipeline":
            return 1, ()
        case "fsdp+pipeline":
            return islands.shards or 1, ("islands.shards",)
        case _:
            return shape.ranks, (shape.key,)


def check_fsdp(islands: Islands, train: Train, shapes: Sequence[Shape]) -> None:
    """Raises ValueError where its keys have no effect, or do not fit."""
    sharded = [shape for shape in shapes if shape.engine in ("fsdp", "fsdp+pipeline")]
    for key, said in (("shards", islands.shards is not None), ("recompute", islands.recompute)):
        if said and not sharded:
            raise ValueError(_of_another(key, "fsdp", islands))
    for shape in sharded:
        if islands.shards is not None and shape.ranks % islands.shards:
            fitting = f", as {shape.ranks}"
            if shape.engine == "fsdp+pipeline":
                fitting = f", or {shape.key}={islands.shards * max(2, shape.ranks // islands.shards)}"
            raise ValueError(
                f"islands.shards = {islands.shards} does not divide {shape.key} = {shape.ranks}; use a divisor of it{fitting}"
            )
    if any(shape.ranks > 1 for shape in sharded):
        _refuse_corrected(train, sharded[0].engine)


def check_stages(islands: Islands, model: ModelSection, train: Train, sync: Sync, shapes: Sequence[Shape]) -> None:
    """Raises ValueError where the ranks of an island cannot be stages of a pipeline, or its keys have no effect."""
    staged = [shape for shape in shapes if shape.engine in PIPELINES]
    if islands.stages_per_rank > 1 and not staged:
        raise ValueError(_of_another("stages_per_rank", "pipeline", islands))
    for shape in staged:
        _check_mesh(islands, shape)
        engine_key = _engine_key(shape)
        if model.theirs:
            raise ValueError(
                f'model.{model.theirs} with islands.engine = "{shape.engine}", whose stages are cut from gpt only; use '
                "islands.engine=ddp"
            )
        if sync.include is not None or sync.exclude is not None:
            axis = "include" if sync.include is not None else "exclude"
            raise ValueError(
                f'sync.{axis} with {engine_key} = "{shape.engine}": a stage may have none of those parameters; leave it out, or '
                f"use {engine_key}=ddp"
            )
        _check_cut(islands, model.layers, train.accumulate, shape)


def _check_mesh(islands: Islands, shape: Shape) -> None:
    engine_key, ranks, shards = _engine_key(shape), shape.ranks, islands.shards
    if shape.engine == "pipeline":
        if ranks < 2:
            raise ValueError(
                f'{engine_key} = "pipeline" with {shape.key} = 1 is one stage, which is no pipeline; use {shape.key}=2 or '
                f"more, or {engine_key}=ddp"
            )
    elif shards is None:
        raise ValueError(
            f'{engine_key} = "fsdp+pipeline" without islands.shards, the ranks that share a stage; say it, as islands.shards=2'
        )
    elif shards < 2:
        raise ValueError(
            f'islands.shards = {shards} with {engine_key} = "fsdp+pipeline" shares no stage; use islands.shards=2 or more, or '
            f"{engine_key}=pipeline"
        )
    elif ranks < 2 * shards:
        raise ValueError(
            f'{engine_key} = "fsdp+pipeline" with {shape.key} = {ranks} and islands.shards = {shards} is one stage, which is no '
            f"pipeline; use {shape.key}={2 * shards} or more, or {engine_key}=fsdp"
        )
    elif islands.stages_per_rank > MOST_SHARED_STAGES:
        raise ValueError(
            f'islands.stages_per_rank = {islands.stages_per_rank} with {engine_key} = "fsdp+pipeline", whose schedule keeps '
            f"{MOST_SHARED_STAGES} stages of a rank gathered at most; use islands.stages_per_rank={MOST_SHARED_STAGES} or fewer, "
            f"or {engine_key}=pipeline"
        )


def _check_cut(islands: Islands, layers: int, micro_batches: int, shape: Shape) -> None:
    """Of layers among stages, and of a batch into micro-batches."""
    shards, each = islands.shards or 1 if shape.engine == "fsdp+pipeline" else 1, islands.stages_per_rank
    ranks = shape.ranks // shards
    said = f"{shape.key} / islands.shards = {ranks}" if shards > 1 else f"{shape.key} = {ranks}"
    if ranks * each > layers:
        of, fewer = said, "ranks"
        if each > 1:
            of, fewer = f"{said} x islands.stages_per_rank = {each}, {ranks * each}", "of either"
        raise ValueError(
            f"{of} stages of a pipeline need a block each, and there are model.layers = {layers}; use fewer {fewer}, or more "
            "layers"
        )
    if micro_batches < ranks:
        raise ValueError(
            f"train.accumulate = {micro_batches} micro-batches leave some of {said} stages of a pipeline "
            f"without work all the time; use train.accumulate={ranks} or more"
        )
    rounds = micro_batches // ranks
    if each > 1 and micro_batches % rounds:
        raise ValueError(
            f"train.accumulate = {micro_batches} micro-batches do not divide into {rounds} equal rounds, which "
            f"islands.stages_per_rank = {each} interleaves; use train.accumulate={rounds * ranks}, or another multiple of {ranks}"
        )


def _engine_key(shape: Shape) -> str:
    return shape.key.replace("ranks", "engine")


def check_deepspeed(islands: Islands, train: Train, shapes: Sequence[Shape]) -> None:
    """Raises ValueError where its file is missing or has no effect, or what the job says is the file's to say."""
    sharded = [shape for shape in shapes if shape.engine == "deepspeed"]
    if not sharded:
        if islands.deepspeed is not None:
            raise ValueError(_of_another("deepspeed", "deepspeed", islands))
        return
    if islands.deepspeed is None:
        raise ValueError(
            'islands.engine = "deepspeed" without islands.deepspeed: its JSON file says the stage of ZeRO; name it, as '
            "islands.deepspeed=zero2.json"
        )
    for shape in sharded:
        if shape.ranks < 2:
            raise ValueError(
                f'{shape.key.replace("ranks", "engine")} = "deepspeed" with {shape.key} = {shape.ranks} has nobody to share '
                f"with; use {shape.key}=2 or more, or islands.engine=ddp"
            )
    if train.precision != "fp32":
        raise ValueError(
            f'train.precision = "{train.precision}" is autocast, and islands.engine = "deepspeed" has bf16 by its file: '
            '{"bf16": {"enabled": true}}; leave it out'
        )
    _refuse_corrected(train, "deepspeed")


def check_uneven(train: Train, shapes: Sequence[Shape]) -> None:
    """Raises ValueError where islands are not alike and their merge needs them to be."""
    if len({(shape.ranks, shape.engine) for shape in shapes}) > 1 and any(shape.engine in PIPELINES for shape in shapes):
        _refuse_corrected(train, "pipeline")


def _of_another(key: str, engine: str, islands: Islands) -> str:
    both = ' and "fsdp+pipeline"' if engine != "deepspeed" else ""
    return (
        f'islands.{key} is of islands.engine = "{engine}"{both}, and it is {islands.engine!r}; leave it out, or use '
        f"islands.engine={engine}"
    )


def _refuse_corrected(train: Train, engine: str) -> None:
    if train.merge == "variance_corrected":
        raise ValueError(
            f'train.merge = "variance_corrected" needs each tensor whole on a rank, and islands.engine = "{engine}" shards '
            "them; use train.merge=mean, or islands.engine=ddp"
        )

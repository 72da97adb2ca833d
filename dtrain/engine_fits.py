"""Do the engines inside islands, and what a job says of them, go together? Each answer that is no is one line. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dtrain.sections import Islands, Train


class Shape(NamedTuple):
    """Of an island, or of all that are alike."""

    key: str
    """That says its ranks: islands.ranks, or its own table's."""
    ranks: int
    engine: str


def check_fsdp(islands: Islands, train: Train, shapes: Sequence[Shape]) -> None:
    """Raises ValueError where its keys have no effect, or do not fit."""
    sharded = [shape for shape in shapes if shape.engine == "fsdp"]
    for key, said in (("shards", islands.shards is not None), ("recompute", islands.recompute)):
        if said and not sharded:
            raise ValueError(_of_another(key, "fsdp", islands))
    for shape in sharded:
        if islands.shards is not None and shape.ranks % islands.shards:
            raise ValueError(
                f"islands.shards = {islands.shards} does not divide {shape.key} = {shape.ranks}; use a divisor of it, as "
                f"{shape.ranks}"
            )
    if any(shape.ranks > 1 for shape in sharded):
        _refuse_corrected(train, "fsdp")


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
    if len({(shape.ranks, shape.engine) for shape in shapes}) > 1 and any(shape.engine == "pipeline" for shape in shapes):
        _refuse_corrected(train, "pipeline")


def _of_another(key: str, engine: str, islands: Islands) -> str:
    return (
        f'islands.{key} is of islands.engine = "{engine}", and it is {islands.engine!r}; leave it out, or use '
        f"islands.engine={engine}"
    )


def _refuse_corrected(train: Train, engine: str) -> None:
    if train.merge == "variance_corrected":
        raise ValueError(
            f'train.merge = "variance_corrected" needs each tensor whole on a rank, and islands.engine = "{engine}" shards '
            "them; use train.merge=mean, or islands.engine=ddp"
        )

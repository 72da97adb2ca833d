"""Where does an island begin? From scratch, from its own checkpoint, or from the merged weights of islands of another number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.connect import Connection
from dtrain.engine import Sync
from dtrain.island.stages import StagesOfRank
from dtrain.island.zero import Zero
from dtrain.shards import is_part, named_buffers
from dtrain.updates import Updates

_OF_A_RANK = re.compile(r"(stage|shard)\d+\.")


@dataclass(frozen=True, slots=True)
class Start:
    step: int
    of_checkpoint: bool
    """Whether the island has a state of its own there."""


def start(run: Path, island: int, resume_step: int, whole: nn.Module) -> Start:
    """Where an island begins; merged weights are put into the ``whole`` model, which is not yet cut or sharded. Raises ValueError
    where nothing is there to go on with."""
    if resume_step and checkpoint.island_folder(run, resume_step, island).exists():
        return Start(resume_step, of_checkpoint=True)
    merged = run / "init.safetensors"
    if merged.exists():
        weights = checkpoint.load_weights(merged)
        checkpoint.check_same_model(weights, whole, merged)
        whole.load_state_dict(weights)
        return Start(checkpoint.weights_step(merged), of_checkpoint=False)
    if resume_step:
        raise ValueError(f"no checkpoint of island {island} at step {resume_step} in {run / 'checkpoints'}")
    return Start(0, of_checkpoint=False)


def read(run: Path, connection: Connection, step: int, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint that are this rank's. Raises ValueError where they are of another model, or damaged."""
    prefix, own = connection.ranks.prefix, model.state_dict()
    held = {f"model.{name}" for name in own}
    sharded = isinstance(model, Zero) or any(map(is_part, own.values()))

    def wanted(key: str) -> bool:
        if key.startswith("model."):
            return not sharded and (key in held or not prefix)  # who has the whole model looks at what the model has not, too
        return not _OF_A_RANK.match(key) or key.startswith(prefix or "-")

    saved = checkpoint.load_island(run, step, connection.node, wanted)
    folder = checkpoint.island_folder(run, step, connection.node)
    if sharded:
        shapes = {name: tuple(x.shape) for name, x in (model.like if isinstance(model, Zero) else own).items()}
        found = checkpoint.shapes_of_island(folder)
        if isinstance(model, StagesOfRank):  # other ranks look at the other stages
            found = {name: shape for name, shape in found.items() if name in shapes}
        checkpoint.check_same_shapes(found, shapes, folder)
    else:
        checkpoint.check_same_model(_weights(saved), model, folder)
    return saved


def restore(
    run: Path, connection: Connection, saved: dict[str, Tensor], step: int, model: nn.Module, updates: Updates, sync: Sync
) -> None:
    """Put what ``read`` gave where it was. After the sync was made: that makes the islands' weights equal, and those of a
    checkpoint are each island's own."""
    prefix, own = connection.ranks.prefix, model.state_dict()
    if isinstance(model, Zero):
        for name, like in model.like.items():  # one whole tensor at a time
            checkpoint.load_parts(run, step, connection.node, {f"model.{name}": (whole := torch.empty_like(like, device="cpu"))})
            model.put(name, whole)
    elif any(map(is_part, own.values())):
        checkpoint.load_parts(run, step, connection.node, {f"model.{name}": x for name, x in own.items()})
    else:
        model.load_state_dict(_weights(saved))
    updates.load(saved, prefix)
    mine = f"{prefix}sync."
    sync.load_state_dict({k.removeprefix(mine): v for k, v in saved.items() if k.startswith(mine)})
    torch.set_rng_state(saved[f"rng{connection.ranks.rank}"])


def model_tensors(model: nn.Module, connection: Connection) -> dict[str, Tensor]:
    """For a checkpoint: what this rank has of the model, and of master weights that rank 0 has gathered all."""
    if isinstance(model, Zero):
        return {f"model.{name}": x.cpu() for name, x in model.whole() if connection.ranks.rank == 0}
    # Of buffers rank 0's, which the others are given before their next forward pass.
    others = set[str]() if connection.ranks.rank == 0 else {name for name, _ in named_buffers(model)}
    return {f"model.{name}": x for name, x in model.state_dict().items() if name not in others}


def _weights(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}

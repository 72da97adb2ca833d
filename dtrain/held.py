"""Which parameters does a rank train, and of what model? In the model's order, whatever part of it the rank has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from dtrain.bucket import Flat, Part, embeddings_of, flat_parts, flatten
from dtrain.buffers import Frozen, frozen_parameters
from dtrain.island.parts import Parts
from dtrain.island.replicas import Island, Replicas
from dtrain.island.stages import StagesOfRank
from dtrain.island.zero import Zero
from dtrain.shards import first_element, is_part, local, named_parameters


def flat_of(model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None, ranks: Island) -> Flat:
    """The parameters that islands share, and ``ranks`` know of them then. Raises ValueError where they cannot."""
    if isinstance(model, Zero):
        return ranks.hold(model.flat(include, exclude))
    named = named_parameters(model)
    parts = [name for name, p in named if is_part(p)]
    if ranks.whole:
        if parts:
            raise ValueError(
                f"parameter {parts[0]} is sharded, and this island's ranks were taken for such that hold it whole; join after "
                "fully_shard"
            )
        flat = flatten(named, include, exclude, embeddings=embeddings_of(model))
    else:
        held = {name: Part(local(p.detach()), first_element(p)) for name, p in named if p.requires_grad}
        flat = flat_parts(named, held, include, exclude, embeddings=embeddings_of(model))
    if isinstance(model, StagesOfRank):
        numbers = model.numbers
        flat = replace(flat, stages=tuple(numbers[name] for name in flat.names))
    return ranks.hold(flat)


def frozen_of(model: nn.Module) -> list[Frozen]:
    """The others, in the model's order."""
    return model.frozen() if isinstance(model, Zero) else frozen_parameters(model)


def inside_of(model: nn.Module) -> Callable[[torch.device], Island]:
    """What the ranks of an island are to each other, by a model that is ready to train: sharded ones hold parts."""
    return Parts if any(is_part(p) for p in model.parameters()) else Replicas

"""Does somebody's own loop fit the recipe that it joins with? Each answer that is no is one line."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from dtrain.methods import RULES
from dtrain.optim.accum_adam import check_accumulates
from dtrain.recipes import Recipe


def check_loop(
    recipe: Recipe, optimizers: Sequence[Optimizer], *, clip: float | None, scaler: torch.amp.GradScaler | None
) -> None:
    """Raises ValueError where the optimizers or the loss scaler are not what the recipe, or each other, need."""
    if recipe.moments_every is not None and recipe.moments_every > 1:
        check_accumulates(recipe.name, recipe.moments_every, optimizers)
    if scaler is None:
        return
    if RULES[recipe.algorithm].rewrites_gradients or recipe.payload == "gradients":
        raise ValueError(
            f"recipe {recipe.name!r} exchanges something before each update, and a GradScaler that skips a step on one island "
            "only would split the replicas; use bf16 without a scaler, or a recipe that exchanges parameters"
        )
    if not optimizers:
        raise ValueError(
            "a scaler is watched together with its optimizers; give join both, or neither, and call before_update and "
            "after_update yourself"
        )
    if clip:
        raise ValueError(
            f"clip = {clip} with a GradScaler would clip gradients that are still scaled; leave clip out, and clip between "
            "scaler.unscale_(optimizer) and scaler.step(optimizer)"
        )

"""Does somebody's own loop fit the recipe that it joins with? Each answer that is no is one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.optim import Optimizer

from dtrain.methods import RULES
from dtrain.optim.accum_adam import check_accumulates
from dtrain.optim.muon import check_muon
from dtrain.optim.sam import SAM
from dtrain.recipes import Recipe


def optimizers_of(loop: Optimizer | Sequence[Optimizer] | SAM) -> list[Optimizer]:
    """Whose steps are hooked: of SAM those that it wraps, so that an update begins when its gradient is complete."""
    if isinstance(loop, SAM):
        return loop.optimizers
    return [loop] if isinstance(loop, Optimizer) else list(loop)


def check_loop(
    recipe: Recipe,
    loop: Optimizer | Sequence[Optimizer] | SAM,
    *,
    clip: float | None,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Raises ValueError where the optimizers or the loss scaler are not what the recipe, or each other, need."""
    optimizers = optimizers_of(loop)
    if recipe.sam_rho is not None and not isinstance(loop, SAM):
        raise ValueError(
            f"recipe {recipe.name!r} takes its gradients by SAM: give join dtrain.optim.SAM(optimizer, rho={recipe.sam_rho:g}) "
            f'and step that with a closure, or use recipe = "{recipe.algorithm}"'
        )
    if recipe.moments_every is not None:
        check_accumulates(recipe.name, recipe.moments_every, optimizers)
    if recipe.optimizer == "muon":
        check_muon(recipe.name, recipe.algorithm, optimizers)
    if RULES[recipe.algorithm].signs:
        _check_plain_sgd(recipe.name, optimizers)
    if scaler is None:
        return
    if any(RULES[level.algorithm].rewrites_gradients or level.payload == "gradients" for level in recipe.levels):
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


def refuse_past_end(recipe: Recipe, step: int) -> None:
    """Raises ValueError where a step begins after the last of those that a budget was spread over."""
    if recipe.total_steps == step:
        raise ValueError(
            f"step {step + 1} is past total_steps = {step}, over which all rounds were spread; give join the whole run's length"
        )


class _Island(Protocol):
    """What ``engine.Sync`` says of itself."""

    @property
    def island(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def idle(self) -> bool: ...


def refuse_idle(sync: _Island) -> None:
    """Raises ValueError where a loop is about to train in a step in which its island is idle."""
    if sync.idle:
        raise ValueError(
            f"island {sync.island} is idle in step {sync.step + 1}, as its speed says; train `while sync.step < steps`, and "
            "before each step `if sync.idle: sync.sit_out(); continue`"
        )


def _check_plain_sgd(recipe: str, optimizers: Sequence[Optimizer]) -> None:
    """theta - lr (sign + decay theta) is SGD's step: without momentum its weight decay is decoupled."""
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.SGD) or any(group["momentum"] for group in optimizer.param_groups):
            with_it = "SGD with momentum" if isinstance(optimizer, torch.optim.SGD) else type(optimizer).__name__
            raise ValueError(
                f"recipe {recipe!r} is defined with SGD without momentum, which steps by the signs that it is given, and "
                f'{with_it} makes something else of them; use torch.optim.SGD(..., lr=...), or recipe = "allreduce"'
            )

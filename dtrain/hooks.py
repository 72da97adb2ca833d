"""How does an optimizer tell the engine of its steps? An adapter: torch's step hooks, and a watch on the loss
scaler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from dtrain.optim.accum_adam import AccumAdamW


class Stepped(Protocol):
    @property
    def step(self) -> int: ...

    @property
    def prepared(self) -> bool: ...

    def before_update(self) -> None: ...

    def after_update(self, *, skipped: bool = False) -> None: ...


def hook(optimizers: Sequence[Optimizer], scaler: torch.amp.GradScaler | None, engine: Stepped) -> Callable[[], None]:
    """The first optimizer's step begins an update, the last one's ends it. Returns what takes the hooks off again.

    Where the loss scaler left the first one out, the next that steps begins the update."""

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer is optimizers[0] or not engine.prepared:
            engine.before_update()

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        engine.after_update()

    releases: list[Callable[[], None]] = []
    if optimizers:
        releases += [optimizer.register_step_pre_hook(before).remove for optimizer in optimizers]
        releases.append(optimizers[-1].register_step_post_hook(after).remove)
    if scaler is not None:
        releases.append(_watch_scaler(engine, scaler, optimizers))

    def release() -> None:
        while releases:
            releases.pop()()

    return release


def take_over(optimizer: Optimizer, step: Callable[[], None], release: Callable[[], None]) -> Callable[[], None]:
    """Let ``step`` run in place of an AccumAdamW's own kernel. Returns what undoes this and then calls ``release``."""
    assert isinstance(optimizer, AccumAdamW)
    if optimizer.taken_over is not None:
        release()
        raise ValueError("this optimizer's steps belong to another dtrain.join that is still open; close that one first")
    optimizer.taken_over = step

    def give_back() -> None:
        if optimizer.taken_over is step:
            optimizer.taken_over = None
        release()

    return give_back


def _watch_scaler(engine: Stepped, scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> Callable[[], None]:
    """GradScaler.step leaves optimizer.step out when a gradient overflowed, and no hook runs: count the step here."""
    step = scaler.step

    def counted(optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        before = engine.step
        result = step(optimizer, *args, **kwargs)
        if optimizer is optimizers[-1] and engine.step == before:
            engine.after_update(skipped=True)
        return result

    def restore() -> None:
        del scaler.step

    scaler.step = counted
    return restore

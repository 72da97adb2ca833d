"""How does an island train without a learning rate that falls? Schedule-Free AdamW: the average of the iterates takes its place.

Defazio et al. 2024, arXiv 2405.15682, algorithm 1. Of each parameter there are three sequences, equal at first:
    y_t = (1 - b1) z_t + b1 x_t           where gradients are taken: the parameters while training, and what islands exchange
    v_t = b2 v_t-1 + (1 - b2) g_t^2,      g_t the gradient at y_t;      a_t = lr_t sqrt(1 - b2^t)
    z_t+1 = z_t - a_t (g_t / (sqrt(v_t) + eps) + decay y_t)
    x_t+1 = (1 - c) x_t + c z_t+1,        c = a_t^2 / sum_s<=t a_s^2    the model: what is evaluated, and averaged at the end
lr_t warms up and stays. Where a round or anything else moves the parameters by d between two steps, y being a mixture of z and x,
    z <- z + d,   x <- x + d:
a gossip's mix or an outer step shifts all that an island has, and its progress is kept. d is what y differs by from the mixture,
exactly 0 where nobody moved it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """State of a parameter: ``z``, ``x`` and ``exp_avg_sq``, of its own dtype; of a group: ``step`` and ``weights``, sum a^2.
    ``eval`` puts x into the parameters and ``train`` puts back what was there, bit for bit; between them nothing may be stepped.
    A parameter without a gradient is left alone.

    Raises ValueError for settings out of range, and for a step between ``eval`` and ``train``."""

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        ranges = (
            ("lr", lr, lr >= 0, "0 or more"),
            ("betas", betas, 0 < betas[0] < 1 and 0 <= betas[1] < 1, "two numbers from 0 to less than 1, the first above 0"),
            ("eps", eps, eps > 0, "more than 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
        )
        for name, value, allowed, words in ranges:
            if not allowed:
                raise ValueError(f"{name} = {value!r} is not allowed; use {words}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0, "weights": 0.0}
        super().__init__(params, defaults)
        self._held: list[tuple[Tensor, Tensor]] = []
        """Parameters with what they were, while they are x."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = []  # of a copy; torch keeps what is in State and in groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._held:
            raise ValueError("a step between eval() and train() would be lost; call train() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if trained:
                group["step"] += 1
                a = group["lr"] * (1 - group["betas"][1] ** group["step"]) ** 0.5
                group["weights"] += a * a
                for p in trained:
                    self._step(p, group, a, a * a / group["weights"] if a else 0.0)
        return loss

    def _step(self, p: Tensor, group: dict[str, Any], a: float, c: float) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        assert p.grad is not None
        if not state:
            state["z"], state["x"], state["exp_avg_sq"] = p.detach().clone(), p.detach().clone(), torch.zeros_like(p)
        z, x, v = state["z"], state["x"], state["exp_avg_sq"]
        moved = p - _mixture(state, b1)
        z.add_(moved)
        x.add_(moved)
        v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
        z.addcdiv_(p.grad, v.sqrt().add_(group["eps"]), value=-a).add_(p, alpha=-a * group["weight_decay"])
        x.lerp_(z, c)
        p.copy_(_mixture(state, b1))

    @torch.no_grad()
    def eval(self) -> None:
        """The parameters become x."""
        if self._held:
            return
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state:
                    self._held.append((p, p.detach().clone()))
                    p.copy_(average_of(p, self.state[p], group["betas"][0]))

    @torch.no_grad()
    def train(self) -> None:
        """The parameters become what they were before ``eval``."""
        for p, y in self._held:
            p.copy_(y)
        self._held = []


def average_of(p: Tensor, state: Mapping[str, Tensor], b1: float) -> Tensor:
    """x, moved as the parameter was since the last step; of the shape of ``p``. ``state``: its ``z`` and ``x``."""
    return p + (state["x"] - _mixture(state, b1))


def _mixture(state: Mapping[str, Tensor], b1: float) -> Tensor:
    return torch.lerp(state["z"], state["x"], b1)


@contextmanager
def at_averages(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """The model that training stands for, in the parameters while the block runs: x of Schedule-Free, of others what they are."""
    free = [optimizer for optimizer in optimizers if isinstance(optimizer, ScheduleFreeAdamW)]
    for optimizer in free:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in free:
            optimizer.train()

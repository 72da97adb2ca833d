"""How is a combined pseudo-gradient applied to the anchor? The outer optimizers; in place, bit for bit as
torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.codec import State
from dtrain.kernels import operations


class Outer(NamedTuple):
    init: Callable[[Tensor], State]
    update: Callable[[Tensor, Tensor, State], None]
    """(anchor, pseudo-gradient, state): the anchor moves against the pseudo-gradient."""
    land: Callable[[Tensor, Tensor, Tensor, Tensor, State], None]
    """(x, sent, anchor, pseudo-gradient, state): update, then x <- (x - sent) + anchor."""
    momentum: float
    """mu; 0 of an outer step that remembers nothing."""
    catch_up: Callable[[Tensor, Tensor, Tensor, State], None]
    """(anchor, late, lag, state): ``late`` is to come, and of momentum ``lag`` came an update late. All goes to where it would be
    if nothing ever had (derived in ``algorithms/diloco.py``)."""


def copy() -> Outer:
    """The islands' mean becomes the anchor: theta <- theta - delta (FedAvg, arXiv 1602.05629)."""
    return sgd(1.0)


def sgd(lr: float) -> Outer:
    """theta <- theta - lr delta."""

    def update(anchor: Tensor, delta: Tensor, state: State) -> None:
        anchor.add_(delta, alpha=-lr)

    def land(x: Tensor, sent: Tensor, anchor: Tensor, delta: Tensor, state: State) -> None:
        update(anchor, delta, state)
        # x - sent is exactly zero where nothing moved in flight, so a round without delay lands exactly on the anchor.
        x.sub_(sent).add_(anchor)

    def catch_up(anchor: Tensor, late: Tensor, lag: Tensor, state: State) -> None:
        update(anchor, late, state)

    return Outer(lambda anchor: {}, update, land, 0.0, catch_up)


def delayed_nesterov(lr: float, momentum: float) -> Outer:
    """Of islands' pseudo-gradients delta_i that arrive one by one, N = n in a round (Liu et al. 2024, arXiv 2401.09135, c = 0):
        at each but the last   theta <- theta - lr delta_i / N
        at the last            m <- mu m + sum_i delta_i / N;   theta <- theta - lr (mu m + delta_n / N)
    Here all of a round land together, and of theta is left after the last
        theta - lr (mu m + sum_i delta_i / N):
    nesterov's, of the mean, with m = u. So is that of arrivals with weights, w_i in place of 1 / N."""
    return nesterov(lr, momentum)


def nesterov(lr: float, momentum: float) -> Outer:
    """u <- mu u + delta;  theta <- theta - lr (delta + mu u)      (DiLoCo, arXiv 2311.08105)."""

    def init(anchor: Tensor) -> State:
        return {"momentum": torch.zeros_like(anchor)}

    def update(anchor: Tensor, delta: Tensor, state: State) -> None:
        u = state["momentum"]
        u.mul_(momentum).add_(delta)
        anchor.add_(delta.add(u, alpha=momentum), alpha=-lr)

    def land(x: Tensor, sent: Tensor, anchor: Tensor, delta: Tensor, state: State) -> None:
        operations(x.device).outer_step(x, sent, anchor, state["momentum"], delta, lr, momentum)

    def catch_up(anchor: Tensor, late: Tensor, lag: Tensor, state: State) -> None:
        anchor.add_(late, alpha=-lr * (1 + momentum)).add_(lag, alpha=-lr * momentum**2)
        state["momentum"].add_(late).add_(lag, alpha=momentum - 1)

    return Outer(init, update, land, momentum, catch_up)

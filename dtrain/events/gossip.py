"""Plain pairwise gossip under Poisson clocks, the baseline.

At a gradient  x_i <- x_i - gamma g_i(x_i);  where i and j meet  x_i, x_j <- (x_i + x_j) / 2
(Boyd et al. 2006; with gradients it is AD-PSGD, Lian et al. 2018, arXiv 1710.06952)."""

from __future__ import annotations

from dtrain.events.algorithm import Array, EventAlgorithm


def gossip(gamma: float) -> EventAlgorithm:
    def init(x: Array) -> Array:
        return x[:, None, :].copy()

    def flow(states: Array, elapsed: Array) -> None:
        pass

    def step(states: Array, gradients: Array) -> None:
        states[:, 0] -= gamma * gradients

    def meet(a: Array, b: Array) -> None:
        half = (b[:, 0] - a[:, 0]) / 2
        a[:, 0] += half
        b[:, 0] -= half

    return EventAlgorithm(init, flow, step, meet)

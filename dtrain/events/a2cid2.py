"""Pairwise gossip with continuous momentum: a sparse graph mixes in sqrt(chi1 chi2) units of time, where plain gossip needs chi1.

A2CiD2 (Nabli, Belilovsky and Oyallon 2023, arXiv 2306.08289): next to x each node has x~, x~ = x at first,
    at all times   dx = eta (x~ - x) dt,   dx~ = eta (x - x~) dt;
    at a gradient  x <- x - gamma u,       x~ <- x~ - gamma u;
    where i meets j, m = x_j - x_i:  x_i <- x_i + 1/2 m,  x~_i <- x~_i + alpha m,  and j with -m;
    eta = 1 / (2 sqrt(chi1 chi2)),   alpha = 1/2 sqrt(chi1 / chi2),   chi of the meetings' rates (``graph_constants.py``).
u is whatever the optimizer moves x by: with SGD its gradient or momentum, with Adam Adam's own displacement, the same on both.
Over a time t the flow is exactly  x, x~ <- (x + x~)/2 +- (x - x~)/2 exp(-2 eta t). On a complete graph chi1 is about chi2, and
nothing is gained."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dtrain.events.algorithm import Array, EventAlgorithm
from dtrain.events.graph_constants import Chi


class Momentum(NamedTuple):
    eta: float
    alpha: float


def momentum(chi: Chi) -> Momentum:
    return Momentum(0.5 / (chi.chi1 * chi.chi2) ** 0.5, 0.5 * (chi.chi1 / chi.chi2) ** 0.5)


def a2cid2(chi: Chi, gamma: float) -> EventAlgorithm:
    eta, alpha = momentum(chi)
    shares = np.array([[0.5], [alpha]])

    def init(x: Array) -> Array:
        return np.stack((x, x), axis=1)

    def flow(states: Array, elapsed: Array) -> None:
        moved = (states[:, 1] - states[:, 0]) * (-np.expm1(-2 * eta * elapsed) / 2)[:, None]
        states[:, 0] += moved
        states[:, 1] -= moved

    def step(states: Array, gradients: Array) -> None:
        states -= gamma * gradients[:, None, :]

    def meet(a: Array, b: Array) -> None:
        m = shares * (b[:, :1] - a[:, :1])
        a += m
        b -= m

    return EventAlgorithm(init, flow, step, meet)

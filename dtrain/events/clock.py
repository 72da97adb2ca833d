"""When does what happen? Independent Poisson clocks: one a node for its gradients, one an edge for the meetings of its ends.

Together they are one Poisson process of the summed rate, each event of which is of a clock with probability rate / sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dtrain.events.algorithm import Array, Ints


class Events(NamedTuple):
    """In the order of time, shape (number of events,) each."""

    times: Array
    first: Ints
    second: Ints
    """-1 where it is a gradient of ``first``, else whom it meets."""


@dataclass(frozen=True, slots=True)
class Clocks:
    num_nodes: int
    gradient_rate: float
    """Gradients a node and unit of time."""
    edges: Ints
    """(m, 2)."""
    rates: Array
    """Meetings an edge and unit of time, (m,)."""
    seed: int

    def between(self, start: float, stop: float) -> Events:
        """The events of [start, stop): the same however the time is cut, as each unit of it is drawn from (seed, unit)."""
        units = [self._unit(k) for k in range(int(start), int(np.ceil(stop)))]
        if not units:
            return Events(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        times, first, second = (np.concatenate(column) for column in zip(*units, strict=True))
        inside = (times >= start) & (times < stop)
        return Events(times[inside], first[inside], second[inside])

    def _unit(self, k: int) -> Events:
        draw = np.random.default_rng((self.seed, k))
        clocks = np.cumsum(np.concatenate((np.full(self.num_nodes, self.gradient_rate), self.rates)))
        count = draw.poisson(clocks[-1])
        times = k + np.sort(draw.random(count))
        which = np.searchsorted(clocks, draw.random(count) * clocks[-1], side="right")
        edge = np.maximum(which - self.num_nodes, 0)
        is_gradient = which < self.num_nodes
        first = np.where(is_gradient, which, self.edges[edge, 0])
        return Events(times, first, np.where(is_gradient, -1, self.edges[edge, 1]))

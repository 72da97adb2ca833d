"""How far does a method of events get in so much time? A run of it, exact in time, many events at once.

Events that touch different nodes commute. So each event goes into the first wave that comes after those of all earlier events
that touch its nodes, and a wave is one call of the method: 64 nodes on a ring have about twenty events in one. Runs of several
seeds are as many nodes without edges between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.events.algorithm import Array, EventAlgorithm, Ints
from dtrain.events.clock import Clocks, Events
from dtrain.events.problems import Problem


@dataclass(frozen=True, slots=True)
class Trace:
    """One column a seed, one row a time that was looked at."""

    times: Array
    error: Array
    """mean_i |x_i - x*|^2."""
    consensus: Array
    """mean_i |x_i - mean x|^2."""
    states: Array
    """At the end, (seeds, n, vectors, d)."""
    gradients: int
    meetings: int
    """Of all seeds together."""


def simulate(
    method: EventAlgorithm, problem: Problem, edges: Ints, rates: Array, *, seeds: Sequence[int], times: Array
) -> Trace:
    """Run from time 0 and look at each of ``times``, which grow. One gradient a node and unit of time, none where the problem has
    none. Raises ValueError where the run diverges."""
    num_nodes, numel = problem.start.shape
    states = np.concatenate([method.init(problem.start)] * len(seeds))
    last = np.zeros(len(states))
    gradient_rate = 0.0 if problem.gradient is None else 1.0
    clocks = [Clocks(num_nodes, gradient_rate, edges, rates, seed) for seed in seeds]
    errors, distances, counts, begun = [], [], np.zeros(2, np.int64), 0.0
    for time in times:
        drawn = [clock.between(begun, time) for clock in clocks]
        for wave in _waves(_side_by_side(drawn, num_nodes), len(states)):
            counts += _happen(method, problem, states, last, wave)
        method.flow(states, time - last)
        last[:], begun = time, time
        x = states[:, 0].reshape(len(seeds), num_nodes, numel)
        errors.append(np.square(x - problem.optimum).sum(axis=2).mean(axis=1))
        distances.append(np.square(x - x.mean(axis=1, keepdims=True)).sum(axis=2).mean(axis=1))
        if not np.isfinite(errors[-1]).all():
            raise ValueError(f"the run diverged before time {time:g}: give the nodes more meetings, or a smaller step")
    shape = (len(seeds), num_nodes, *states.shape[1:])
    gradients, meetings = map(int, counts)
    return Trace(np.asarray(times), np.array(errors), np.array(distances), states.reshape(shape), gradients, meetings)


def _side_by_side(drawn: list[Events], num_nodes: int) -> Events:
    """The events of several seeds, whose nodes are numbered on."""
    times = np.concatenate([events.times for events in drawn])
    first = np.concatenate([events.first + k * num_nodes for k, events in enumerate(drawn)])
    second = np.concatenate([np.where(events.second < 0, -1, events.second + k * num_nodes) for k, events in enumerate(drawn)])
    return Events(times, first, second)


def _waves(events: Events, num_nodes: int) -> Iterator[Events]:
    """The same events, gradients first in each wave; each node's own are in the order of time."""
    following = [0] * num_nodes
    wave_of = []
    for a, b in zip(events.first.tolist(), events.second.tolist(), strict=True):
        wave = following[a] if b < 0 else max(following[a], following[b])
        following[a] = wave + 1
        if b >= 0:
            following[b] = wave + 1
        wave_of.append(wave)
    waves = np.array(wave_of, dtype=np.int64)
    order = np.lexsort((events.second >= 0, waves))
    ends = np.cumsum(np.bincount(waves)) if len(waves) else []
    times, first, second = events.times[order], events.first[order], events.second[order]
    begun = 0
    for end in ends:
        yield Events(times[begun:end], first[begun:end], second[begun:end])
        begun = end


def _happen(method: EventAlgorithm, problem: Problem, states: Array, last: Array, wave: Events) -> tuple[int, int]:
    """All events of a wave; how many were gradients, and meetings."""
    steps = int(np.count_nonzero(wave.second < 0))
    count = len(wave.times)
    nodes = np.concatenate((wave.first, wave.second[steps:]))
    times = np.concatenate((wave.times, wave.times[steps:]))
    touched = states[nodes]
    method.flow(touched, times - last[nodes])
    if steps:
        assert problem.gradient is not None, "without gradients their clocks do not tick"
        mine = touched[:steps]
        method.step(mine, problem.gradient(nodes[:steps] % len(problem.start), mine[:, 0]))
    if steps < count:
        method.meet(touched[steps:count], touched[count:])
    states[nodes] = touched
    last[nodes] = times
    return steps, count - steps

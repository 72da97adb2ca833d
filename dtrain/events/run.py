"""What does a person ask of a method of events? A method, a graph, a problem and a horizon, by name; checked, then simulated.

``simulate_events("dadao", 64, topology="ring", problem="ridge", numel=16, horizon=500.0)``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dtrain import topology as topologies
from dtrain.events import dadao
from dtrain.events.a2cid2 import a2cid2
from dtrain.events.algorithm import Array, EventAlgorithm, Ints
from dtrain.events.gossip import gossip
from dtrain.events.graph_constants import Chi, chi, edge_list
from dtrain.events.problems import PROBLEMS, Problem
from dtrain.events.sdp import fewest_meetings
from dtrain.events.simulate import Trace, simulate

MethodName = Literal["gossip", "a2cid2", "dadao"]
Rates = Literal["uniform", "sdp"]


@dataclass(frozen=True, slots=True)
class EventRun:
    trace: Trace
    chi: Chi
    """Of the rates that were run."""
    meetings_per_node: float
    """A unit of time, on average over the nodes."""
    bound: float | None
    """DADAO's: the squared error falls at least as quickly as exp(-bound t)."""


@dataclass(frozen=True, slots=True)
class Posed:
    """All that a run is made of."""

    method: EventAlgorithm
    problem: Problem
    edges: Ints
    rates: Array
    """Of the edges, meetings a unit of time."""
    chi: Chi
    meetings_per_node: float
    bound: float | None


def simulate_events(
    method: MethodName,
    num_islands: int,
    *,
    topology: str = "ring",
    graph: str | None = None,
    problem: str = "quadratic",
    numel: int = 16,
    horizon: float = 100.0,
    seeds: Sequence[int] = (0,),
    meetings_per_node: float | None = None,
    rates: Rates = "uniform",
    looks: int = 50,
) -> EventRun:
    """The error at ``looks`` times up to ``horizon``, of islands that take one gradient a unit of time.

    The first seed also draws the problem, and the graph where it is drawn. ``meetings_per_node`` left out is 1 for gossip and
    a2cid2, and for dadao the fewest that its theory allows; its steps follow the problem's curvature. Raises ValueError with one
    line for what does not fit."""
    posed = pose(
        method, num_islands, topology=topology, graph=graph, problem=problem, numel=numel, seeds=seeds,
        meetings_per_node=meetings_per_node, rates=rates,
    )  # fmt: skip
    return run(posed, horizon=horizon, seeds=seeds, looks=looks)


def run(posed: Posed, *, horizon: float, seeds: Sequence[int], looks: int) -> EventRun:
    """Raises ValueError where it diverges, and for no time or no look at it."""
    if not horizon > 0 or looks < 1:
        raise ValueError(f"horizon = {horizon} must be more than 0, and looks = {looks} 1 or more")
    times = np.linspace(0.0, horizon, looks + 1)[1:]
    trace = simulate(posed.method, posed.problem, posed.edges, posed.rates, seeds=seeds, times=times)
    return EventRun(trace, posed.chi, posed.meetings_per_node, posed.bound)


def pose(
    method: MethodName, num_islands: int, *, topology: str, graph: str | None, problem: str, numel: int, seeds: Sequence[int],
    meetings_per_node: float | None, rates: Rates,
) -> Posed:  # fmt: skip
    """What ``simulate_events`` runs; raises ValueError with one line for what does not fit."""
    _check(method, num_islands, problem, numel, seeds, meetings_per_node, rates)
    topologies.check(topology, graph, num_islands, seeds[0])
    if topology in topologies.DIRECTED:
        raise ValueError(f'the meetings of events go both ways; topology = "{topology}" does not: use "ring", or "graph"')
    edges = edge_list(topologies.mixing(topology, graph, seeds[0]), num_islands)
    posed = PROBLEMS[problem](num_islands, numel, seeds[0])
    found = fewest_meetings(edges, num_islands) if rates == "sdp" else np.ones(len(edges))
    share = found / found.sum()
    least = dadao.total_rate(chi(edges, share, num_islands)) * 2 / num_islands
    each = meetings_per_node or (least if method == "dadao" else 1.0)
    if method == "dadao" and each < least * (1 - 1e-9):
        raise ValueError(
            f"meetings_per_node = {each:g} is less than dadao needs on this graph, {least:.4g}; raise it, or leave it out"
        )
    of_rates = share * each * num_islands / 2
    of_graph = chi(edges, of_rates, num_islands)
    bound = dadao.contraction(posed.strong_convexity, posed.smoothness) if method == "dadao" else None
    return Posed(_method(method, of_graph, posed), posed, edges, of_rates, of_graph, each, bound)


def _method(name: MethodName, of_graph: Chi, posed: Problem) -> EventAlgorithm:
    match name:
        case "gossip":
            return gossip(1 / posed.smoothness)
        case "a2cid2":
            return a2cid2(of_graph, 1 / posed.smoothness)
        case "dadao":
            return dadao.dadao(of_graph, posed.strong_convexity, posed.smoothness)


def _check(
    method: str, num_islands: int, problem: str, numel: int, seeds: Sequence[int], meetings_per_node: float | None, rates: str
) -> None:
    for what, value, known in (
        ("method", method, get_args(MethodName)),
        ("problem", problem, tuple(PROBLEMS)),
        ("rates", rates, get_args(Rates)),
    ):
        if value not in known:
            raise ValueError(f"{what} = {value!r} is not known; use one of {', '.join(known)}")
    counts = {"num_islands": num_islands, "numel": numel, "the number of seeds": len(seeds)}
    for what, count in counts.items():
        least = 2 if what == "num_islands" else 1
        if count < least:
            raise ValueError(f"{what} = {count} is too few; use {least} or more")
    if meetings_per_node is not None and not meetings_per_node > 0:
        raise ValueError(f"meetings_per_node = {meetings_per_node} must be more than 0")
    if method == "dadao" and problem == "consensus":
        others = ", ".join(name for name in PROBLEMS if name != "consensus")
        raise ValueError(f'dadao minimises, and problem = "consensus" has nothing to minimise; use {others}')

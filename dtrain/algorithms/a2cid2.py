"""Pairwise gossip with continuous momentum: where few islands are neighbours, they agree in fewer meetings.

A2CiD2 (Nabli, Belilovsky and Oyallon 2023, arXiv 2306.08289): next to x each island has x~, x~ = x at first,
    at all times  dx = eta (x~ - x) dt,   dx~ = eta (x - x~) dt,   t in optimizer steps;
    at a step     x <- x - lr U,          x~ <- x~ - lr U          (the same displacement: SGD's in the paper, here any U's);
    i meets j     x_i <- x_i + 1/2 m,     x~_i <- x~_i + alpha m,   m = C(x_j) - C(x_i), C any codec.
An optimizer moves both alike, so it does not change a = x~ - x, which is all that is kept:
    over t steps  x <- x + (1 - e)/2 a,   a <- e a,   e = exp(-2 eta t);        i meets j:   a <- a + (alpha - 1/2) m.
A round is one matching, and its pairs meet: an island waits for its one peer. All islands flow as rounds start and land, also
those that sit out, so the mean of all x stays what it is. eta and alpha are of how often pairs meet (``events/``)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.events.a2cid2 import Momentum, momentum
from dtrain.events.graph_constants import chi, rates_of_rounds
from dtrain.link import Link, Peers
from dtrain.topology import Mixing


def a2cid2(codec: Codec, mixing: Mixing, every: int, delay_steps: int) -> Method:
    momentum_of = cache(lambda num_nodes: _momentum(mixing, num_nodes, every))
    flight_steps = max(0, delay_steps - 1)
    """Optimizer steps between a round's start and its landing, which comes before the last of the delay."""

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout, peers.node)
        arrivals = Arrivals(bound, 1)
        eta, alpha = momentum_of(peers.num_nodes)

        def init(b: Bucket) -> State:
            own = {"ahead": torch.zeros(b.x.numel(), device=b.x.device), "own": bound.new_wire(b.x.device)}
            # Of the last round's start, and up to which x and x~ have flowed.
            times = {name: torch.zeros(1, dtype=torch.int64) for name in ("started", "flowed")}
            return own | times | arrivals.init(b.x.device) | bound.init(b.x.device)

        def flow(b: Bucket, state: State, now: int) -> None:
            elapsed = now - int(state["flowed"])
            if elapsed:
                e = math.exp(-2 * eta * elapsed)
                b.x.add_(state["ahead"], alpha=(1 - e) / 2)
                state["ahead"].mul_(e)
                state["flowed"].fill_(now)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            state["started"] += every
            flow(b, state, int(state["started"]))
            bound.encode(b.x, state["own"], state)
            yield from arrivals.fly(state, link)

        def land(b: Bucket, state: State) -> None:
            flow(b, state, int(state["started"]) + flight_steps)
            wires, _ = arrivals.arrived(state)
            for wire in wires:
                bound.mix(b.x, [state["own"], wire], [-0.5, 0.5])
                bound.mix(state["ahead"], [state["own"], wire], [0.5 - alpha, alpha - 0.5])

        def merged(b: Bucket, state: State) -> None:
            state["ahead"].zero_()

        return Algorithm(init, send, land, merged=merged)

    return bind


def _momentum(mixing: Mixing, num_nodes: int, every: int) -> Momentum:
    return momentum(chi(*rates_of_rounds(mixing, num_nodes, every), num_nodes))

"""A2CiD2 for islands that meet as soon as both are ready: there is no common time, so an island's own meetings are its clock.

``a2cid2.py`` has the method; a = x~ - x. Here both of a meeting post x as it was when each became ready, and
    i meets j   x_i <- x_i + 1/2 m,   a_i <- a_i + (alpha - 1/2) m,   m = C(x_j) - C(x_i); then, until i's next meeting,
    over T_i    x_i <- x_i + (1 - e)/2 a_i,   a_i <- e a_i,   e = exp(-2 eta T_i).
T_i = 1 / sum_j lambda_ij is what lies between two meetings of i in the mean. eta and alpha are of these rates lambda, those of
the topology's rounds, one after each step. Their unit cancels: it does not matter how often islands meet, only how meetings are
spread over the edges. With steps as the clock eta would be too large where meetings are seldom: on a ring of 32 whose wires fly
for 6 steps the squared disagreement grew by e^29 in 350 steps. By meetings it fell by e^10, and by e^5 without momentum.
The mean over islands that meetings keep, whatever the islands' paces, is that of (x + x~)/2 = x + a/2. So before an exact average
that takes the parameters' place each island goes there: x <- x + a/2, a <- 0."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.events.a2cid2 import momentum
from dtrain.events.graph_constants import chi, rates_of_rounds
from dtrain.link import Link, Peers
from dtrain.topology import Mixing


def a2cid2_ready(codec: Codec, mixing: Mixing) -> Method:
    constants = cache(lambda node, num_nodes: _constants(mixing, node, num_nodes))

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout, peers.node)
        arrivals = Arrivals(bound, 1)
        e, alpha = constants(peers.node, peers.num_nodes)

        def init(b: Bucket) -> State:
            own = {"ahead": torch.zeros(b.x.numel(), device=b.x.device), "own": bound.new_wire(b.x.device)}
            return own | arrivals.init(b.x.device) | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            bound.encode(b.x, state["own"], state)
            yield  # until there is a partner: link.row is it
            yield from arrivals.fly(state, link)

        def land(b: Bucket, state: State) -> None:
            (wire,), _ = arrivals.arrived(state)
            bound.mix(b.x, [state["own"], wire], [-0.5, 0.5])
            bound.mix(state["ahead"], [state["own"], wire], [0.5 - alpha, alpha - 0.5])
            b.x.add_(state["ahead"], alpha=(1 - e) / 2)
            state["ahead"].mul_(e)

        def rest(b: Bucket, state: State) -> None:
            b.x.add_(state["ahead"], alpha=0.5)
            state["ahead"].zero_()

        return Algorithm(init, send, land, rest=rest)

    return bind


def _constants(mixing: Mixing, node: int, num_nodes: int) -> tuple[float, float]:
    """e and alpha of one island."""
    pairs, rates = rates_of_rounds(mixing, num_nodes, every=1)
    eta, alpha = momentum(chi(pairs, rates, num_nodes))
    return math.exp(-2 * eta / float(rates[(pairs == node).any(axis=1)].sum())), alpha

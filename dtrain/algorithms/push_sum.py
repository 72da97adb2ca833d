"""Gossip over links that go one way: who sends cannot know what it would hear back, so only the columns of P sum to one.

Stochastic gradient push (Assran et al. 2019, arXiv 1811.10792): next to x each island keeps a weight w, w = 1 at first,
    x_i <- x_i - lr U(g_i(z_i));   x <- P x;   w <- P w;   z = x / w,
and trains on z. P is known and w does not depend on data, so every island reckons all weights by itself and wires carry z
alone: with A_ij = P_ij w_j / w'_i, whose rows sum to one, the mixing is z_i <- z_i + sum_j A_ij (C(z_j) - C(z_i)). The optimizer
moves z, where the paper moves x = w z: progress made since a round was sent is divided by w before the next one is. Mixing keeps
sum_i w_i z_i, not the plain mean; what C loses moves that by sum_i (w'_i - w_i)(z_i - C(z_i)), until w has settled at P's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.link import Link, Peers
from dtrain.topology import Mixing
from dtrain.topology.consensus import matrix


def push_sum(codec: Codec, mixing: Mixing) -> Method:
    columns = cache(lambda num_nodes: torch.from_numpy(matrix(mixing, 0, num_nodes)))

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout, peers.node)
        arrivals = Arrivals(bound, mixing.in_degree(peers.node, peers.num_nodes))
        p, row = columns(peers.num_nodes), mixing.rows(0, peers.node, peers.num_nodes)

        def init(b: Bucket) -> State:
            weights = torch.ones(peers.num_nodes, dtype=torch.float64)
            own = {"own": bound.new_wire(b.x.device), "base": b.x.to(torch.float32).clone(), "w": weights}
            return own | arrivals.init(b.x.device) | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            base, w = state["base"], float(state["w"][peers.node])
            b.x.copy_(torch.lerp(base, b.x.float(), 1 / w))
            base.copy_(b.x)
            state["own"] = own = link.room(state["own"], bound)
            bound.encode(b.x, own, state)
            yield from arrivals.fly(state, link)

        def land(b: Bucket, state: State) -> None:
            w, after = state["w"], p @ state["w"]
            wires, _ = arrivals.arrived(state)
            a = [share * float(w[j] / after[peers.node]) for j, share in row.recvs]
            state["base"].sub_(b.x)
            bound.mix(b.x, [state["own"], *wires], [-sum(a), *a])
            state["base"].add_(b.x)
            w.copy_(after)

        def rest(b: Bucket, state: State) -> None:
            b.x.add_(state["base"], alpha=float(state["w"][peers.node]) - 1)

        def merged(b: Bucket, state: State) -> None:
            state["base"].copy_(b.x)
            state["w"].fill_(1.0)

        return Algorithm(init, send, land, merged=merged, rest=rest)

    return bind

"""Gossip on compressed differences with public copies, exact in the limit for a gamma that is small enough for what C loses.

CHOCO-SGD (Koloskova et al. 2019, arXiv 1902.00340), memory-efficient form. Each island keeps its own public copy xhat
and s_i = sum_j W_ij xhat_j:
    q = C(x - xhat);  xhat += q;  s += W_ii q;      and where the round lands:   s += sum_j W_ij q_j;  x += gamma (s - xhat).
W must be static. C must be a contraction, and how large gamma may be for it is derived in ``contraction.py``: beyond that the
islands drift apart. All islands start from the same x, so xhat = s = x needs no first exchange; an exact average is such a start,
and without it what copies lag behind would drive equal islands apart again."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Blocks, State, Update
from dtrain.link import Link, Peers
from dtrain.topology import Mixing


def choco(codec: Blocks, gamma: float, mixing: Mixing) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout, peers.node)
        arrivals = Arrivals(bound, mixing.in_degree(peers.node, peers.num_nodes))

        def init(b: Bucket) -> State:
            x = b.x.to(torch.float32)
            own = {"xhat": x.clone(), "s": x.clone(), "own": bound.new_wire(b.x.device)}
            return own | arrivals.init(b.x.device) | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            bound.choco_encode(b.x, state["xhat"], state["s"], link.row.self_weight, state["own"], state)
            yield from arrivals.fly(state, link)

        def land(b: Bucket, state: State) -> None:
            bound.choco_mix(b.x, state["xhat"], state["s"], gamma, *arrivals.arrived(state))

        def fused(b: Bucket, state: State, link: Link, update: Update, landing: bool) -> Iterator[None]:
            if not landing:
                bound.adam(update)
                yield from send(b, state, link)
                return
            bound.choco_gossip_adam(
                *(update, state["xhat"], state["s"], gamma, link.row.self_weight, *arrivals.arrived(state), state["own"], state)
            )
            yield from arrivals.fly(state, link)

        def merged(b: Bucket, state: State) -> None:
            state["xhat"].copy_(b.x)
            state["s"].copy_(b.x)

        return Algorithm(init, send, land, fused=fused if bound.fuses else None, merged=merged)

    return bind

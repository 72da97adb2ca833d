"""Each island steps along an estimate of the mean gradient, so that islands with different data still agree on the optimum.

Gradient tracking (Nedic, Olshevsky and Shi 2017, arXiv 1607.03218), with any codec C and any optimizer U:
    v_i <- v_i + sum_j W_ij (C(v_j) - C(v_i)) + g_i - g_i,before,     v = g_before = 0 at first;
    x_i <- x_i + sum_j W_ij (C(x_j) - C(x_i)) - lr U(v_i).
The mean of all v is the mean of all g, always. v is exchanged before each update, and waited for; x flies as in ``gossip.py``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import exchange
from dtrain.algorithms.gossip import gossip
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.link import Link, Peers
from dtrain.topology import Mixing


def gradient_tracking(codec: Codec, mixing: Mixing) -> Method:
    of_parameters = gossip(codec, mixing)

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound, parameters = codec.bind(layout, peers.node), of_parameters(layout, peers)

        def init(b: Bucket) -> State:
            rooms = {name: torch.zeros(b.x.numel(), device=b.x.device) for name in ("v", "g_before")}
            return parameters.init(b) | rooms | {"v_own": bound.new_wire(b.x.device)}

        def grad(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert b.g is not None
            v = state["v"]
            bound.encode(v, state["v_own"], state)
            exchange(link, bound, state["v_own"])
            yield
            wires = [state["v_own"], *(link.received(peer) for peer, _ in link.row.recvs)]
            bound.mix(v, wires, [link.row.self_weight - 1, *(w for _, w in link.row.recvs)])
            v.add_(b.g).sub_(state["g_before"])
            state["g_before"].copy_(b.g)
            b.g.copy_(v)

        return Algorithm(init, parameters.send, parameters.land, grad)

    return bind

"""Gradient tracking whose both exchanges are compressed differences, exact in the limit for a gamma that C bears.

BEER (Zhao et al. 2022, arXiv 2201.13320): H and G are public copies of x and v, C a contraction, U any optimizer:
    x <- x + gamma sum_j W_ij (H_j - H_i) - lr U(v);              H <- H + C(x - H);
    v <- v + gamma sum_j W_ij (G_j - G_i) + g(x) - g(x_before);   G <- G + C(v - G).
The first line is CHOCO's with a delay of one step (``choco.py``), which keeps s = sum_j W_ij H_j and not each H_j; the second
does the same before each update, and bears the same gamma (``contraction.py``). The mean of all v is the mean of all g, always,
also after an exact average, which leaves v alone. W must be static."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import exchange
from dtrain.algorithms.choco import choco
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Blocks, State
from dtrain.link import Link, Peers
from dtrain.topology import Mixing


def beer(codec: Blocks, gamma: float, mixing: Mixing) -> Method:
    of_parameters = choco(codec, gamma, mixing)

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound, parameters = codec.bind(layout, peers.node), of_parameters(layout, peers)

        def init(b: Bucket) -> State:
            rooms = {name: torch.zeros(b.x.numel(), device=b.x.device) for name in ("v", "g_before", "v_hat", "v_s")}
            return parameters.init(b) | rooms | {"v_own": bound.new_wire(b.x.device)}

        def grad(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert b.g is not None
            v, v_hat, v_s = state["v"], state["v_hat"], state["v_s"]
            bound.choco_mix(v, v_hat, v_s, gamma, [], [])
            v.add_(b.g).sub_(state["g_before"])
            state["g_before"].copy_(b.g)
            bound.choco_encode(v, v_hat, v_s, link.row.self_weight, state["v_own"], state)
            exchange(link, bound, state["v_own"])
            yield
            for peer, weight in link.row.recvs:
                bound.decode_add(link.received(peer), v_s, weight=weight)
            b.g.copy_(v)

        return Algorithm(init, parameters.send, parameters.land, grad, merged=parameters.merged)

    return bind

"""Gossip on compressed differences with public copies, exact in the limit whatever the codec loses.

CHOCO-SGD (Koloskova et al. 2019, arXiv 1902.00340), memory-efficient form. Each island keeps its own public copy xhat
and s_i = sum_j W_ij xhat_j:
    q = C(x - xhat);  xhat += q;  s += W_ii q + sum_j W_ij q_j;  x += gamma (s - xhat).
W must be static. All islands start from the same x, so xhat = s = x needs no first exchange."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.link import Link, Peers


def choco(codec: Codec, gamma: float) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout)

        def init(b: Bucket) -> State:
            x = b.x.to(torch.float32)
            return {"xhat": x.clone(), "s": x.clone()} | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            wire = torch.empty(bound.wire_bytes, dtype=torch.uint8, device=b.x.device)
            bound.encode(b.x - state["xhat"], wire, state)
            bound.decode_add(wire, state["xhat"], weight=1.0)
            bound.decode_add(wire, state["s"], weight=link.row.self_weight)
            for peer in link.row.sends:
                link.post(peer, wire)
            for peer, _ in link.row.recvs:
                link.expect(peer, bound.wire_bytes)
            yield
            for peer, weight in link.row.recvs:
                bound.decode_add(link.received(peer), state["s"], weight=weight)

        def land(b: Bucket, state: State) -> None:
            b.x.add_(state["s"] - state["xhat"], alpha=gamma)

        return Algorithm(init=init, send=send, land=land)

    return bind

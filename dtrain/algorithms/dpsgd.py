"""Gossip on parameters: x_i <- sum_j W_ij x_j beside any local optimizer.

D-PSGD (Lian et al. 2017, arXiv 1705.09056). With delay 0 the parameters are mixed after each update. With delay 1 it
is
    X_{t+1} = W_t X_t - lr U(G(X_t)):
the gradient is taken at the un-mixed parameters while the same parameters mix on the wire, so the mixing has no
staleness."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain import payload
from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import State
from dtrain.link import Link, Peers
from dtrain.reduce import Reduce


def dpsgd(reduce: Reduce) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)

        def init(b: Bucket) -> State:
            n, device = b.x.numel(), b.x.device
            return {"sent": torch.zeros(n, device=device), "mixed": torch.zeros(n, device=device)} | path.init(device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            payload.parameters(b, state, state["sent"])
            yield from path.run(state["sent"], state["mixed"], state, link)

        def land(b: Bucket, state: State) -> None:
            # x - sent is exactly zero where nothing moved in flight, so a round without delay lands exactly on the mix.
            b.x.sub_(state["sent"]).add_(state["mixed"])

        return Algorithm(init=init, send=send, land=land)

    return bind

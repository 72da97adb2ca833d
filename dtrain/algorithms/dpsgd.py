"""The mean of all islands' parameters beside any local optimizer, by a path that reaches everyone: algorithm "dpsgd" with
reduce = "gather" or "all_to_all". With reduce = "neighbours" it is ``gossip.py``.

D-PSGD (Lian et al. 2017, arXiv 1705.09056) on the complete graph: x_i <- x_i + mean_j x_j - x_i,sent. After every H-th step and
without delay that is local SGD (Stich 2019, arXiv 1805.09767): x_i <- mean_j x_j. FedAvg here comes to it but for roundings: its
islands keep an anchor, and send how far they are from it (``diloco.py``).

Without loss only: parameters that are rounded take the mean of all with them (int4, 4 islands, 60 rounds: by 0.11 of values up to
1), and with it any progress of less than half a code. To land mean_j C(x_j) - C(x_i) would keep the mean over gather, and
not where an owner codes it again."""

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

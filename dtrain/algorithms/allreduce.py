"""Synchronous data parallelism, the baseline: g <- mean_i g_i each step, before clipping and the update."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import State
from dtrain.link import Link, Peers
from dtrain.reduce import Reduce


def allreduce(reduce: Reduce) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)

        def init(b: Bucket) -> State:
            return path.init(b.x.device)

        def grad(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert b.g is not None
            yield from path.run(b.g, b.g, state, link)

        return Algorithm(init=init, grad=grad)

    return bind

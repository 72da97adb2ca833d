"""Local AdamW whose moments are averaged too, and more rarely than the parameters, as they change more slowly.

DES-LOC (Iacob et al. 2025, arXiv 2505.22549): with K_u and K_v multiples of K_x, after every
    K_x-th step   x_i <- mean_i x_i    (as in ``diloco.py``: theta <- theta - mean_i (theta - x_i), by any codec);
    K_u-th step   u_i <- mean_i u_i,   Adam's first moment;
    K_v-th step   v_i <- mean_i v_i,   its second.
Moments travel in fp32, and v itself, not its root: all weights are above 0, so a mean of v is at least 0, where a root's would be
too small by the variance of the roots, and a step too long by as much. Codes of v would be neither: a small v next to a large one
is 0 in a block's codes, and its step lr u / eps. All moments of a round follow its parameters, each in phases of its own.
A round lands before the next step: what Adam does in flight decays u and v, and a mean that lands on top would not have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.diloco import diloco_keep
from dtrain.bucket import MOMENTS, Bucket, Layout
from dtrain.codec import State
from dtrain.link import Link, Peers
from dtrain.outer import copy
from dtrain.reduce import Reduce


def desloc(reduce: Reduce, uncoded: Reduce, periods: tuple[int, int]) -> Method:
    """``periods``: K_u / K_x and K_v / K_x. ``uncoded`` is the path of the moments."""
    of_parameters = diloco_keep(reduce, copy())

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        parameters, path = of_parameters(layout, peers), uncoded(layout, peers)
        assert parameters.send is not None
        assert parameters.land is not None
        send_parameters, land_parameters = parameters.send, parameters.land

        def init(b: Bucket) -> State:
            rooms = {name: torch.zeros(b.x.numel(), device=b.x.device) for name in MOMENTS}
            return parameters.init(b) | rooms | {"due": torch.zeros(len(MOMENTS), dtype=torch.int64)}

        def due(state: State) -> list[str]:
            return [name for name, is_due in zip(MOMENTS, state["due"].tolist(), strict=True) if is_due]

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert b.moments is not None
            state["due"].copy_(torch.tensor([(link.round + 1) % period == 0 for period in periods]))
            for name in due(state):
                b.moments.read(name, state[name])
            yield from send_parameters(b, state, link)
            for name in due(state):
                yield from path.run(state[name], state[name], state, link)

        def land(b: Bucket, state: State) -> None:
            assert b.moments is not None
            land_parameters(b, state)
            for name in due(state):
                b.moments.write(name, state[name])

        return Algorithm(init, send, land)

    return bind

"""Local AdamW whose moments are averaged too, and more rarely than the parameters, as they change more slowly.

DES-LOC (Iacob et al. 2025, arXiv 2505.22549): with K_u and K_v multiples of K_x, after every
    K_x-th step   x_i <- mean_i x_i    (as in ``diloco.py``: theta <- theta - mean_i (theta - x_i), by any codec);
    K_u-th step   u_i <- mean_i u_i,   Adam's first moment;
    K_v-th step   v_i <- mean_i v_i,   its second.
Moments travel in fp32, and v itself, not its root: all weights are above 0, so a mean of v is at least 0, where a root's would be
too small by the variance of the roots, and a step too long by as much. Codes of v would be neither: a small v next to a large one
is 0 in a block's codes, and its step lr u / eps. All moments of a round follow its parameters, each in phases of its own.
With a delay parameters land as in ``diloco.py``, on the progress made in flight. So do moments, and exactly: Adam's are linear in
what they were, m <- b m + (1 - b) s with s the gradient or its square, so that k such steps in flight leave b^k of what was sent:
    m_i <- (m_i - b^k m_i,sent) + b^k mean_i m_i,sent,
what m_i would be if the mean had been there at once, but for the gradients, which were taken along the way without it. v_i stays
above 0: its own share is in the mean."""

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


def desloc(reduce: Reduce, uncoded: Reduce, periods: tuple[int, int], delay_steps: int) -> Method:
    """``periods``: K_u / K_x and K_v / K_x. ``uncoded`` is the path of the moments. With a delay what was sent of them is
    kept: 8 bytes an element."""
    of_parameters = diloco_keep(reduce, copy())

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        parameters, path = of_parameters(layout, peers), uncoded(layout, peers)
        assert parameters.send is not None
        assert parameters.land is not None
        send_parameters, land_parameters = parameters.send, parameters.land

        def init(b: Bucket) -> State:
            assert b.moments is not None
            names = (*MOMENTS, *(f"{name}.sent" for name in MOMENTS if delay_steps))
            rooms = {name: torch.zeros(b.x.numel(), device=b.x.device) for name in names}
            if delay_steps:
                rooms["updates"] = torch.zeros_like(b.moments.updates())
            return parameters.init(b) | rooms | {"due": torch.zeros(len(MOMENTS), dtype=torch.int64)}

        def due(state: State) -> list[str]:
            return [name for name, is_due in zip(MOMENTS, state["due"].tolist(), strict=True) if is_due]

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert b.moments is not None
            state["due"].copy_(torch.tensor([(link.round + 1) % period == 0 for period in periods]))
            for name in due(state):
                b.moments.read(name, state[name])
                if delay_steps:
                    state[f"{name}.sent"].copy_(state[name])
            if delay_steps:
                state["updates"].copy_(b.moments.updates())
            yield from send_parameters(b, state, link)
            for name in due(state):
                yield from path.run(state[name], state[name], state, link)

        def land(b: Bucket, state: State) -> None:
            assert b.moments is not None
            land_parameters(b, state)
            for name in due(state):
                if delay_steps:
                    b.moments.carry(name, state[f"{name}.sent"], state[name], state["updates"])
                else:
                    b.moments.write(name, state[name])

        return Algorithm(init, send, land)

    return bind

"""Several gossip steps a round: the islands come closer together for one round trip each, and Q times the bytes.

From y_0 = x, with any codec C that may lose something and never moves the mean of all islands:
    plain:      y_{k+1} = y_k + sum_j W_ij (C(y_k,j) - C(y_k,i)),  W^Q for what C keeps (DFedAvgM's MGS, arXiv 2302.04083);
    Chebyshev:  y_1 as above;  y_{k+1} = w_k (the same) + (1 - w_k) y_{k-1},   w_k = 2 a_k / (lambda2 a_{k+1}),
                a_0 = 1,  a_1 = 1 / lambda2,  a_{k+1} = (2 / lambda2) a_k - a_{k-1},
the polynomial of degree Q that is smallest on all disagreement: 1 / T_Q(1 / lambda2) of it is left, where plain gossip leaves
lambda2^Q (Scaman et al. 2017, arXiv 1702.08704). Each round begins with k = 0, so no momentum outlives a change of the graph.
Where the round lands:  x <- x + y_Q - x_sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.link import Link, Peers
from dtrain.topology import Mixing
from dtrain.topology.consensus import second_largest


def multi_gossip(codec: Codec, steps: int) -> Method:
    return _gossip(codec, lambda num_nodes: [1.0] * steps)


def chebyshev(codec: Codec, steps: int, mixing: Mixing) -> Method:
    return _gossip(codec, lambda num_nodes: chebyshev_weights(second_largest(mixing, num_nodes), steps))


def chebyshev_weights(lambda2: float, steps: int) -> list[float]:
    """w_k for k = 0 to steps - 1; w_0 = 1."""
    weights = [1.0]
    if lambda2 < 1e-12:  # one step is the exact mean
        return [1.0] * steps
    ratio = 1 / lambda2  # a_k / a_{k-1}: the a themselves grow beyond any float
    for _ in range(steps - 1):
        following = 2 / lambda2 - 1 / ratio
        weights.append(2 / (lambda2 * following))
        ratio = following
    return weights


def _gossip(codec: Codec, weights_of: Callable[[int], list[float]]) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout, peers.node)
        weights = weights_of(peers.num_nodes)

        def init(b: Bucket) -> State:
            rooms = {name: torch.zeros(b.x.numel(), device=b.x.device) for name in ("sent", "y", "before")}
            return rooms | {"own": bound.new_wire(b.x.device)} | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            for name in ("sent", "y", "before"):
                state[name].copy_(b.x)
            for w in weights:
                bound.encode(state["y"], state["own"], state)
                for peer in link.row.sends:
                    link.post(peer, state["own"])
                for peer, _ in link.row.recvs:
                    link.expect(peer, bound.wire_bytes, bound.check)
                yield
                wires = [state["own"], *(link.received(peer) for peer, _ in link.row.recvs)]
                mixing = [w * (link.row.self_weight - 1), *(w * p for _, p in link.row.recvs)]
                state["before"].mul_(1 - w).add_(state["y"], alpha=w)
                bound.mix(state["before"], wires, mixing)
                state["y"], state["before"] = state["before"], state["y"]

        def land(b: Bucket, state: State) -> None:
            b.x.sub_(state["sent"]).add_(state["y"])

        return Algorithm(init, send, land)

    return bind

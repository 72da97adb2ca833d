"""Gossip on parameters with one's neighbours, in one pass where it lands: algorithm "dpsgd" with reduce = "neighbours", and
"deepsqueeze". With reduce = "gather" or "all_to_all" "dpsgd" is ``dpsgd.py``.

D-PSGD (Lian et al. 2017, arXiv 1705.09056), with any contraction C and the mean of all islands unchanged whatever C loses:
    x_i <- x_i + gamma sum_j W_ij (C(x_j) - C(x_i)),   gamma = 1.
DeepSqueeze (Tang et al. 2019, arXiv 1907.07346) is the same with gamma < 1 and a codec with error feedback, z_i = C(x_i + e_i)
with e_i what is left; how small gamma must be for C is in ``contraction.py``. It needs no state of a neighbour, so any topology
will do; it compresses the model and not a difference, so some disagreement always stays. An exact average leaves no e_i.
With delay 1 it is X_{t+1} = W_t X_t - lr U(G(X_t)): the gradient is taken at the un-mixed parameters while the same
parameters mix on the wire, so the mixing has no staleness; and mixing, optimizer and the next encoding are one pass (arXiv
2410.11998). Arrived wires lie in State until they land."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import Bucket, Layout
from dtrain.codec import BoundBlocks, Codec, State, Update
from dtrain.link import Link, Peers
from dtrain.topology import Mixing


def gossip(codec: Codec, mixing: Mixing, gamma: float = 1.0) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        bound = codec.bind(layout, peers.node)
        arrivals = Arrivals(bound, mixing.in_degree(peers.node, peers.num_nodes))

        def init(b: Bucket) -> State:
            own = {name: bound.new_wire(b.x.device) for name in ("own", "next")}
            return own | arrivals.init(b.x.device) | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            state["own"] = own = link.room(state["own"], bound)
            bound.encode(b.x, own, state)
            yield from arrivals.fly(state, link)

        def to_mix(state: State) -> tuple[list[Tensor], list[float]]:
            wires, weights = arrivals.arrived(state)
            weights = [gamma * w for w in weights]
            return [state["own"], *wires], [-sum(weights), *weights]

        def land(b: Bucket, state: State) -> None:
            bound.mix(b.x, *to_mix(state))

        def fused(b: Bucket, state: State, link: Link, update: Update, landing: bool) -> Iterator[None]:
            assert isinstance(bound, BoundBlocks)
            wires, weights = to_mix(state) if landing else ([], [])
            bound.gossip_adam(update, wires, weights, state["next"], state)
            state["own"], state["next"] = state["next"], state["own"]
            yield from arrivals.fly(state, link)

        def merged(b: Bucket, state: State) -> None:
            if "residual" in state:
                state["residual"].zero_()

        one_pass = fused if isinstance(bound, BoundBlocks) and bound.fuses else None
        return Algorithm(init, send, land, fused=one_pass, merged=merged)

    return bind

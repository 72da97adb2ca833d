"""Are a round's wires in State once they are here, and only those of this round?"""

from __future__ import annotations

import torch

from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import whole
from dtrain.codec import plain
from dtrain.link import Link
from dtrain.topology.row import ALONE, Round

CPU = torch.device("cpu")


def test_state_holds_the_wires_of_the_last_round_and_their_weights() -> None:
    codec = plain("identity").bind(whole("x", torch.zeros(3)))
    arrivals = Arrivals(codec, 2)
    state = arrivals.init(CPU) | {"own": codec.new_wire(CPU)}
    link = Link(0, 3, Round(0.25, (1,), ((1, 0.5), (2, 0.25))))
    flight = arrivals.fly(state, link)
    next(flight)
    assert link.outbox == [(1, state["own"])]
    assert link.expected == {1: codec.wire_bytes, 2: codec.wire_bytes}
    assert arrivals.arrived(state) == ([], []), "nothing is here yet"
    link.inbox = {peer: codec.new_wire(CPU).fill_(peer) for peer in (1, 2)}
    assert next(flight, None) is None
    wires, weights = arrivals.arrived(state)
    assert [int(w[0]) for w in wires] == [1, 2]
    assert weights == [0.5, 0.25] == state["weights"].tolist(), "a checkpoint holds what lands"

    other = arrivals.init(CPU)
    other["weights"][1] = 0.125
    assert arrivals.arrived(other)[1] == [0.125], "another State has its own"
    next(arrivals.fly(state, Link(0, 3, ALONE)))
    assert arrivals.arrived(state) == ([], []), "an island that sits a round out lands nothing"

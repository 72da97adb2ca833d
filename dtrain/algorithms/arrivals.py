"""Where do a gossip round's wires wait until they land? In State, with their weights, so that a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from dtrain.codec import BoundCodec, State
from dtrain.link import Link


def arrivals(codec: BoundCodec, in_degree: int, device: torch.device) -> State:
    """Room for as many wires as a round can bring; a weight of 0 marks one that this round has not."""
    wires = {_in(k): codec.new_wire(device) for k in range(in_degree)}
    return wires | {"weights": torch.zeros(in_degree, dtype=torch.float64)}


def exchange(link: Link, codec: BoundCodec, wire: Tensor) -> None:
    """Send one's own wire to this round's peers, and say that each of theirs is waited for."""
    for peer in link.row.sends:
        link.post(peer, wire)
    for peer, _ in link.row.recvs:
        link.expect(peer, codec.wire_bytes, codec.check)


def fly(state: State, link: Link, codec: BoundCodec) -> Iterator[None]:
    """Send one's own wire to this round's peers, and put theirs into State; until they are here nothing has arrived."""
    exchange(link, codec, state["own"])
    state["weights"].zero_()
    yield
    weights = state["weights"].numpy()  # the same memory; an element is written in a third of the time
    for k, (peer, weight) in enumerate(link.row.recvs):
        name = _in(k)
        state[name] = link.keep(peer, state[name])
        weights[k] = weight


def arrived(state: State) -> tuple[list[Tensor], list[float]]:
    """The wires of the round that lands, and their weights."""
    weights = state["weights"].tolist()
    return [state[_in(k)] for k, w in enumerate(weights) if w], [w for w in weights if w]


@cache
def _in(k: int) -> str:
    return f"in{k}"

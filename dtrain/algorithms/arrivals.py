"""Where do a gossip round's wires wait until they land? In State, with their weights, so that a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from dtrain.codec import BoundCodec, State
from dtrain.link import Link


def exchange(link: Link, codec: BoundCodec, wire: Tensor) -> None:
    """Send one's own wire to this round's peers, and say that each of theirs is waited for."""
    for peer in link.row.sends:
        link.post(peer, wire)
    for peer, _ in link.row.recvs:
        link.expect(peer, codec.wire_bytes, codec.check)


class Arrivals:
    """Of one bucket: as many wires as a round can bring; a weight of 0 marks one that this round has not."""

    def __init__(self, codec: BoundCodec, in_degree: int) -> None:
        self._codec = codec
        self._names = [f"in{k}" for k in range(in_degree)]
        self._seen: Tensor | None = None
        self._memory: memoryview[float]

    def init(self, device: torch.device) -> State:
        wires = {name: self._codec.new_wire(device) for name in self._names}
        return wires | {"weights": torch.zeros(len(self._names), dtype=torch.float64)}

    def fly(self, state: State, link: Link) -> Iterator[None]:
        """Send one's own wire to this round's peers, and put theirs into State; until they are here nothing has arrived."""
        exchange(link, self._codec, state["own"])
        weights = self._weights(state)
        for k in range(len(weights)):
            weights[k] = 0.0
        yield
        for k, (peer, weight) in enumerate(link.row.recvs):
            name = self._names[k]
            state[name] = link.keep(peer, state[name])
            weights[k] = weight

    def arrived(self, state: State) -> tuple[list[Tensor], list[float]]:
        """The wires of the round that lands, and their weights."""
        wires, weights = [], []
        for name, weight in zip(self._names, self._weights(state).tolist(), strict=True):
            if weight:
                wires.append(state[name])
                weights.append(weight)
        return wires, weights

    def _weights(self, state: State) -> memoryview[float]:
        """The tensor's memory: an element of it is read and written in a tenth of the time."""
        weights = state["weights"]
        if weights is not self._seen:
            self._seen, self._memory = weights, cast("memoryview[float]", weights.numpy().data)
        return self._memory

"""Does what nobody writes again go as it is, and all else as a copy?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dtrain.core import Flight
from dtrain.link import Link
from dtrain.topology.static import complete
from dtrain.traffic import Traffic
from dtrain.transport.base import MERGE, ROUND, Inbox, Left, Tag, nobody


class Posted:
    """A transport that keeps what it is given."""

    def __init__(self, wires_on: str) -> None:
        self.inbox, self.wires_on = Inbox(), torch.device(wires_on)
        self.wires: list[Tensor] = []

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        self.wires.append(wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        """Nothing comes."""

    def forget(self, peer: int, tag: Tag) -> None:
        """Nothing comes."""

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        """Nothing is under way."""


def posted(transport: Posted, wires: list[Tensor], fresh: list[Tensor], kind: int = ROUND) -> list[Tensor]:
    """What a round of three islands, or another exchange, hands over of wires that go to both others."""
    traffic = Traffic(transport, torch.device("cpu"))
    link = Link(0, 3, complete(0, 0, 3))

    def send() -> Iterator[None]:
        link.fresh += fresh
        for wire in wires:
            link.post(1, wire)
            link.post(2, wire)
        yield

    try:
        flight = Flight(send(), link, kind=kind, index=0, bucket=0, step=1)
        traffic.launch([flight])
        assert flight.error is None, flight.error
    finally:
        traffic.close(drain_s=1.0)
    return transport.wires


def test_wires_beside_the_rounds_go_as_they_are_where_they_lie_right_and_else_are_brought_there_once() -> None:
    kept = torch.full((8,), 2, dtype=torch.uint8)
    assert all(wire is kept for wire in posted(Posted("cpu"), [kept], [], MERGE))
    brought, again = posted(Posted("meta"), [kept], [], MERGE)
    assert brought is again
    assert brought.is_meta, "as a wire on a GPU is brought to the host"


def test_a_fresh_wire_goes_as_it_is_and_another_as_one_copy_for_all() -> None:
    fresh, kept = (torch.full((8,), n, dtype=torch.uint8) for n in (1, 2))
    a, b, c, d = posted(Posted("cpu"), [fresh, kept], [fresh])
    assert a is b is fresh
    assert c is d
    assert c is not kept
    assert c.data_ptr() != kept.data_ptr()
    assert torch.equal(c, kept)

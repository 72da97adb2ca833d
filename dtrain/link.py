"""What does an algorithm see of the network? One bucket's round: a mailbox, and its row of the mixing matrix.

The algorithm posts wires and says what it expects; then it yields, and when it is resumed the expected wires are
here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dtrain.codec import BoundCodec
from dtrain.topology import Round


class Rooms(Protocol):
    """Where wires lie that are written, or kept."""

    def room(self, wire: Tensor, codec: BoundCodec) -> Tensor:
        """See ``Link.room``."""
        ...

    def keep(self, wire: Tensor, room: Tensor) -> Tensor:
        """See ``Link.keep``."""
        ...


class _Own:
    """Each where it always lies: what is posted is copied there, and what arrives here."""

    def room(self, wire: Tensor, codec: BoundCodec) -> Tensor:
        return wire

    def keep(self, wire: Tensor, room: Tensor) -> Tensor:
        return room.copy_(wire)


_OWN = _Own()


@dataclass(frozen=True, slots=True)
class Peers:
    """This island's place among all islands."""

    node: int
    num_nodes: int
    unequal: tuple[int, ...] = ()
    """``shares`` where they are not all alike."""

    @property
    def shares(self) -> tuple[int, ...]:
        """How much each island counts in a mean over islands, in proportion."""
        return self.unequal or (1,) * self.num_nodes


@dataclass(slots=True)
class Link:
    """Valid for one round of one bucket."""

    node: int
    num_nodes: int
    row: Round
    round: int = 0
    """Its number: how many the bucket had before it."""
    outbox: list[tuple[int, Tensor]] = field(default_factory=list)
    expected: dict[int, int] = field(default_factory=dict)
    """peer -> bytes, of the phase that flies."""
    checks: dict[int, Callable[[Tensor], None]] = field(default_factory=dict)
    """peer -> what raises WireError where its wire is not what was agreed; run before anyone sees the wire."""
    inbox: dict[int, Tensor] = field(default_factory=dict)
    rooms: Rooms = _OWN
    wires_on: torch.device | None = None
    """Where wires that come are to lie; None: where the parameters are."""
    members: frozenset[int] | None = None
    """Whose wires the round takes, once that is decided; None: all that are expected."""
    keeps_nothing: bool = False
    """Whether what the round needs beside State is made for it and let go with it; else it is made once, and stays."""
    fresh: list[Tensor] = field(default_factory=list)
    """Wires of this phase that nobody writes again, and that may go as they are."""

    @property
    def left_out(self) -> bool:
        """Whether this island's own wire is not among them."""
        return self.members is not None and self.node not in self.members

    def awaited(self) -> tuple[int, ...]:
        """The peers whose wires this phase cannot do without."""
        peers = tuple(self.expected)
        return peers if self.members is None else tuple(peer for peer in peers if peer in self.members)

    def others(self) -> list[int]:
        """All but this one, in an order that starts behind it, so that not everyone sends to island 0 first."""
        return [(self.node + k) % self.num_nodes for k in range(1, self.num_nodes)]

    def post(self, peer: int, wire: Tensor) -> None:
        """Send one wire to a peer in this phase; it may be written again after the next yield."""
        self.outbox.append((peer, wire))

    def expect(self, peer: int, wire_bytes: int, check: Callable[[Tensor], None] | None = None) -> None:
        """Say that a peer posts wire_bytes to us in this phase, which ``check`` accepts."""
        self.expected[peer] = wire_bytes
        if check is not None:
            self.checks[peer] = check

    def received(self, peer: int) -> Tensor:
        """The wire a peer posted in the phase that just ended; copy what must outlast the next yield."""
        return self.inbox[peer]

    def room(self, wire: Tensor, codec: BoundCodec) -> Tensor:
        """Where to write the next wire instead of this one, which peers may still read. Whoever asks, asks each time, and puts
        what it is given in place of it in State."""
        return self.rooms.room(wire, codec)

    def keep(self, peer: int, room: Tensor) -> Tensor:
        """``received``, once, to stay in State, in ``room`` or in place of it; it must not be written to."""
        return self.rooms.keep(self.inbox.pop(peer), room)

    def new_phase(self) -> None:
        self.outbox, self.expected, self.checks, self.fresh = [], {}, {}, []

    def let_go(self) -> None:
        """The wires that came were read, and those that go are others' to keep."""
        self.outbox, self.inbox, self.fresh = [], {}, []


def carried(part: Iterator[None], own: Link, over: Link, nodes: Sequence[int]) -> Iterator[None]:
    """Run what talks over ``own``, a link of a few of an ``over``'s nodes, over that one. ``nodes``: the few, by their numbers
    there, in the order of their numbers here."""
    flies = True
    while flies:
        flies = next(part, over) is not over
        for peer, wire in own.outbox:
            over.post(nodes[peer], wire)
        over.fresh += own.fresh
        own.let_go()
        for peer, wire_bytes in own.expected.items():
            over.expect(nodes[peer], wire_bytes, own.checks.get(peer))
        if flies:
            yield
            own.inbox = {peer: over.received(nodes[peer]) for peer in own.expected}
            own.new_phase()

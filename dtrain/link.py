"""What does an algorithm see of the network? One bucket's round: a mailbox, and its row of the mixing matrix.

The algorithm posts wires and says what it expects; then it yields, and when it is resumed the expected wires are
here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from dtrain.topology import Round


@dataclass(frozen=True, slots=True)
class Peers:
    """This island's place among all islands."""

    node: int
    num_nodes: int


@dataclass(slots=True)
class Link:
    """Valid for one round of one bucket."""

    node: int
    num_nodes: int
    row: Round
    outbox: list[tuple[int, Tensor]] = field(default_factory=list)
    expected: dict[int, int] = field(default_factory=dict)
    """peer -> bytes, of the phase that flies."""
    checks: dict[int, Callable[[Tensor], None]] = field(default_factory=dict)
    """peer -> what raises WireError where its wire is not what was agreed; run before anyone sees the wire."""
    inbox: dict[int, Tensor] = field(default_factory=dict)

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

    def new_phase(self) -> None:
        self.outbox, self.expected, self.checks = [], {}, {}

"""What must a transport do? Carry named bytes between islands; one peer's trouble is never another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

START, ROUND, MERGE = 0, 1, 2
"""Kinds of exchange, counted apart."""


Left = Callable[[], Set[int]]
"""The peers that have ended and take no wire any more, as of now."""

OWN_WORK_S = 5.0
"""How long a close waits for a thread that is at work, even one that drains nothing. A thread that is inside torch when the
interpreter ends aborts the process in place of its exit status (Python before 3.14 unwinds it through C++)."""

_POLL_S = 0.25


def nobody() -> Set[int]:
    return frozenset()


class Tag(NamedTuple):
    """The name of one wire between two islands; at most one with a name is ever under way."""

    kind: int
    round: int
    bucket: int
    phase: int


class Inbox:
    """Wires that have arrived and peers that are gone; filled by a transport's threads, emptied by the engine."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._wires: dict[tuple[int, Tag], Tensor] = {}
        self._unwanted: set[tuple[int, Tag]] = set()
        self._lost: dict[int, str] = {}

    def deliver(self, peer: int, tag: Tag, wire: Tensor) -> None:
        with self.changed:
            if (peer, tag) in self._unwanted:
                self._unwanted.remove((peer, tag))
                return
            self._wires[peer, tag] = wire
            self.changed.notify_all()

    def discard(self, peer: int, tag: Tag) -> None:
        """Throw a wire away that is here, or as soon as it is."""
        with self.changed:
            if self._wires.pop((peer, tag), None) is None:
                self._unwanted.add((peer, tag))

    def lose(self, peer: int, reason: str) -> None:
        with self.changed:
            self._lost.setdefault(peer, reason)
            self.changed.notify_all()

    def has(self, peer: int, tag: Tag) -> bool:
        return (peer, tag) in self._wires

    def pop(self, peer: int, tag: Tag) -> Tensor:
        with self.changed:
            return self._wires.pop((peer, tag))

    def lost(self) -> dict[int, str]:
        with self.changed:
            return dict(self._lost)


class Transport(Protocol):
    inbox: Inbox
    wires_on: torch.device
    """Where a wire lies when it is posted, and when it has arrived."""

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        """Send a uint8 wire; returns at once. The wire must not be changed afterwards."""
        ...

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        """Make ready to receive; the wire will appear in the inbox."""
        ...

    def forget(self, peer: int, tag: Tag) -> None:
        """An expected wire will not come; those expected after it still may."""
        ...

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        """Wait at most drain_s for what was posted to leave, but not for wires to peers that have left; then let go
        of the peers."""
        ...


def join_sender(thread: threading.Thread, peer: int, until: float, left: Left) -> None:
    """Wait for a thread that sends to a peer and was told to end. A wire that the peer never asked for would keep it
    for good."""
    while thread.is_alive():
        thread.join(timeout=min(_POLL_S, max(0.0, until - time.monotonic())))
        if time.monotonic() >= until or (thread.is_alive() and peer in left()):
            return

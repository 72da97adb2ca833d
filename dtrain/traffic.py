"""Who moves the flights while the model trains? One thread that resumes each flight as soon as its wires are here."""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtrain.core import Flight
from dtrain.errors import WireError
from dtrain.spans import mark
from dtrain.staging import Pool
from dtrain.topology.row import pair
from dtrain.transport.base import MERGE, OWN_WORK_S, ROUND, START, Left, Tag, Transport, nobody
from dtrain.wire import refuse_non_finite

Name = tuple[int, Tag]
"""Of a wire that is waited for: who sends it, and its tag."""


@dataclass(slots=True)
class ByteCount:
    """Payload bytes of this rank by kind of exchange."""

    sent: dict[int, int]
    received: dict[int, int]
    near: int = 0
    """Of the rounds' sent ones, those to islands of one's own group."""


class Traffic:
    """Launches flights over a transport, resumes them in the background, counts their bytes."""

    def __init__(self, transport: Transport, device: torch.device, group: Container[int] = ()) -> None:
        """``group``: islands to which bytes are counted apart."""
        self.bytes = ByteCount(dict.fromkeys((START, ROUND, MERGE), 0), dict.fromkeys((START, ROUND, MERGE), 0))
        self._transport, self._group = transport, group
        self._inbox = transport.inbox
        self._device = device
        self._staging = Pool(transport.wires_on)
        self._taken = {place: Pool(place) for place in (device, torch.device("cpu"))}
        # What the caller queued on its stream is done before a wire is read, and it reads what this thread decoded after it.
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._active: list[Flight] = []
        self._resumed: Flight | None = None
        """What the thread is resuming, and posting the wires of."""
        self._open = True
        self._thread = threading.Thread(target=self._run, name="dtrain-traffic", daemon=True)
        self._thread.start()

    def launch(self, flights: Sequence[Flight]) -> None:
        """Run each flight to its first yield here, on the caller's thread, and post its wires."""
        if self._stream is not None:
            self._stream = torch.cuda.current_stream(self._device)
        for flight in flights:
            self._advance(flight)
        with self._inbox.changed:
            self._active += [f for f in flights if not f.done]
            self._inbox.changed.notify_all()

    def wait(self, flights: Sequence[Flight], timeout_s: float) -> bool:
        """Wait until all flights are done; False when timeout_s passed first."""
        with self._inbox.changed:
            return self._inbox.changed.wait_for(lambda: all(f.done for f in flights), timeout=timeout_s)

    def missing(self, flight: Flight) -> dict[Name, int]:
        """The wires that the flight still waits for, and their bytes."""
        with self._inbox.changed:
            names = [] if flight.done else [(peer, flight.tag()) for peer in flight.link.awaited()]
            expected = flight.link.expected
            return {name: expected.get(name[0], 0) for name in names if not self._inbox.has(*name)}

    @property
    def changed(self) -> threading.Condition:
        """Notified when a wire has arrived, and when a flight has moved on."""
        return self._inbox.changed

    def here(self, flights: Sequence[Flight]) -> frozenset[int]:
        """Peers all of whose wires of these flights have arrived; each flight expects them from the same."""
        with self._inbox.changed:
            peers = tuple(flights[0].link.expected)
            return frozenset(p for p in peers if all(self._inbox.has(p, f.tag()) for f in flights))

    def decide(self, flights: Sequence[Flight], members: frozenset[int]) -> None:
        """Flights that waited for it take the wires of these islands, and no others."""
        with self._inbox.changed:
            for flight in flights:
                flight.link.members, flight.undecided = members, False
            self._inbox.changed.notify_all()

    def lost(self) -> dict[int, str]:
        return self._inbox.lost()

    def meet(self, flights: Sequence[Flight], number: int, peer: int) -> None:
        """Flights that waited for a partner have one, and the meeting's number."""
        with self._inbox.changed:
            for flight in flights:
                flight.link.row, flight.index, flight.matched = pair(peer), number, True
            self._inbox.changed.notify_all()

    def drop(self, flights: Sequence[Flight]) -> None:
        """Give up those that are not done. Afterwards they write nothing, post nothing and expect nothing."""
        with self._inbox.changed:
            self._inbox.changed.wait_for(lambda: self._resumed not in flights)
            for flight in [f for f in flights if not f.done]:
                for peer in flight.link.expected:
                    if not self._inbox.has(peer, flight.tag()):
                        self._transport.forget(peer, flight.tag())
                flight.drop()
            self._active = [f for f in self._active if not f.done]
            self._inbox.changed.notify_all()

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        with self._inbox.changed:
            self._open = False
            self._inbox.changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=max(drain_s, OWN_WORK_S))
        self._transport.close(drain_s=drain_s, left=left)

    def _run(self) -> None:
        # A new thread multiplies matrices with as many threads as there are cores, until torch tells it otherwise. This does so:
        # products have other bits with another number, and a resumed round would have other ones than one that was not.
        torch.get_num_threads()
        while True:
            with self._inbox.changed:
                self._inbox.changed.wait_for(lambda: not self._open or any(self._ready(f) for f in self._active))
                if not self._open:
                    return
                ready = [f for f in self._active if self._ready(f)]
            for flight in ready:
                if not self._open:
                    return
                self._resume(flight)

    def _resume(self, flight: Flight) -> None:
        with self._inbox.changed:
            if flight.done:  # it was dropped
                return
            self._resumed = flight
        with torch.cuda.stream(self._stream):
            self._advance(flight)
        with self._inbox.changed:
            self._resumed = None
            self._active = [f for f in self._active if not f.done]
            self._inbox.changed.notify_all()

    def _ready(self, flight: Flight) -> bool:
        if flight.done or not flight.matched or flight.undecided:
            return False
        return all(self._inbox.has(peer, flight.tag()) for peer in flight.link.awaited())

    @torch.no_grad()
    def _advance(self, flight: Flight) -> None:
        """Hand over what arrived, resume, post what comes out. Runs until wires are awaited or the flight is done."""
        link = flight.link
        try:
            while not flight.done:
                link.inbox = {peer: self._take(flight, peer) for peer in link.awaited()}
                if link.members is not None:
                    for peer in link.expected.keys() - link.members:
                        self._inbox.discard(peer, flight.tag())
                received_bytes = sum(w.numel() for w in link.inbox.values())
                self._count(self.bytes.received, flight.kind, received_bytes)
                flight.advance()
                sent_bytes = sum(wire.numel() for _, wire in link.outbox)
                self._post(flight)
                link.let_go()
                for peer, wire_bytes in link.expected.items():
                    self._transport.expect(peer, flight.tag(), wire_bytes)
                if flight.matched:
                    mark(
                        *(flight.kind, flight.index, flight.bucket),
                        sent_bytes=sent_bytes, received_bytes=received_bytes, done=flight.done,
                    )  # fmt: skip
                if link.expected or not flight.matched:
                    return
        except Exception as e:  # noqa: BLE001  (raised again by who waits for the flight; a dead thread would hang it)
            flight.error = e
            flight.done = True

    def _take(self, flight: Flight, peer: int) -> Tensor:
        """A wire that arrived, on this rank's device or where the link wants it; raises WireError before anyone has seen it
        where it is not what was agreed."""
        wire = self._inbox.pop(peer, flight.tag())
        if peer in flight.link.checks:
            host = wire.cpu()
            try:
                flight.link.checks[peer](host)
            except WireError as e:
                raise WireError(f"island {peer} sent, for bucket {flight.bucket}, {e}") from None
        place = flight.link.wires_on or self._device
        if wire.device == place:
            return wire
        there = self._taken[place].take(wire.numel()) if flight.kind == ROUND else torch.empty_like(wire, device=place)
        return there.copy_(wire)

    def _post(self, flight: Flight) -> None:
        """Send copies, so that a wire can be written again while an earlier one still leaves; one copy serves all peers. What is
        not written again goes as it is, if it lies where the transport takes it."""
        copies: dict[int, Tensor] = {}
        as_they_are = {id(wire) for wire in flight.link.fresh if wire.device == self._transport.wires_on}
        for peer, wire in flight.link.outbox:
            if id(wire) not in copies:
                # Exchanges beside the rounds are as long as the model and rare: no buffer is kept for them.
                copied = flight.kind == ROUND and id(wire) not in as_they_are
                copies[id(wire)] = self._staging.take(wire.numel()).copy_(wire) if copied else wire.to(self._transport.wires_on)
                refuse_non_finite(copies[id(wire)])
            self._transport.post(peer, flight.tag(), copies[id(wire)])
            self._count(self.bytes.sent, flight.kind, wire.numel())
            if flight.kind == ROUND and peer in self._group:
                with self._inbox.changed:
                    self.bytes.near += wire.numel()

    def _count(self, counts: dict[int, int], kind: int, wire_bytes: int) -> None:
        """Rounds start on the caller's thread while others go on in the background, so both count."""
        with self._inbox.changed:
            counts[kind] += wire_bytes

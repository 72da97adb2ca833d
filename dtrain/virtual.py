"""How are a thousand islands run on one core, or each of a few? Their Cores in turn, on a virtual clock, without a thread.

Each island lives through the steps that ``Sync`` has (engine.py): compute; land what is due, and wait for it; exchange gradients,
and wait; update; start the rounds that are due. In an idle step it does not compute, nor update. Its flights go on as soon as
their wires are there, as ``Traffic``'s thread lets them, also while it computes. Wires arrive when the link model says; a method
that asks for room is spared copies of them (virtual_wires.py). Only computing and the link take time; encoding, mixing and
updates take none. What an island does to its parameters does not depend on when wires come, so they are those of live islands bit
for bit. No wire leaves the machine, so checksums are neither written nor read."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain.assemble import Plan, cut
from dtrain.bucket import flatten
from dtrain.core import Core, Flight, Lane
from dtrain.errors import PeerLost, WireError
from dtrain.link import Peers
from dtrain.moments import Unmade
from dtrain.virtual_clock import VirtualClock
from dtrain.virtual_link import VirtualLink
from dtrain.virtual_problem import Problem
from dtrain.virtual_wires import SharedWires
from dtrain.wire import without_checksums

Shapes = Sequence[tuple[str, tuple[int, ...]]]
"""The parameters: a model's, or a single flat one."""
Key = tuple[int, int, int, int]
"""The name of a wire that an island receives: peer, round, bucket, phase."""

_WAIT = -1.0
_COLLECT_AT = 100_000
"""Objects more than were freed; at Python's 700, a collection came every 100 rounds of an island."""


@dataclass(slots=True)
class Account:
    """What one island has spent."""

    ended_s: float = 0.0
    compute_s: float = 0.0
    waited_s: float = 0.0
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    rounds: int = 0
    """That landed, or rewrote gradients; one a bucket."""


class Away(NamedTuple):
    """A wire to an island that does not live here."""

    arrival_s: float
    peer: int
    key: Key
    wire: Tensor


class Stuck(NamedTuple):
    """An island that waits for a wire that nobody posts."""

    node: int
    error: PeerLost


class _Missing:
    """A flight, and how many wires it still waits for."""

    __slots__ = ("flight", "wires")

    def __init__(self, flight: Flight) -> None:
        self.flight, self.wires = flight, 0


class _Island:
    __slots__ = (
        *("account", "awaited", "core", "g", "inbox", "life", "node", "wait_began_s", "waiting", "x"),
    )

    def __init__(self, node: int, core: Core, x: Tensor, g: Tensor, account: Account) -> None:
        self.node, self.core, self.x, self.g, self.account = node, core, x, g, account
        self.life: Iterator[float] = iter(())
        self.inbox: dict[Key, Tensor] = {}
        self.awaited: dict[Key, _Missing] = {}
        """Wires that have not come, and who waits for them."""
        self.waiting: set[Flight] = set()
        """Flights without which the island does not go on."""
        self.wait_began_s = 0.0


class Simulation:
    """N islands over flat fp32 parameters, after step ``first_step``; ``run`` once, then read ``accounts`` and ``parameters``."""

    def __init__(
        self,
        plan: Plan,
        num_islands: int,
        shapes: Shapes,
        problem: Problem,
        *,
        lr: float,
        link: VirtualLink,
        compute_s: Callable[[int], float],
        first_step: int = 0,
        nodes: Sequence[int] | None = None,
    ) -> None:
        """``compute_s``: island -> seconds that its next step takes. ``nodes``: islands that live here, in order; None: all."""
        self.clock = VirtualClock()
        self._plan, self._problem, self._lr = plan, problem, lr
        self._link, self._compute_s = link, compute_s
        self._wires: defaultdict[int, SharedWires] = defaultdict(SharedWires)
        """By bucket."""
        self.away: list[Away] = []
        """Posted to islands that do not live here; whoever takes them along says so (``sent``)."""
        with without_checksums(), frozen():
            here = range(num_islands) if nodes is None else nodes
            self._islands = {node: self._island(node, num_islands, shapes) for node in here}
        if first_step:
            self._start_after(first_step)

    @property
    def nodes(self) -> list[int]:
        """The islands that live here."""
        return list(self._islands)

    @property
    def accounts(self) -> list[Account]:
        return [island.account for island in self._islands.values()]

    @property
    def parameters(self) -> list[Tensor]:
        """Each island's, flat."""
        return [island.x for island in self._islands.values()]

    @torch.no_grad()
    def run(self, steps: int) -> float:
        """All islands to the end of step ``steps``, then what flies lands; returns the virtual seconds until the last wire of
        a round is there.

        Raises PeerLost where a method waits for a wire that nobody posts, and NonFinite."""
        self.begin(steps)
        with frozen():
            self.clock.run()
        if (stuck := self.stuck()) is not None:
            raise stuck.error
        return max(account.ended_s for account in self.accounts)

    def begin(self, steps: int) -> None:
        """Put all islands on the clock, for steps up to ``steps``."""
        for island in self._islands.values():
            island.life = self._life(island, steps)
            self.clock.at(0.0, island.node, self._go_on, island)

    def _island(self, node: int, num_islands: int, shapes: Shapes) -> _Island:
        flat = flatten((name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes)
        (x,) = flat.storages
        g = torch.zeros(x.numel() if self._problem.moves or self._plan.rewrites_gradients else 0)
        buckets = cut(self._plan.recipe, flat, num_ranks=1, with_grad=False)
        if self._plan.rewrites_gradients:
            starts = [b.layout.spans[0].global_offset for b in buckets]
            buckets = [replace(b, g=g[at : at + b.x.numel()]) for at, b in zip(starts, buckets, strict=True)]
        if self._plan.recipe.moments is not None:  # nothing trains here that has any
            buckets = [replace(b, moments=Unmade(len(b.layout.spans))) for b in buckets]
        x.copy_(self._problem.start)
        core = Core(self._plan, buckets, Peers(node, num_islands, self._plan.pace.shares))
        if (apart := self._problem.apart(node)) is not None:
            x.copy_(apart)
        return _Island(node, core, x, g, Account())

    def _start_after(self, first_step: int) -> None:
        """Rounds have the numbers that they have in a run from step 0, as a round's peers follow from its number. What flew then
        is not there: it lands, and is waited for, in nobody's account."""
        core = next(iter(self._islands.values())).core
        exchanged = first_step if self._plan.exchanges(core.peers.num_nodes) else 0
        begun = [
            sum(core.starts(lane, step) for step in range(1, first_step + 1)) + (exchanged if lane.algorithm.grad else 0)
            for lane in core.lanes
        ]
        for island in self._islands.values():
            island.core.step = first_step
            for lane, number in zip(island.core.lanes, begun, strict=True):
                lane.round = number

    # ---- an island's own order of things

    def _life(self, island: _Island, steps: int) -> Iterator[float]:
        """Yields the seconds to compute, or _WAIT."""
        core, account, node, x, g = island.core, island.account, island.node, island.x, island.g
        moves, at_once = self._problem.moves, self._plan.delay_steps == 0
        exchanges = self._plan.exchanges(core.peers.num_nodes)
        for step in range(core.step + 1, steps + 1):
            trains = self._plan.pace.trains(node, step)
            if trains:
                seconds = self._compute_s(node)
                account.compute_s += seconds
                yield seconds
            if moves and trains:
                self._problem.gradient(node, x, g)
            if due := core.due(step):
                if _waits(island, due):
                    yield _WAIT
                self._land(island, due)
            if exchanges:
                flights = core.start_gradients()
                self._launch(island, flights)
                island.waiting = {flight for flight in flights if not flight.done}
                if island.waiting:
                    yield _WAIT
                account.rounds += len(flights)
            if moves and trains:
                x.add_(g, alpha=-self._lr)
            core.step = step
            self._launch(island, core.start_rounds())
            if at_once and (due := core.due(step)):
                if _waits(island, due):
                    yield _WAIT
                self._land(island, due)
        if _waits(island, core.in_flight()):
            yield _WAIT
        account.ended_s = self.clock.now_s
        for step in range(core.step, core.step + core.delay_steps + 1):
            self._land(island, core.due(step))

    def _land(self, island: _Island, due: Sequence[Lane]) -> None:
        for lane in due:
            island.core.land(lane)
        island.core.adapt()
        island.account.rounds += len(due)

    def _go_on(self, island: _Island) -> None:
        seconds = next(island.life, None)
        if seconds is None:
            return
        if seconds == _WAIT:
            island.wait_began_s = self.clock.now_s
        else:
            self.clock.at(self.clock.now_s + seconds, island.node, self._go_on, island)

    # ---- wires

    def _launch(self, island: _Island, flights: Sequence[Flight]) -> None:
        for flight in flights:
            flight.link.rooms = self._wires[flight.bucket]
            self._advance(island, flight)

    def _advance(self, island: _Island, flight: Flight) -> None:
        """As ``Traffic``: hand over what arrived, resume, post what comes out, until wires are awaited or the flight is done."""
        link, inbox, index, bucket = flight.link, island.inbox, flight.index, flight.bucket
        while not flight.done:
            for peer, wire_bytes in link.expected.items():
                wire = link.inbox[peer] = inbox.pop((peer, index, bucket, flight.phase))
                if wire.numel() != wire_bytes:
                    raise WireError(f"island {peer} sent, for bucket {bucket}, {wire.numel()} bytes, not {wire_bytes}")
                island.account.wire_bytes_received += wire_bytes
            flight.advance()
            if link.outbox:
                self._post(island, flight)
            if link.inbox:  # what the method did not keep
                for wire in link.inbox.values():
                    self._wires[bucket].drop(wire)
                link.inbox = {}
            if link.expected and not flight.done:
                missing, phase = _Missing(flight), flight.phase
                for peer in link.expected:
                    if (key := (peer, index, bucket, phase)) not in inbox:
                        island.awaited[key] = missing
                        missing.wires += 1
                if missing.wires:
                    return

    def _post(self, island: _Island, flight: Flight) -> None:
        """One copy, where there has to be one, serves all peers."""
        outbox, wires, node, islands = flight.link.outbox, self._wires[flight.bucket], island.node, self._islands
        if len(outbox) == 1:
            ((_, wire),) = outbox
            lent = {id(wire): wires.lend(wire, 1)}
        else:
            receivers = Counter(id(wire) for _, wire in outbox)
            posted = {id(wire): wire for _, wire in outbox}
            lent = {key: wires.lend(wire, receivers[key]) for key, wire in posted.items()}
        name = (node, flight.index, flight.bucket, flight.phase)
        for peer, wire in outbox:
            wire_bytes = wire.numel()
            island.account.wire_bytes_sent += wire_bytes
            arrival_s = self._link.arrival_s(self.clock.now_s, node, peer, wire_bytes)
            island_there = islands.get(peer)
            if island_there is None:
                self.away.append(Away(arrival_s, peer, name, lent[id(wire)]))
            else:
                self.clock.at(arrival_s, node, self._arrive, (island_there, name, lent[id(wire)]))

    def _arrive(self, wire: tuple[_Island, Key, Tensor]) -> None:
        island, key, content = wire
        island.inbox[key] = content
        missing = island.awaited.pop(key, None)
        if missing is None:  # its round has not begun here
            return
        missing.wires -= 1
        if missing.wires:
            return
        flight = missing.flight
        self._advance(island, flight)
        if flight.done and flight in island.waiting:
            island.waiting.discard(flight)
            if not island.waiting:
                island.account.waited_s += self.clock.now_s - island.wait_began_s
                self._go_on(island)

    def stuck(self) -> Stuck | None:
        """The first island that waits, when no event is left."""
        for island in self._islands.values():
            if island.awaited:
                peers = sorted({peer for peer, *_ in island.awaited})
                said = f"island {island.node} expects a wire from it in step {island.core.step}, and none was posted"
                return Stuck(island.node, PeerLost(peers, said))
        return None

    # ---- wires to and from islands that do not live here

    def sent(self, key: Key, wire: Tensor, receivers: int) -> None:
        """Its bytes have left for so many islands, which hold it no more."""
        for _ in range(receivers):
            self._wires[key[2]].drop(wire)

    def place(self, key: Key, wire_bytes: int, receivers: int) -> Tensor:
        """Where to write a wire that comes from elsewhere, for so many islands."""
        return self._wires[key[2]].place(wire_bytes, receivers)

    def receive(self, arrival_s: float, peer: int, key: Key, wire: Tensor) -> None:
        self.clock.at(arrival_s, key[0], self._arrive, (self._islands[peer], key, wire))


@contextmanager
def frozen() -> Iterator[None]:
    """Python's collector looks at nothing that was made before, and seldom at what is made now: a thousand islands have thousands
    of flights and wires under way at any time, none of them garbage."""
    kept = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AT, *kept[1:])
    try:
        yield
    finally:
        gc.set_threshold(*kept)
        gc.unfreeze()


def _waits(island: _Island, lanes: Sequence[Lane]) -> bool:
    """Whether the island has to wait until the rounds of these lanes are here."""
    for lane in lanes:
        if lane.flight is not None and not lane.flight.done:
            island.waiting.add(lane.flight)
    return bool(island.waiting)

"""How does an island wait for the others? Visibly, with a limit, and all its ranks with one outcome.

A lost island is waited for up to ``timeout_s``: it may be started again, and then everyone regroups. One that ended
its loop is not: the rounds that are still under way are dropped, no more are started, and training goes on. Where a round need
not wait for all, it goes on without those that are gone as long as a quorum is left (``roll_call.py``).

The limit is on silence, not on an exchange, which may take as long as its bytes do: each wire that is waited for begins it anew,
whoever sent it, as an island's uplink carries what others wait for too. How far a wire is that is under way cannot be seen. So
one alone must take less than the limit: on a link that needs longer for a bucket, raise link.timeout_s or lower bucket_bytes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dtrain import units
from dtrain.connect import Connection
from dtrain.core import Flight
from dtrain.errors import NonFinite, PeerLost, Regroup
from dtrain.membership import SAY_EVERY_S, Notice
from dtrain.spans import span
from dtrain.traffic import Name, Traffic
from dtrain.transport.base import MERGE, ROUND, START

if TYPE_CHECKING:
    from dtrain.roll_call import RollCall

log = logging.getLogger("dtrain")

BYTE_KEYS = ("sent", "received", "start", "merge", "sent_near")
ROUND_KEYS = ("rounds_joined", "rounds_left_out")

_OK, _LEFT, _LOST, _NON_FINITE, _REGROUP = range(5)
"""What a rank saw while it waited; the highest that any rank saw is the island's outcome."""
_POLL_S = 0.25
"""How often a wait looks for peers that left or came back; a healthy round on a fast link is over sooner."""


class Stats(NamedTuple):
    """Cumulative counts of the whole island."""

    step: int
    wait_s: float
    wire_bytes_sent: int
    wire_bytes_received: int
    wire_bytes_start: int
    wire_bytes_merge: int
    wire_bytes_sent_near: int
    """Of wire_bytes_sent, to islands of one's own group; 0 in a job without levels."""
    rounds_joined: int | None = None
    """Of which the island was a member, where a quorum is enough; None where each round waits for all islands."""
    rounds_left_out: int | None = None
    """That went on without it, there."""

    @property
    def wire_bytes_sent_far(self) -> int:
        return self.wire_bytes_sent - self.wire_bytes_sent_near


class _Silence:
    """For how long has nothing been heard of an island that is waited for? While wires come it is only slow, and so is one that
    is still on its way to an exact average and shows life, as an island may be where pairs meet when both are ready."""

    def __init__(self) -> None:
        self._heard_at = time.monotonic()
        """When the last wire came, or the last of those on their way showed life; who had come before could not be heard of."""
        self._awaited: Set[Name] | None = None
        self._beats: dict[int, int] = {}
        self._alive_at: dict[int, float] = {}

    def of_s(self, awaited: Set[Name], coming: Mapping[int, int]) -> dict[int, float]:
        """By island. ``awaited``: wires that have not come; ``coming``: how often each of those that are on their way has shown
        life so far."""
        now = time.monotonic()
        if self._awaited is not None and awaited != self._awaited:
            self._heard_at = now
        self._awaited = frozenset(awaited)
        for n, shown in coming.items():
            if self._beats.get(n) != shown:
                self._beats[n], self._alive_at[n], self._heard_at = shown, now, now
        return {n: now - (self._alive_at[n] if n in coming else self._heard_at) for n, _ in awaited}


class Wait:
    """Waits for flights and remembers for how long, and how many bytes the island had moved by then."""

    def __init__(self, connection: Connection, traffic: Traffic) -> None:
        self.waited_s = 0.0
        self.peer_left = False
        self.roll_call: RollCall | None = None
        """Where rounds need not wait for all islands."""
        self._connection = connection
        self._ranks = connection.ranks
        self._traffic = traffic
        self._totals = [0.0] * len(BYTE_KEYS)
        self._rounds = dict.fromkeys(ROUND_KEYS, 0)
        self._last_round = 0
        """The step after which the newest round started that is counted in them."""
        self._base: dict[str, float] = {}
        """What a run that this one goes on with had counted."""

    def stats(self, step: int) -> Stats:
        """Counts so far, of the whole island: bytes that were posted, and with several ranks those as of the last wait, when they
        were added up."""
        counts = self._counts()
        return Stats(step, counts["wait_s"], *(int(counts[k]) for k in (*BYTE_KEYS, *ROUND_KEYS) if k in counts))

    def _counts(self) -> dict[str, float]:
        own = {**self.island_bytes(), "wait_s": self.waited_s} | ({} if self.roll_call is None else self._rounds)
        return {k: n + self._base.get(k, 0) for k, n in own.items()}

    def state_dict(self) -> dict[str, Tensor]:
        counts = self._counts()
        return {f"{self._prefix}{k}": torch.tensor(float(v), dtype=torch.float64) for k, v in counts.items()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        self._base = {k.removeprefix(self._prefix): float(v) for k, v in saved.items() if k.startswith(self._prefix)}

    @property
    def _prefix(self) -> str:
        return f"counts{self._ranks.rank}."

    def all(self, step: int, merges: int, flights: Sequence[Flight]) -> None:
        """Wait until the flights of every rank of the island are done; every rank calls this, also without flights.

        Raises PeerLost, Regroup, NonFinite or WireError; where one rank does, all do. What else went wrong in a flight
        is raised as it was.
        """
        begun = time.monotonic()
        problem: Exception | None = None
        try:
            self.own(step, merges, flights)
        except (PeerLost, Regroup) as e:
            problem = e
        problem = problem or next((f.error for f in flights if f.error is not None), None)
        if self._ranks.num_ranks > 1:
            problem = self._agree(problem)
            self._totals = self._ranks.total(self._own_bytes())
        self.waited_s += time.monotonic() - begun
        if isinstance(problem, NonFinite):
            raise NonFinite(
                f"step {step}: {problem}; the loss has diverged: lower the learning rate, or clip"
            ) from problem
        if problem is not None:
            raise problem
        self._count_rounds(flights)

    def _count_rounds(self, flights: Sequence[Flight]) -> None:
        """Each that has members once, though it is of several buckets, and may be waited for before it lands and there again."""
        for flight in sorted(flights, key=lambda f: f.step):
            if flight.link.members is not None and not flight.dropped and flight.step > self._last_round:
                self._last_round = flight.step
                self._rounds["rounds_left_out" if flight.link.left_out else "rounds_joined"] += 1

    def own(self, step: int, merges: int, flights: Sequence[Flight]) -> None:
        """Wait for this rank's flights alone. ``merges``: exact averages this island has done."""
        membership, timeout_s = self._connection.membership, self._connection.timeout_s
        begun, say_at_s, silence = time.monotonic(), SAY_EVERY_S, _Silence()
        all_here_at = math.inf
        if self.roll_call is not None:
            self.roll_call.need(flights, merges)
        while not self._traffic.wait(flights, _POLL_S):
            membership.check_regroup()
            waited_s = time.monotonic() - begun
            notices = membership.notices()
            spared = self._spared(flights, notices, merges)
            awaited = {
                (n, tag): wire_bytes
                for f in flights for (n, tag), wire_bytes in self._traffic.missing(f).items() if n not in spared[f]
            }  # fmt: skip
            missing = tuple(sorted({n for n, _ in awaited}))
            all_here_at = math.inf if missing else min(all_here_at, time.monotonic())
            if not missing:  # what is decided is this island's own work, which ends or fails
                if any(f.undecided and not f.done for f in flights) and time.monotonic() - all_here_at > timeout_s:
                    raise PeerLost(self._others, f"nothing came through the meeting point for {timeout_s:g} s")
                continue
            failed = [n for n in missing if n in notices and notices[n].failed]
            if failed and not membership.failed_may_return:
                raise PeerLost(failed, f"it failed after step {notices[failed[0]].step}")
            averages = [f.index for f in flights if f.kind == MERGE and not f.done]
            gone = [n for n in missing if n in notices and any(notices[n].misses_merge(index) for index in averages)]
            if gone:
                raise PeerLost(
                    gone, f"it left the job after step {notices[gone[0]].step}, and this island averages models with it"
                )
            silent_s = silence.of_s(awaited.keys(), self._coming(missing, notices, averages))
            ended = {n: notice for n, notice in notices.items() if notice.ends_rounds(merges)}
            beyond = [
                f for f in flights
                if not f.done and any(f.step > notice.step for n, notice in ended.items() if n not in spared[f])
            ]  # fmt: skip
            if beyond:
                self._say_left(step, ended)
                self._traffic.drop(beyond)
            elif late := [n for n, s in silent_s.items() if s > timeout_s]:
                raise PeerLost(late, self._of_silence(late, awaited))
            elif waited_s > say_at_s:
                self._connection.on_wait(missing, max(silent_s.values()), timeout_s)
                say_at_s = waited_s + SAY_EVERY_S

    def _of_silence(self, late: Sequence[int], awaited: Mapping[Name, int]) -> str:
        reasons = "; ".join(dict.fromkeys(text for n, text in self._traffic.lost().items() if n in late))
        said = f"nothing came from it for {self._connection.timeout_s:g} s"
        if reasons:
            return f"{said} ({reasons})"
        longest = units.show_bytes(max(wire_bytes for (n, _), wire_bytes in awaited.items() if n in late))
        return f"{said}; if its link needs longer for one wire of {longest}, raise link.timeout_s"

    def until(
        self, changed: threading.Condition, true: Callable[[], bool], missing: tuple[int, ...], else_said: str
    ) -> None:
        """Wait for another thread, which notifies ``changed``, where one can see it and no longer than for the link. Raises
        PeerLost: of these islands what ``else_said`` says."""
        connection, begun, say_at_s = self._connection, time.monotonic(), SAY_EVERY_S
        with span("wait"):
            while True:
                with changed:  # not while it is said: transports may need it
                    if changed.wait_for(true, timeout=_POLL_S):
                        break
                waited_s = time.monotonic() - begun
                if waited_s > connection.timeout_s:
                    raise PeerLost(missing, f"{else_said} for {connection.timeout_s:g} s")
                if waited_s > say_at_s:
                    connection.on_wait(missing, waited_s, connection.timeout_s)
                    say_at_s = waited_s + SAY_EVERY_S
        self.waited_s += time.monotonic() - begun

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(n for n in range(self._connection.num_nodes) if n != self._connection.node)

    def _spared(
        self, flights: Sequence[Flight], notices: Mapping[int, Notice], merges: int
    ) -> Mapping[Flight, frozenset[int]]:
        """Islands that each flight will come to its end without, though they have sent no wire. Raises what keeps islands from
        agreeing on them."""
        if self.roll_call is None:
            return dict.fromkeys(flights, frozenset())
        self.roll_call.raise_error()
        return {f: self.roll_call.spared(f, notices, merges) for f in flights}

    def _coming(self, missing: Sequence[int], notices: Mapping[int, Notice], averages: Sequence[int]) -> dict[int, int]:
        """Of the missing, those that have not come to the averages; and how often they have shown life, where islands do."""
        beats = self._connection.membership.beats() if averages else {}
        come = {n for n, notice in notices.items() if notice.merging and notice.merges >= min(averages, default=0)}
        return {n: beats[n] for n in missing if n in beats and n not in come}

    def island_bytes(self) -> dict[str, float]:
        """Payload bytes by BYTE_KEYS; with several ranks, as of the last wait, when they were added up."""
        return dict(zip(BYTE_KEYS, self._totals if self._ranks.num_ranks > 1 else self._own_bytes(), strict=True))

    def _own_bytes(self) -> list[float]:
        count = self._traffic.bytes
        return [count.sent[ROUND], count.received[ROUND], count.sent[START], count.sent[MERGE], count.near]

    def _agree(self, problem: Exception | None) -> Exception | None:
        worst = self._ranks.worst(self._seen(problem))
        self.peer_left = self.peer_left or worst >= _LEFT
        if worst == _REGROUP:  # before what this rank saw, as all ranks stand still for the others, or none does
            self._connection.membership.check_regroup()
        if problem is not None or worst <= _LEFT:
            return problem
        if worst == _NON_FINITE:
            return NonFinite("the payload of another rank of this island holds inf or NaN")
        return PeerLost((), "another rank of this island could not go on; see its log")

    def _seen(self, problem: Exception | None) -> int:
        match problem:
            case None:
                return _LEFT if self.peer_left else _OK
            case Regroup():
                return _REGROUP
            case NonFinite():
                return _NON_FINITE
            case _:
                return _LOST

    def _say_left(self, step: int, ended: Mapping[int, Notice]) -> None:
        if not self.peer_left:
            island, notice = min(ended.items(), key=lambda item: item[1].step)
            log.warning(
                "island %d %s after %d steps; this island, at step %d, goes on without further rounds: "
                "give all islands loops of one length",
                island,
                "ended its loop" if notice.final else "averages its model",
                notice.step,
                step,
            )
        self.peer_left = True

"""How do islands agree on a round's members without waiting for a slow one? A thread of its own says and hears the words.

The rule is ``quorum.py``'s; a round here is all flights that started after one step. They wait until it is decided
(``Flight.undecided``) and then for the members' wires alone: who said the word held them all, so they were sent. What comes from
others later is thrown away where it arrives.

Nobody is the one who decides. Whoever has all wires says so at once, mostly while the round flies; where some are missing,
whoever is the first to land the round does. So a slow island decides nothing late for others. It launches a round that was
decided without it as any other, and lands it as soon as it has the members' wires: it is at most ``quorum.MOST_MISSED`` rounds
behind, and as many rounds' wires wait for it.

Before a checkpoint, an exact average and the end a round is needed though its step has not come. The others have the time that
the steps until then would take (and half of the link's limit at most), so that it has the members that it would have had.

An island that ended its loop early is a member of no further round, and the others go on as long as a quorum is left; so they
do without one that failed and cannot come back, as among islands of one process. Under a launcher one that was lost may be
started again from a checkpoint, which is of all islands: whatever the others did after it would be done again. So they stand
still after the step in which they hear of it, with a quorum too, until all go back; or where it is not started again, up to the
link's limit. A member that failed before its wire had reached all ends those that lack it, by the rules of ``wait.py``.

Who is a member follows from whose wires come first, so a run in which some are left out is not repeated bit for bit. What flies
at a checkpoint is decided by then, and lands as it would have."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dtrain import quorum
from dtrain.connect import Connection
from dtrain.core import Core, Flight
from dtrain.meetings import Meetings
from dtrain.membership import HEARD_ALL, SAY_EVERY_S, Notice
from dtrain.quorum import Roll
from dtrain.traffic import Traffic
from dtrain.transport.base import OWN_WORK_S
from dtrain.wait import Wait
from dtrain.words import NOTHING

_FIRST_POLL_S, _LAST_POLL_S = 0.001, 0.1
"""Between two looks for words while a round is undecided, each twice as far from the last."""
_LOOK_S = 0.25
"""Between two looks at who is gone, while a round is needed."""
_STEPS_TIMED = 9
"""From whose median it is told how long the next ones take."""


@dataclass(slots=True)
class _Round:
    """That is not decided yet, as far as this island has heard."""

    flights: Sequence[Flight]
    needed: bool = False
    due_at: float = -math.inf
    """When it would land, where it is needed before: until then only all wires are enough."""
    quorum_at: float | None = None
    """When a quorum's wires were here first."""
    said: bool = False


class RollCall:
    """One island's part in deciding who is a member. All methods but the thread's are called by the loop's thread."""

    def __init__(self, core: Core, roll: Roll, grace_s: float, connection: Connection, traffic: Traffic, wait: Wait) -> None:
        self._core, self._roll, self._grace_s, self._traffic, self._wait = core, roll, grace_s, traffic, wait
        self._node, self._membership, self._timeout_s = connection.node, connection.membership, connection.timeout_s
        self._look_every_s = min(SAY_EVERY_S, connection.timeout_s / 4)
        """Who shows no life for timeout_s is lost."""
        self._changed = traffic.changed
        self._rounds: dict[int, _Round] = {}
        """By the steps after which they started."""
        self._notices: Mapping[int, Notice] = {}
        self._merges = 0
        """Exact averages that this island has done."""
        self._lost: tuple[int, ...] = ()
        self._stepped: tuple[float, float] | None = None
        """When the last step ended, and how long the island had waited by then; None where more than a step lies between."""
        self._steps_s = deque[float](maxlen=_STEPS_TIMED)
        self._heard = 0
        self._news = False
        """Whether the loop's thread wants something since the last look."""
        self._open = True
        self._error: Exception | None = None
        wait.roll_call = self
        self._thread = threading.Thread(target=self._run, name="dtrain-roll-call", daemon=True)
        self._thread.start()

    def after_step(self) -> Sequence[Flight]:
        """A step has ended: the rounds that start now; the caller launches them and calls ``ask``. Stands still where an island
        was lost. Raises Regroup, PeerLost, and what else kept the thread from its work."""
        self.raise_error()
        self._time_step()
        if lost := self._lost:
            self._wait.until(self._changed, self._goes_on, lost, "it was not started again")
            self.raise_error()
        return self._core.start_rounds()

    def ask(self, flights: Sequence[Flight]) -> None:
        """Flights that were launched: who are their members? Raises NonFinite, and what else kept one from its first part: who
        did not send all its wires is no member, and may have to wait for long until another says so."""
        failed = [flight for flight in flights if flight.error is not None]
        if failed:
            self._wait.all(self._core.step, self._merges, failed)
        if flights:
            with self._changed:
                self._rounds[flights[0].step] = _Round(flights)
                self._wake()

    def withdraw(self) -> None:
        """The loop is about to wait for what flies before its step has come. Nothing is taken back: a round that was launched is
        decided, though not earlier than it has to be for that."""
        step_s, self._stepped = median(self._steps_s or (0.0,)), None
        with self._changed:
            for step, one in self._rounds.items():
                left_s = (step + self._core.delay_steps - self._core.step) * step_s
                one.due_at = time.monotonic() + min(left_s, self._timeout_s / 2)  # at timeout_s who is missing is lost

    def need(self, flights: Sequence[Flight], merges: int) -> None:
        """The loop waits for them from now on."""
        with self._changed:
            self._merges = merges
            wanted = set(flights)
            for one in self._rounds.values():
                one.needed = one.needed or not wanted.isdisjoint(one.flights)
            self._wake()

    def spared(self, flight: Flight, notices: Mapping[int, Notice], merges: int) -> frozenset[int]:
        """Islands that a flight will not wait for: those that are no members; while that is open, those that are gone, unless no
        quorum is left without them."""
        members = flight.link.members
        if not flight.undecided:
            return frozenset() if members is None else frozenset(range(self._roll.num_islands)) - members
        gone = self._gone(flight.step, notices, merges)
        return gone if quorum.can_do_without(self._roll, gone) else frozenset()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(timeout=OWN_WORK_S)

    def _goes_on(self) -> bool:
        return not self._lost or self._error is not None

    def _time_step(self) -> None:
        now, waited_s = time.monotonic(), self._wait.waited_s
        if self._stepped is not None:
            began, waited_before_s = self._stepped
            self._steps_s.append(now - began - (waited_s - waited_before_s))
        self._stepped = now, waited_s

    def _wake(self) -> None:
        self._news = True
        self._changed.notify_all()

    def _gone(self, step: int, notices: Mapping[int, Notice], merges: int) -> frozenset[int]:
        may_return = self._membership.failed_may_return
        return frozenset(
            n for n, notice in notices.items()
            if (notice.failed and not may_return) or (notice.ends_rounds(merges) and notice.step < step)
        )  # fmt: skip

    # ---- the thread

    def _run(self) -> None:
        try:
            self._serve()
            self._membership.beat(HEARD_ALL)
        except Exception as e:  # noqa: BLE001  (raised again by the loop's next step; a dead thread would hang it)
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _serve(self) -> None:
        poll_s, looked_at = _FIRST_POLL_S, -math.inf
        while True:
            with self._changed:
                undecided, needed = bool(self._rounds), any(one.needed for one in self._rounds.values())
            if time.monotonic() - looked_at >= (min(_LOOK_S, self._look_every_s) if needed else self._look_every_s):
                self._look_around()
                looked_at = time.monotonic()
            with self._changed:
                self._changed.wait_for(
                    lambda: not self._open or self._news or self._sayable(), timeout=poll_s if undecided else self._look_every_s
                )
                if not self._open:
                    return
                poll_s = _FIRST_POLL_S if self._news or self._sayable() else min(2 * poll_s, _LAST_POLL_S)
                self._news = False
            self._hear()
            with self._changed:
                said = self._sayable()
                for step in said:
                    self._rounds[step].said = True
            for step, members in said.items():
                self._membership.words.say(quorum.word(step, members))
            if said:
                self._hear()

    def _look_around(self) -> None:
        self._membership.beat(self._heard)
        lost = self._membership.lost()
        self._membership.check_regroup()  # after it: who is started again is lost no more, and all are to regroup
        self._notices = self._membership.notices()
        with self._changed:
            self._lost = lost
            self._changed.notify_all()

    def _hear(self) -> None:
        """What is new; rounds that have members now go on."""
        words = self._membership.words.heard(self._heard)
        for told in words:
            if told != NOTHING:
                self._roll = quorum.heard(self._roll, told)
        self._heard += len(words)
        with self._changed:
            for step, one in list(self._rounds.items()):
                if step in self._roll.members:
                    self._traffic.decide(one.flights, self._roll.members[step])
                if step in self._roll.members or all(flight.done for flight in one.flights):  # given up
                    del self._rounds[step]

    def _sayable(self) -> dict[int, frozenset[int]]:
        """The rounds of which this island may say the members, and who they would be."""
        found, now = dict[int, frozenset[int]](), time.monotonic()
        for step, one in self._rounds.items():
            if one.said or any(flight.done for flight in one.flights):
                continue
            gone = self._gone(step, self._notices, self._merges)
            here = (self._traffic.here(one.flights) | {self._node}) - gone
            if one.quorum_at is None and len(here) >= self._roll.quorum:
                one.quorum_at = now
            is_due = one.needed and now >= one.due_at
            hurry = is_due and one.quorum_at is not None and now - one.quorum_at >= self._grace_s
            if quorum.may_say(self._roll, here, gone, hurry=hurry):
                found[step] = here
        return found


def agreement(core: Core, connection: Connection, traffic: Traffic, wait: Wait) -> Meetings | RollCall | None:
    """What decides with whom this island's rounds are, by words that all hear; None where that is not left open."""
    plan = core.plan
    if plan.graph is not None:
        return Meetings(core, plan.graph, connection, traffic, wait)
    if plan.quorum is not None:
        quorum.check_grace(plan.grace_s, connection.timeout_s)
        return RollCall(core, Roll(connection.num_nodes, plan.quorum), plan.grace_s, connection, traffic, wait)
    return None

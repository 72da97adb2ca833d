"""How does an island find somebody to meet without waiting for it? A thread of its own asks, and looks for the answer.

An island that is ready has encoded its wire and trains on; its flights wait for a partner (``Flight.matched``). When the
desk (``matchmaker.py``) has one, both islands' threads give the flights its number, and the traffic threads exchange the
wires, whatever the two islands compute just then. So a meeting that was given comes about without a step of either, and nobody
waits for another's steps: not in training, and not where all save a checkpoint at once. It lands before the first update at which
its wires are here. Before a checkpoint, an exact average and the end an island withdraws what nobody has answered, and waits for
the wires of what somebody has. Who ended meets nobody, and who has nobody left to meet trains on alone.

Once a second the thread shows life, so that others know a slow island from a lost one, and looks for islands that were lost:
after its step an island stands still then, until all go back to a checkpoint. In rounds that all share it would wait by itself.

Who meets whom follows from who is ready first, so a run is not repeated bit for bit. A checkpoint is of one step k of each
island, and of a meeting it may hold one side alone. After a resume only that side has moved, and the mean that meetings keep, of
x + a/2 over n islands, by (1/4 + alpha/2) m / n for each such meeting, m = C(x_j) - C(x_i) (``a2cid2_ready.py``). With equal
paces those are the few under way; with unequal ones every meeting between the first and the last island's step k may be
one-sided."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from dtrain import matchmaker
from dtrain.connect import Connection
from dtrain.core import Core, Flight
from dtrain.errors import PeerLost
from dtrain.matchmaker import Desk, Graph
from dtrain.membership import HEARD_ALL, SAY_EVERY_S
from dtrain.traffic import Traffic
from dtrain.transport.base import OWN_WORK_S
from dtrain.wait import Wait
from dtrain.words import NOTHING

_FIRST_POLL_S, _LAST_POLL_S = 0.001, 0.1
"""Between two looks for an answer, each twice as far from the last. A look through a meeting point on this host takes 0.1 ms."""


class Meetings:
    """One island's words at the desk. All methods but the thread's are called by the loop's thread."""

    def __init__(self, core: Core, graph: Graph, connection: Connection, traffic: Traffic, wait: Wait) -> None:
        self._core, self._graph, self._traffic, self._wait = core, graph, traffic, wait
        self._node, self._membership = connection.node, connection.membership
        self._others = tuple(n for n in range(connection.num_nodes) if n != connection.node)
        self._timeout_s = connection.timeout_s
        self._look_every_s = min(SAY_EVERY_S, connection.timeout_s / 4)
        """Who shows no life for timeout_s is lost."""
        self._changed = threading.Condition()
        self._asking: Sequence[Flight] = ()
        """Flights that wait for a partner."""
        self._word = ""
        self._desk = Desk()
        self._said, self._heard = 0, 0
        """The number of this island's last word, and of the last one that is in its desk."""
        self._number = 0
        """Of the newest meeting."""
        self._met: Sequence[Flight] = ()
        """Its flights."""
        self._met_at = 0.0
        self._alone = False
        self._lost: tuple[int, ...] = ()
        self._open = True
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="dtrain-meetings", daemon=True)
        self._thread.start()

    def after_step(self) -> Sequence[Flight]:
        """A step has ended: where nothing flies, what meets next; the caller launches it and calls ``ask``. Who still waits for a
        partner takes any from now on. Stands still where an island was lost. Raises Regroup, PeerLost, and what else kept the
        thread from its work."""
        self._raise_error()
        if self._lost:
            self._until(lambda: not self._lost, self._lost, "it was not started again")
        if self._alone:
            return ()
        with self._changed:
            if self._asking and not self._word:
                self._say("hurry")
        return self._core.start_rounds()

    def ask(self, flights: Sequence[Flight]) -> None:
        """Raises NonFinite, and what else kept a flight from its first part: nobody is to wait for it."""
        self._raise_failed(flights)
        if flights:
            with self._changed:
                self._asking = flights
                self._say("ask")

    def withdraw(self) -> None:
        """Afterwards what flies has a partner, whose wires are under way."""
        self._raise_failed([lane.flight for lane in self._core.in_flight() if lane.flight is not None])
        with self._changed:
            if self._asking:
                self._say("withdraw")
        self._until(lambda: not self._asking, self._others, "nothing came through the meeting point")
        for lane in self._core.in_flight():
            if lane.flight is not None and lane.flight.dropped:
                self._core.land(lane)

    def close(self) -> None:
        """Meet nobody any more, and tell the others."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(timeout=OWN_WORK_S)

    def _say(self, word: str) -> None:
        self._word = word
        self._changed.notify_all()

    def _until(self, true: Callable[[], bool], missing: tuple[int, ...], else_said: str) -> None:
        """Wait for the thread."""
        self._wait.until(self._changed, lambda: true() or self._error is not None, missing, else_said)
        self._raise_error()

    def _raise_failed(self, flights: Sequence[Flight]) -> None:
        failed = [flight for flight in flights if flight.error is not None]
        if failed:
            self._wait.all(self._core.step, 0, failed)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the thread

    def _run(self) -> None:
        try:
            self._serve()
            self._membership.words.say(matchmaker.word(self._node, "end"))
            self._membership.beat(HEARD_ALL)
        except Exception as e:  # noqa: BLE001  (raised again by the loop's next step; a dead thread would hang it)
            with self._changed:
                self._error = e
                self._traffic.drop(self._asking)
                self._changed.notify_all()

    def _serve(self) -> None:
        poll_s, looked_at = _FIRST_POLL_S, -math.inf
        while True:
            around = time.monotonic() - looked_at >= self._look_every_s
            if around:
                self._look_around()
                looked_at = time.monotonic()
            with self._changed:
                self._changed.wait_for(
                    lambda: self._word or not self._open, timeout=poll_s if self._asking else self._look_every_s
                )
                if not self._open:
                    return
                word, asking, self._word = self._word, self._asking, ""
            poll_s = _FIRST_POLL_S if word else min(2 * poll_s, _LAST_POLL_S)
            if asking or around:
                self._look(word, asking)

    def _look_around(self) -> None:
        self._membership.beat(self._heard)
        self._lost = self._membership.lost()
        self._membership.check_regroup()  # after it: who is started again is lost no more, and all are to regroup
        if not self._membership.failed_may_return:
            for n, notice in self._membership.notices().items():
                if notice.failed:
                    raise PeerLost((n,), f"it failed after step {notice.step}")
        for flight in self._met:  # after this the loop waits, by the rules for an island that was lost
            flight.overdue = time.monotonic() - self._met_at > self._timeout_s

    def _look(self, word: str, asking: Sequence[Flight]) -> None:
        """Say a word, or none; hear what is new, and hand on what the desk has for us then."""
        if word:
            self._said = self._membership.words.say(matchmaker.word(self._node, word))
        words = self._membership.words.heard(self._heard)
        for told in words:
            if told != NOTHING:
                self._desk = matchmaker.heard(self._desk, told, self._graph)
        self._heard += len(words)
        if not words or self._heard < self._said or not asking:
            return
        desk = self._desk
        meeting = desk.met.get(self._node)
        if meeting is not None and meeting.number > self._number:
            self._number, self._met, self._met_at = meeting.number, asking, time.monotonic()
            self._traffic.meet(asking, meeting.number, meeting.peer)
        elif self._node not in desk.ready or matchmaker.is_alone(desk, self._node, self._graph):
            self._alone = matchmaker.is_alone(desk, self._node, self._graph)
            self._traffic.drop(asking)
        else:
            return
        with self._changed:
            if self._asking is asking:  # flights that are done may have landed, and the loop have asked again
                self._asking, self._word = (), ""
            self._changed.notify_all()

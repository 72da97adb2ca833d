"""How does an island find somebody to meet without waiting for it? A thread of its own asks, and looks for the answer.

An island that is ready has encoded its wire and trains on; its flights wait for a partner (``Flight.matched``). When the
desk (``matchmaker.py``) has one, both islands' threads give the flights its number, and the traffic threads exchange the
wires, whatever the two islands compute just then. So a meeting that was given comes about without a step of either, and nobody
waits for another's steps: not in training, and not where all save a checkpoint at once. It lands before the first update at which
its wires are here. Before a checkpoint, an exact average and the end an island withdraws what nobody has answered, and waits for
the wires of what somebody has. Who ended meets nobody, and who has nobody left to meet trains on alone.

Who meets whom follows from who is ready first, so a run is not repeated bit for bit. A checkpoint is of one step of each
island, and of a meeting it may hold one side alone, where the other side was already past its own: after a resume only that side
has moved, and the mean of all islands by half of what lay between the two over the number of islands."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from dtrain import matchmaker
from dtrain.connect import Connection
from dtrain.core import Core, Flight
from dtrain.matchmaker import Desk, Graph
from dtrain.membership import SAY_EVERY_S
from dtrain.traffic import Traffic
from dtrain.transport.base import OWN_WORK_S

_DESK = "desk"
_FIRST_POLL_S, _LAST_POLL_S = 0.001, 0.02
"""Between two looks for an answer, each twice as far from the last. A look through a meeting point on this host takes 0.1 ms."""


class Meetings:
    """One island's words at the desk. All methods but the thread's are called by the loop's thread."""

    def __init__(self, core: Core, graph: Graph, connection: Connection, traffic: Traffic) -> None:
        self._core, self._graph, self._traffic = core, graph, traffic
        self._node, self._membership, self._timeout_s = connection.node, connection.membership, connection.timeout_s
        self._changed = threading.Condition()
        self._asking: Sequence[Flight] = ()
        """Flights that wait for a partner."""
        self._word = ""
        self._number = 0
        """Of the newest meeting."""
        self._met: Sequence[Flight] = ()
        """Its flights."""
        self._met_at = 0.0
        self._alone = False
        self._open = True
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="dtrain-meetings", daemon=True)
        self._thread.start()

    def after_step(self) -> Sequence[Flight]:
        """A step has ended: where nothing flies, what meets next; the caller launches it and calls ``ask``. Who still waits for a
        partner takes any from now on. Raises Regroup, and what else kept the thread from its work."""
        self._raise_error()
        if self._alone:
            return ()
        with self._changed:
            if self._asking and not self._word:
                self._say("hurry")
        return self._core.start_rounds()

    def ask(self, flights: Sequence[Flight]) -> None:
        if flights:
            with self._changed:
                self._asking = flights
                self._say("ask")

    def withdraw(self) -> None:
        """Afterwards what flies has a partner, whose wires are under way."""
        with self._changed:
            if self._asking:
                self._say("withdraw")
            self._changed.wait_for(lambda: not self._asking or self._error is not None)
        self._raise_error()
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

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the thread

    def _run(self) -> None:
        try:
            self._serve()
            self._membership.shared(_DESK, lambda text: matchmaker.write(matchmaker.end(matchmaker.read(text), self._node)))
        except Exception as e:  # noqa: BLE001  (raised again by the loop's next step; a dead thread would hang it)
            with self._changed:
                self._error = e
                self._traffic.drop(self._asking)
                self._changed.notify_all()

    def _serve(self) -> None:
        poll_s, looked_at = _FIRST_POLL_S, time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._word or not self._open, timeout=poll_s if self._asking else SAY_EVERY_S)
                if not self._open:
                    return
                word, asking, self._word = self._word, self._asking, ""
            poll_s = _FIRST_POLL_S if word else min(2 * poll_s, _LAST_POLL_S)
            if asking:
                self._look(word, asking)
            if time.monotonic() - looked_at > SAY_EVERY_S:
                self._membership.check_regroup()
                looked_at = time.monotonic()
                for flight in self._met:  # after this the loop waits, by the rules for an island that was lost
                    flight.overdue = looked_at - self._met_at > self._timeout_s

    def _look(self, word: str, asking: Sequence[Flight]) -> None:
        """Say a word at the desk, or none, and hand on what the desk has for us."""
        desk = matchmaker.read(self._membership.shared(_DESK, lambda text: self._said(word, text)))
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

    def _said(self, word: str, text: str) -> str:
        desk = matchmaker.read(text)
        after = self._after(word, desk)
        return text if after == desk else matchmaker.write(after)

    def _after(self, word: str, desk: Desk) -> Desk:
        match word:
            case "ask":
                return matchmaker.ask(desk, self._node, self._graph)
            case "hurry":
                return matchmaker.hurry(desk, self._node, self._graph)
            case "withdraw":
                return matchmaker.withdraw(desk, self._node)
            case _:
                return desk

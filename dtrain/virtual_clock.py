"""What happens next in a simulation? A clock that jumps from one event to the next, without threads and without waiting.

Whoever simulates something puts calls on it: ``at(time, call, argument)``. Events of the same time come in the order in which
they were put there, so a run depends on nothing but its input. Islands that are alike do the same at the same time: only times
are kept in order, not events."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualClock:
    """``now_s`` is 0 at first, and the time of the event that is being called while ``run`` lasts."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._times: list[float] = []
        self._events: dict[float, list[tuple[Callable[[Any], None], Any]]] = {}

    def at(self, time_s: float, call: Callable[[Any], None], argument: Any) -> None:
        """Call it when the clock shows ``time_s``, which must not lie behind ``now_s``."""
        events = self._events.get(time_s)
        if events is None:
            assert time_s >= self.now_s, "an event would lie in the past"
            events = self._events[time_s] = []
            heapq.heappush(self._times, time_s)
        events.append((call, argument))

    def run(self) -> None:
        """Until no event is left."""
        while self._times:
            self.now_s = self._times[0]
            for call, argument in self._events[self.now_s]:  # and those that are put behind them meanwhile
                call(argument)
            del self._events[heapq.heappop(self._times)]

"""What happens next in a simulation? A clock that jumps from one event to the next, without threads and without waiting.

Whoever simulates something puts calls on it: ``at(time, call, argument)``. Events of the same time come in the order in which
they were put there, so a run depends on nothing but its input."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class VirtualClock:
    """``now_s`` is 0 at first, and the time of the event that is being called while ``run`` lasts."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._number = 0

    def at(self, time_s: float, call: Callable[[Any], None], argument: Any) -> None:
        """Call it when the clock shows ``time_s``, which must not lie behind ``now_s``."""
        assert time_s >= self.now_s, "an event would lie in the past"
        self._number += 1
        heapq.heappush(self._events, (time_s, self._number, call, argument))

    def run(self) -> None:
        """Until no event is left."""
        events, pop = self._events, heapq.heappop
        while events:
            self.now_s, _, call, argument = pop(events)
            call(argument)

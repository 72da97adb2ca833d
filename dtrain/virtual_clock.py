"""What happens next in a simulation? A clock that jumps from one event to the next, without threads and without waiting.

Whoever simulates something puts calls on it: ``at(time, source, call, argument)``. Events of the same time come in waves: first
those that were put there before it, then those that these put there, and so on; in a wave in the order of their sources, and of
one source in the order of asking. So a run depends on nothing but its input, and what one source sees not on who else is on this
clock: shares of the sources may have clocks of their own (virtual_windows.py). Islands that are alike do the same at the same
time: only times are kept in order, not events."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

_by_source = itemgetter(0)


class VirtualClock:
    """``now_s`` is 0 at first, and the time of the event that is being called while ``run`` lasts."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._times: list[float] = []
        self._events: dict[float, list[tuple[int, Callable[[Any], None], Any]]] = {}

    @property
    def next_s(self) -> float:
        """When the next event is; infinity where there is none."""
        return self._times[0] if self._times else math.inf

    def at(self, time_s: float, source: int, call: Callable[[Any], None], argument: Any) -> None:
        """Call it when the clock shows ``time_s``, which must not lie behind ``now_s``."""
        events = self._events.get(time_s)
        if events is None:
            assert time_s >= self.now_s, "an event would lie in the past"
            events = self._events[time_s] = []
            heapq.heappush(self._times, time_s)
        events.append((source, call, argument))

    def run(self, until_s: float = math.inf) -> None:
        """All events before ``until_s``."""
        while self._times and self._times[0] < until_s:
            self.wave(self._times[0])

    def wave(self, time_s: float) -> None:
        """The events that are there for ``time_s``, before which there must be none."""
        events = self._events.get(time_s)
        if events is None:
            return
        assert time_s == self._times[0], "events would be left behind"
        self.now_s = time_s
        self._events[time_s] = []
        events.sort(key=_by_source)
        for _, call, argument in events:
            call(argument)
        if not self._events[time_s]:
            del self._events[heapq.heappop(self._times)]

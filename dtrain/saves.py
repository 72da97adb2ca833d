"""After which steps is a checkpoint written? Where that waits for no round which could be hidden.

A checkpoint holds what the rounds in flight have brought, and so waits for them. Just after a start that is a whole flight, and
those that are due each so many steps mostly come there. So one that is due after step t is written after the first step, from t
on and before the next is due, where all that flies lands before the next update, which would wait for it as long; where there is
no such step, as fragments take turns, after the one from which the last of it has the fewest updates to go. That is less than a
period later, and follows from the step and the plan, and from H where that adapts: all islands come to the same. The last step is
always one."""

from __future__ import annotations

from collections.abc import Sequence

from dtrain.core import Core


class Saves:
    """Of one run, as any of its ranks sees them."""

    def __init__(self, cores: Sequence[Core], *, every: int, last: int) -> None:
        """``cores``: of all levels. ``every``: steps between two that are due; 0: none. ``last``: the run's last step."""
        self._cores, self._every, self._last = cores, every, last
        self._due = self._chosen = 0

    def after(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step``. To be asked after each step."""
        if not self._every:
            return False
        due = step - step % self._every
        if due != self._due:
            self._due, self._chosen = due, self._least_waiting(due)
        return step in (self._chosen, self._last)

    def _least_waiting(self, due: int) -> int:
        period = max([1, *(max(core.control.every, core.delay_steps) for core in self._cores)])
        waits = [(self._to_land(step), step) for step in range(due, due + min(self._every, period))]
        return min(waits)[1]

    def _to_land(self, step: int) -> int:
        return max(core.to_land(step) for core in self._cores)

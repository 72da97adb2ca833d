"""How long has a run trained? Seconds that go on over a resume."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class Clock:
    """Seconds of the training loop and of the whole run, going on over a resume; what is spent on evaluation, measuring
    and checkpoints is counted apart."""

    base_s: float
    begun: float
    aside_s: float
    wall_base_s: float
    wall_begun: float

    def time_s(self) -> float:
        return self.base_s + time.monotonic() - self.begun

    def train_s(self) -> float:
        return self.time_s() - self.aside_s

    def wall_s(self) -> float:
        """Starting, evaluation and checkpoints included; not what was lost when an island was."""
        return self.wall_base_s + time.monotonic() - self.wall_begun

    @contextmanager
    def aside(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.aside_s += time.monotonic() - begun

"""In which steps does an island train, where islands are of unequal speed? Pure.

DyLU (Liu et al. 2024, arXiv 2401.09135): where the fastest island computes H steps between two rounds, one of v times its speed
trains in
    H_i = floor(v H),
so that all end a round at the same moment. A step of the job is a slot of time that all islands count alike: rounds, delays,
checkpoints and merges stay at the steps where they are. Of each H slots an island trains in H_i, spread evenly, the first among
them, and is idle in the others:
    it trains in slot t = 1, 2 ...  <=>  ceil(t H_i / H) > ceil((t - 1) H_i / H).
An idle slot is counted like a step that a loss scaler skipped, and computes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Pace:
    """Of all islands of a job."""

    every: int
    """H."""
    steps: tuple[int, ...] = ()
    """H_i of each island; empty: all train in every slot."""

    def trains(self, node: int, slot: int) -> bool:
        """Whether an island trains in a slot, which are numbered from 1."""
        return self.trained(node, slot) > self.trained(node, slot - 1)

    def trained(self, node: int, slots: int) -> int:
        """In how many of the first ``slots`` it trains."""
        return -(-slots * self.steps[node] // self.every) if self.steps else slots

    @property
    def shares(self) -> tuple[int, ...]:
        """How much each island's progress counts in a mean, in proportion: by the steps, and so the tokens, that it trained for
        it. Empty: all alike."""
        common = math.gcd(*self.steps)
        return tuple(steps // common for steps in self.steps)


def local_steps(speed: float, every: int) -> int:
    """floor(v H), of v as it is written: 0.29 of 100 are 29, and 28.999999999999996 in floating point."""
    return math.floor(as_written(speed) * every)


def as_written(speed: float) -> Fraction:
    return Fraction(repr(float(speed)))


def pace(speeds: Sequence[float] | None, every: int) -> Pace:
    """None: all alike."""
    return Pace(every, tuple(local_steps(speed, every) for speed in speeds or ()))

"""When does a fragment start a round? Pure functions of the optimizer step.

``every`` H steps, which "adaptive:H" makes fewer as the rank falls; or by a budget: R rounds in a run of T steps, few early and
many late, with a density that grows as t^p:
    a round starts after step t  <=>  floor(R (t / T)^(p+1)) > floor(R ((t - 1) / T)^(p+1)),    the last one after step T.
Late rounds are worth more, and one exact merge at the end makes up for most that were left out (arXiv 2507.06542).
Or "ready": after every H-th step at which nothing of an island flies, it looks for a peer that is ready too (``meetings.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

EVERY = "every"
READY = "ready"
_ADAPTIVE = "adaptive:"
MOST_GROWTH = 8


class Control(NamedTuple):
    """What a run may change while it works; all islands hold the same."""

    every: int
    """H: optimizer steps between two rounds of a fragment."""
    since: int = 0
    """The step after which a round started last, where H changes."""


When = Callable[[int, int, Control], bool]
"""(optimizer steps done, fragment, control) -> does this fragment start a round now?"""


def every(step: int, fragment: int, control: Control) -> bool:
    """All fragments together, after every H-th step."""
    return (step - control.since) % control.every == 0


def staggered(num_fragments: int) -> When:
    """Fragment p starts p * H / P steps after fragment 0: the peak of the link falls by P (Streaming DiLoCo, arXiv
    2501.18512)."""

    def when(step: int, fragment: int, control: Control) -> bool:
        return step % control.every == fragment * control.every // num_fragments

    return when


class Budget(NamedTuple):
    """``"budget:R"``, ``"budget:S%"`` of the steps, and ``:p`` behind either."""

    amount: int
    percent: bool
    growth: int
    """p: 0 spreads the rounds evenly."""

    def rounds(self, total_steps: int) -> int:
        """R, of a share to the nearest."""
        return (self.amount * total_steps + 50) // 100 if self.percent else self.amount


def parse(name: str) -> Budget | None:
    """None for "every" and "ready"; raises ValueError for what is no schedule."""
    word, *rest = name.split(":")
    if name in (EVERY, READY):
        return None
    amount, growth = (rest[0].removesuffix("%"), rest[1] if len(rest) == 2 else "1") if 1 <= len(rest) <= 2 else ("", "")
    if word != "budget" or not amount.isdecimal() or int(amount) < 1 or not growth.isdecimal() or int(growth) > MOST_GROWTH:
        raise ValueError(
            f'schedule = {name!r} is not known; use "every", or "budget:R" or "budget:S%": R rounds in all, or S % of the steps, '
            f'ever denser; a :p from 0 to {MOST_GROWTH} behind it says how much, 1 when left out; or "ready", of pairs'
        )
    return Budget(int(amount), rest[0].endswith("%"), int(growth))


def steps_at_first(every: str) -> int:
    """``"adaptive:125"`` -> 125; raises ValueError for any other text."""
    steps = every.removeprefix(_ADAPTIVE)
    if steps == every or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f'every = {every!r} is not known; use 1 or more, or "adaptive:125": 125 at first, then fewer')
    return int(steps)


def adaptive(every: int) -> str:
    """``steps_at_first``'s text."""
    return f"{_ADAPTIVE}{every}"


def multiples(name: str) -> tuple[int, int]:
    """``"3:6"`` -> (3, 6): Adam's first moments go with every third round, its second with every sixth. Raises ValueError for
    anything else."""
    first, colon, second = name.partition(":")
    if not colon or not all(text.isdecimal() and int(text) >= 1 for text in (first, second)):
        raise ValueError(f'moments = {name!r} is not allowed; use two multiples of every, 1 or more, as "3:6"')
    return int(first), int(second)


def spent(budget: Budget, num_fragments: int, total_steps: int) -> When:
    """Each of P fragments starts R rounds; fragment k is k / P of a round ahead of fragment 0."""
    rounds, power = budget.rounds(total_steps), budget.growth + 1
    whole = total_steps**power

    def done(step: int, fragment: int) -> int:
        return (rounds * num_fragments * min(step, total_steps) ** power + fragment * whole) // (num_fragments * whole)

    def when(step: int, fragment: int, control: Control) -> bool:
        return done(step, fragment) > done(step - 1, fragment)

    return when


def check_budget(name: str, budget: Budget, total_steps: int, delay_steps: int) -> None:
    """Raises ValueError where two rounds would have to share a step, or the end of one would come after the next one's start."""
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ValueError(f"total_steps = {total_steps!r} is not allowed; use a whole number, 1 or more")
    rounds, power, apart = budget.rounds(total_steps), budget.growth + 1, max(1, delay_steps)
    # The density grows, so the last steps are the ones that matter: at most one round may start in any ``apart`` of them.
    most = total_steps**power // (total_steps**power - max(0, total_steps - apart) ** power)
    if rounds < 1:
        raise ValueError(f'sync.schedule = "{name}" is not one round in {total_steps} steps; use a larger share, or "budget:1"')
    if rounds > most:
        raise ValueError(
            f'sync.schedule = "{name}" is {rounds} rounds in {total_steps} steps, and a round must land before the next starts: '
            f"with sync.delay = {delay_steps} use {most} at most, or a smaller growth than :{budget.growth}"
        )

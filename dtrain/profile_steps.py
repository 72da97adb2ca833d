"""Which steps of a job does ``dtrain profile`` look at? As many as hold every round as often as a long run would."""

from __future__ import annotations

from typing import NamedTuple

from dtrain.recipes import Recipe
from dtrain.schedule import EVERY, READY

_WARM_STEPS = 10
_FEWEST = 20
"""Below these a step that the machine disturbed is too much of the whole."""
_MOST = 200
"""A step of a small model is half a megabyte of trace."""
_PLAIN_PERIODS = 4
_PLAIN_STEPS = 100
"""Spans alone take no room, and one round says little of the next: four periods, but no more than 100 steps for it."""


class Window(NamedTuple):
    """Steps counted from 0: from ``plain`` on with spans alone, from ``traced`` on ``steps`` under torch.profiler, and one more
    under a torch.profiler that notes shapes."""

    plain: int
    traced: int
    steps: int

    @property
    def end(self) -> int:
        """The steps that the whole run does."""
        return self.shapes + 1

    @property
    def shapes(self) -> int:
        return self.traced + self.steps

    def __str__(self) -> str:
        return f"{self.plain}:{self.traced}:{self.steps}"

    @staticmethod
    def parse(text: str) -> Window:
        plain, traced, steps = (int(part) for part in text.split(":"))
        return Window(plain, traced, steps)


def window_of(recipe: Recipe, steps: int | None) -> Window:
    """Each window begins with the step that starts a round, so that it also lands in it. The plain one is always of whole
    periods; the traced one where nobody says how many ``steps``, and a period is no longer than 200."""
    every = _every(recipe)
    lands = recipe.delay_steps + 1
    if steps is None:
        steps = _periods(max(_FEWEST, lands), every) * every
        if steps > _MOST:
            steps = max(_FEWEST, min(lands, _MOST))
    plain = _periods(_WARM_STEPS + 1, every) * every - 1
    apart = _periods(max(steps, min(_PLAIN_PERIODS * every, _PLAIN_STEPS)), every) * every
    return Window(plain, plain + apart, steps)


def warning(recipe: Recipe, window: Window) -> str | None:
    """What a person should know of a traced window whose rounds are not those of a long run."""
    if recipe.algorithm == "local":
        return None
    if recipe.schedule == READY:
        return f'with sync.schedule = "{READY}" a round lands when it is there, and the next starts after it: not in every step'
    if recipe.schedule != EVERY:
        return f'with sync.schedule = "{recipe.schedule}" rounds come ever more often; those here are not those of a long run'
    if window.steps <= recipe.delay_steps:
        return f"a round lands {recipe.delay_steps} steps after it starts: none does both in {window.steps} steps of trace"
    if window.steps % recipe.every:
        return (
            f"a round starts every {recipe.every} steps: in {window.steps} steps of trace rounds weigh more than in a run; "
            f"--steps {_periods(recipe.delay_steps + 1, recipe.every) * recipe.every} gives them their own weight"
        )
    return None


def _every(recipe: Recipe) -> int:
    return 1 if recipe.algorithm == "local" else recipe.every


def _periods(steps: int, every: int) -> int:
    """Whole periods that hold so many steps."""
    return -(-steps // every)

"""Which steps of a job does ``dtrain profile`` look at? As many as hold every round as often as a long run would."""

from __future__ import annotations

from typing import NamedTuple

from dtrain.recipes import Recipe

_WARM_STEPS = 10
_FEWEST = 20
"""Below these a step that the machine disturbed is too much of the whole."""
_MOST = 200
"""One step of a small model is a megabyte of trace."""


class Window(NamedTuple):
    """Steps counted from 0: ``steps`` from ``plain`` on with spans alone, as many from ``traced`` on under torch.profiler."""

    plain: int
    traced: int
    steps: int

    @property
    def end(self) -> int:
        """The steps that the whole run does."""
        return self.traced + self.steps

    def __str__(self) -> str:
        return f"{self.plain}:{self.traced}:{self.steps}"

    @staticmethod
    def parse(text: str) -> Window:
        plain, traced, steps = (int(part) for part in text.split(":"))
        return Window(plain, traced, steps)


def window_of(recipe: Recipe, steps: int | None) -> Window:
    """Both windows begin with the step that starts a round, so that it also lands in them, and are as long as whole periods.

    A period longer than 200 steps is cut to what its round needs to land."""
    every = 1 if recipe.algorithm == "local" else recipe.every
    lands = recipe.delay_steps + 1
    if steps is None:
        steps = _periods(max(_FEWEST, lands), every) * every
        if steps > _MOST:
            steps = max(_FEWEST, min(lands, _MOST))
    plain = _periods(_WARM_STEPS + 1, every) * every - 1
    return Window(plain, plain + _periods(steps, every) * every, steps)


def warning(recipe: Recipe, window: Window) -> str | None:
    """What a person should know of a window whose rounds are not those of a long run."""
    if recipe.algorithm == "local" or window.steps % recipe.every == 0:
        if window.steps > recipe.delay_steps:
            return None
        return f"a round lands {recipe.delay_steps} steps after it starts: none does both in {window.steps} steps"
    return (
        f"a round starts every {recipe.every} steps, and {window.steps} are profiled: "
        f"rounds weigh more in these shares than in a run; --steps {recipe.every} gives them their own weight"
    )


def _periods(steps: int, every: int) -> int:
    """Whole periods that hold so many steps."""
    return -(-steps // every)

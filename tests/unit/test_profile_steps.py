"""Does a profile hold whole rounds of every recipe, in the weight that they have in a long run?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.assemble import assemble
from dtrain.profile_steps import Window, warning, window_of
from dtrain.recipes import RECIPES, Recipe

DELAYED = RECIPES["delayed_diloco"]


def starts(recipe: Recipe, first: int, last: int) -> list[int]:
    """Steps of [first, last), counted from 0, that start a round: it starts when step + 1 steps are done."""
    plan = assemble(recipe, seed=0, num_islands=4)
    return [step for step in range(first, last) if plan.sends and plan.when(step + 1, 0, plan.control)]


LONG = RECIPES["dilocox"]
"""Its rounds land in the period behind their own, and two periods are more than a trace holds."""
_NONE = ("local", "allreduce", "demo", "dadao", LONG.name)
REGULAR = [r for r in RECIPES.values() if r.name not in _NONE and r.schedule == "every"]


@pytest.mark.parametrize("recipe", REGULAR, ids=lambda r: r.name)
def test_both_windows_begin_with_a_round_that_lands_in_them(recipe: Recipe) -> None:
    window = window_of(recipe, None)
    assert warning(recipe, window) is None
    for first, last in ((window.plain, window.traced), (window.traced, window.shapes)):
        rounds = starts(recipe, first, last)
        assert rounds[0] == first
        assert len(rounds) * recipe.every == last - first, "each step has its share of the rounds"
        assert first + recipe.delay_steps < last
    assert window.plain >= 10
    assert (window.shapes, window.end) == (window.traced + window.steps, window.traced + window.steps + 1)


def test_the_quickstart_is_looked_at_for_four_rounds_and_traced_for_one() -> None:
    assert window_of(DELAYED, None) == Window(plain=27, traced=27 + 4 * 28, steps=28)


def test_a_round_that_flies_a_whole_period_is_held_whole() -> None:
    assert window_of(replace(DELAYED, delay="round"), None).steps == 56


def test_rounds_of_a_budget_are_said_to_be_others() -> None:
    recipe = RECIPES["single_merge"]
    assert "rounds come ever more often" in (warning(recipe, window_of(recipe, None)) or "")


def test_a_long_period_is_cut_to_what_lands() -> None:
    assert window_of(replace(DELAYED, every=1000, delay=30), None) == Window(999, 1999, 31)
    assert window_of(replace(DELAYED, every=1000, delay=900), None).steps == 200


def test_a_round_that_flies_a_long_period_is_whole_in_as_many_steps_as_are_advised() -> None:
    cut = window_of(LONG, None)
    assert cut.steps == LONG.every + 1
    assert "--steps 250 gives them their own weight" in (warning(LONG, cut) or "")
    assert warning(LONG, window_of(LONG, 250)) is None


def test_steps_that_are_asked_for_are_taken_and_what_they_lack_is_said() -> None:
    assert window_of(DELAYED, 28).steps == 28
    assert warning(DELAYED, window_of(DELAYED, 28)) is None
    few, odd = window_of(DELAYED, 6), window_of(DELAYED, 30)
    assert (few.steps, odd.steps) == (6, 30)
    assert "a round lands 6 steps after it starts: none does both in 6 steps of trace" in (warning(DELAYED, few) or "")
    assert "--steps 28 gives them their own weight" in (warning(DELAYED, odd) or "")
    assert (odd.traced - odd.plain) % 28 == 0, "shares are of whole periods even so"
    assert warning(RECIPES["local"], window_of(RECIPES["local"], 3)) is None


def test_a_window_goes_through_a_command_line() -> None:
    assert Window.parse(str(Window(27, 139, 28))) == Window(27, 139, 28)

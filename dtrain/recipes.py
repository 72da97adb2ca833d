"""What does a job ask for? A named row with its overrides, checked as a whole.

Pure: no torch. ``assemble.py`` turns a row into code."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dtrain import own, schedule, slots
from dtrain.landing_fits import check_stable
from dtrain.levels import of_levels
from dtrain.methods import RULES, InnerOptimizer
from dtrain.own_name import is_own
from dtrain.recipe import Recipe
from dtrain.recipe_fits import check_together, check_used, check_values, combine_of
from dtrain.recipe_rows import ROWS

DEFAULT_RECIPE = "delayed_diloco"
"""What join, the quickstart and the README use when nothing is said."""

RECIPES: dict[str, Recipe] = {row.name: row for row in ROWS}

_NO_AXES = (
    *("name", "summary", "paper", "payload", "combine", "method", "moments_every", "sam_rho", "optimizer", "start"),
    *("total_steps", "every_adapts", "speeds", "near"),
)
AXES = tuple(f.name for f in fields(Recipe) if f.name not in _NO_AXES)
"""What a job file or join() may override."""

_WORDS = {axis: get_args(hint) for axis, hint in get_type_hints(Recipe).items() if get_origin(hint) is Literal}
"""The axes that are answered by one of a few words."""


def resolve(name: str | None, overrides: Mapping[str, object], num_islands: int) -> Recipe:
    """The named row with its overrides, checked as a whole; raises ValueError with one line."""
    row = row_of(name or DEFAULT_RECIPE)
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items() if v is not None}
    unknown = sorted(set(changes) - set(AXES))
    assert not unknown, unknown
    recipe = replace(row, **_in_fields(changes))
    if (recipe.algorithm == "own") != callable(recipe.method):
        raise ValueError(
            'sync.algorithm = "own" is for a row of your own file that has a method, and for nothing else; use sync.recipe = '
            '"FILE.py:ROW"'
        )
    check_values(recipe, _WORDS)
    check_used(recipe, row, changes)
    check_together(recipe, num_islands)
    return replace(recipe, combine=combine_of(recipe))


def _in_fields(changes: Mapping[str, object]) -> dict[str, Any]:
    every = changes.get("every")
    if every is None:
        return dict(changes)
    steps = schedule.steps_at_first(every) if isinstance(every, str) else every
    return {**changes, "every": steps, "every_adapts": isinstance(every, str)}


def answer_of(recipe: Recipe, axis: str) -> object:
    """As a job file says it."""
    value = getattr(recipe, axis)
    if axis == "every" and recipe.every_adapts:
        return schedule.adaptive(recipe.every)
    return list(value) if isinstance(value, tuple) else value


def row_of(name: str) -> Recipe:
    """The row of a name, of one's own too, without any change; raises ValueError where there is none."""
    if is_own(name):
        return own.load(name)
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"recipe {name!r} is not known{meant}; use one of {', '.join(sorted(RECIPES))}, or FILE.py:ROW")
    return RECIPES[name]


def moments_of(recipe: Recipe, said: int | None) -> int | None:
    """s of AccumAdamW in the training job: the recipe's where train.moments_every is not said, None where neither says one.
    Raises ValueError where that would take accumulation from a recipe that is defined with it, or SGD from one that is."""
    if said is not None and RULES[recipe.algorithm].signs:
        raise ValueError(
            f'train.moments_every = {said} is of AdamW, and sync.recipe = "{recipe.name}" is defined with SGD; leave it out, or '
            'use sync.recipe = "allreduce"'
        )
    if said == 1 and recipe.moments_every not in (None, 1):
        raise ValueError(
            f'train.moments_every = 1 takes accumulation from sync.recipe = "{recipe.name}", which is defined with it; leave it '
            'out, or use sync.recipe = "decent_adam"'
        )
    return recipe.moments_every if said is None else said


def with_steps(recipe: Recipe, total_steps: int | None) -> Recipe:
    """The recipe for a run of so many optimizer steps, where its schedule spends a budget over them; raises ValueError for a
    budget that does not fit them, and where they are not known."""
    budget = schedule.parse(recipe.schedule)
    if budget is None:
        return recipe
    if total_steps is None:
        raise ValueError(
            f'sync.schedule = "{recipe.schedule}" spreads its rounds over the whole run; give join its length: total_steps='
        )
    schedule.check_budget(recipe.schedule, budget, total_steps, recipe.delay_steps)
    return replace(recipe, total_steps=total_steps)


def of_join(recipe: Recipe, total_steps: int | None) -> Recipe:
    """``with_steps`` for a loop that need not say its length; raises ValueError where it does and nothing would look at it."""
    if total_steps is not None and schedule.parse(recipe.schedule) is None:
        raise ValueError(
            f'total_steps = {total_steps!r} has no effect with sync.schedule = "{recipe.schedule}"; leave it out, or use a budget'
        )
    return with_steps(recipe, total_steps)


def with_start(recipe: Recipe, start: Literal["same", "own"]) -> Recipe:
    """The recipe for islands that start from the same parameters, or each from its own; raises ValueError where the method needs
    the same."""
    needs = RULES[recipe.algorithm].needs_same_start
    if start not in _WORDS["start"]:
        raise ValueError(f'start = {start!r} is not known; use "same" or "own"')
    if start == "own" and needs is not None:
        raise ValueError(
            f'{recipe.algorithm} {needs}, so all islands start from the same parameters; leave start = "own" out, or use '
            'sync.recipe = "local" or "dpsgd"'
        )
    return replace(recipe, start=start)


def with_speeds(recipe: Recipe, speeds: Sequence[float], num_islands: int) -> Recipe:
    """The recipe for islands of unequal speed, one number an island; none: all alike. Raises ValueError for what are no speeds,
    for rounds between which somebody would not train, and for those that do not weigh by what each has trained."""
    if not speeds:
        return recipe
    said = f"islands.speeds = [{', '.join(f'{v:g}' for v in speeds)}]"
    if len(speeds) != num_islands:
        named = f"{len(speeds)} island{'s' * (len(speeds) != 1)}"
        raise ValueError(f"{said} names {named}, and there are {num_islands}; give a speed for each")
    if not all(v > 0 for v in speeds):
        slowest = next(k for k, v in enumerate(speeds) if not v > 0)
        raise ValueError(f"{said}: island {slowest} would never train; use numbers above 0, and 1 for the fastest")
    if max(speeds) != 1:
        raise ValueError(f"{said}: they are beside the fastest island's; divide each by the largest, so that that is 1")
    if min(speeds) == 1:
        return recipe
    if recipe.near is not None:
        raise ValueError(f"{said} is for a job with one level of rounds, and [[sync.level]] makes two; leave it out")
    if recipe.every == 1 or recipe.schedule != schedule.EVERY:
        raise ValueError(
            f'{said} is for rounds that are many steps apart, and sync.recipe = "{recipe.name}" has sync.every = {recipe.every} '
            f'with sync.schedule = "{recipe.schedule}"; leave it out, or use sync.recipe = "async_diloco"'
        )
    if recipe.every_adapts:
        raise ValueError(
            f'{said} is for rounds as far apart as at first, and sync.every = "{schedule.adaptive(recipe.every)}" brings them '
            f"nearer; leave it out, or use sync.every = {recipe.every}"
        )
    if recipe.reduce in ("none", "neighbours"):
        raise ValueError(
            f"{said} is for means of all islands, in which each counts by what it trained, and in those of sync.reduce = "
            f'"{recipe.reduce}" none would count less; leave it out, or use sync.recipe = "async_diloco"'
        )
    pace = slots.pace(speeds, recipe.every)
    if min(pace.steps) < 1:
        raise ValueError(
            f"{said}: island {pace.steps.index(0)} would train in none of sync.every = {recipe.every} steps; use every = "
            f"{math.ceil(1 / slots.as_written(min(speeds)))} or more"
        )
    if recipe.algorithm == "diloco":
        check_stable(recipe, num_islands, pace.shares)
    return replace(recipe, speeds=tuple(float(v) for v in speeds))


def rho_of(recipe: Recipe, said: float | None) -> float:
    """SAM's rho in the training job, 0 without: the recipe's where train.sam_rho is not said. Raises ValueError where that would
    take SAM from a recipe that is defined with it."""
    if recipe.sam_rho is not None and said == 0:
        raise ValueError(
            f'train.sam_rho = 0 takes SAM from sync.recipe = "{recipe.name}", which is defined with it; leave it out, or use '
            f'sync.recipe = "{recipe.algorithm}"'
        )
    return (recipe.sam_rho or 0.0) if said is None else said


def optimizer_of(
    recipe: Recipe, said: InnerOptimizer | None, moments_every: int | None = None
) -> InnerOptimizer | Literal["sgd"]:
    """The inner optimizer in the training job: the recipe's where train.optimizer is not said, ``moments_every`` what train says.
    Raises ValueError where that would take its optimizer from a recipe that is defined with one."""
    if RULES[recipe.algorithm].signs:
        if said is not None:
            raise ValueError(
                f'train.optimizer = "{said}" takes SGD from sync.recipe = "{recipe.name}", which is defined with it; leave it '
                'out, or use sync.recipe = "allreduce"'
            )
        return "sgd"
    chosen = said or recipe.optimizer or "adamw"
    if recipe.optimizer == "muon" and chosen != "muon":
        raise ValueError(
            f'train.optimizer = "{said}" takes Muon from sync.recipe = "{recipe.name}", which is defined with it; leave it out, '
            f'or use sync.recipe = "{recipe.algorithm}"'
        )
    if chosen != "adamw" and (recipe.moments_every is not None or recipe.moments is not None):
        raise ValueError(
            f'train.optimizer = "{chosen}" takes AdamW from sync.recipe = "{recipe.name}", which is defined with it; leave it '
            'out, or use sync.recipe = "dpsgd"'
        )
    if chosen != "adamw" and moments_every is not None:
        by = f'train.optimizer = "{said}"' if said else f'sync.recipe = "{recipe.name}"'
        other = "Muon" if chosen == "muon" else "Schedule-Free AdamW"
        raise ValueError(f"train.moments_every = {moments_every} is AdamW's, and {by} trains with {other}; leave one of them out")
    return chosen


def of_section(sync: Mapping[str, object], num_islands: int, total_steps: int | None = None) -> Recipe:
    """The recipe that a job file's [sync] describes: the row that it names, with its other keys over it, for a run of
    ``total_steps`` where that is given; of a job with levels the far one's, with the near one's in it."""
    levels = sync.get("level")
    if isinstance(levels, list):
        return of_levels(levels, {key: v for key, v in sync.items() if key != "level" and v is not None}, num_islands, resolve)
    name = sync.get("recipe")
    assert name is None or isinstance(name, str)
    recipe = resolve(name, {key: value for key, value in sync.items() if key != "recipe"}, num_islands)
    return recipe if total_steps is None else with_steps(recipe, total_steps)

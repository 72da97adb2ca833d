"""What do two levels of one job say, and do they fit together? Each question that is answered no is one line. No torch.

Neighbouring islands are a group, which the near level keeps together; the far level's outer loop joins the groups. Both move the
same parameters, each by what it adds to them, so their rounds may be in flight together: islands' mean is what the outer loop
makes it, whatever the near level mixes, and what they differ by within a group is the near level's alone.

That holds where a near round mixes between a far landing and the next far start. What lands (keep) takes away what an island
sent, and with it what it then differed by and the near level has mixed since, so that this comes back with the other sign. Were
it sent again before it is mixed, then d' = -d + noise: a walk, of which each far round is a step (after 64 of them 8 times the
noise of one), where a near round in between leaves none of it.

A far round that takes the parameters' place where it begins (eager, pure, and any without delay) ends what islands of a group
differ by. A near round in flight would land it once more with the other sign, (W - I) of what is gone, up to twice as large; so
there near rounds have landed wherever a far one begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

from dtrain import schedule
from dtrain.recipe import Near, Recipe
from dtrain.units import LINK_KEYS

NEAR = ("dpsgd", "choco", "deepsqueeze", "multi_gossip", "chebyshev", "allreduce", "local")
"""Algorithms that mix parameters or gradients by what they add to them, and keep nothing that outer steps would make wrong."""


Levels = Sequence[Mapping[str, object]]
Resolve = Callable[[str, Mapping[str, object], int], Recipe]


def of_levels(levels: Levels, beside: Mapping[str, object], num_islands: int, resolve: Resolve) -> Recipe:
    """The far level's recipe, with the near one's in it; ``beside``: what [sync] says besides. Raises ValueError with one
    line."""
    if beside:
        key, value = next(iter(beside.items()))
        raise ValueError(f"sync.{key} = {value!r} beside [[sync.level]]: of which level? Write it in one, or leave it out")
    if len(levels) != 2:
        remedy = "write its keys into [sync] itself" if len(levels) < 2 else "leave the others out"
        raise ValueError(
            f"[[sync.level]] stands there {len(levels)} time{'s' * (len(levels) != 1)}, and a job has two levels, near and far, "
            f"or none; {remedy}"
        )
    islands = _group(levels, num_islands)
    near, far = _answers(levels[0], 0, islands, resolve), _answers(levels[1], 1, num_islands, resolve)
    _check_near(near)
    _check_far(far, near)
    loop = {axis: _common(axis, near, far) for axis in ("moments_every", "sam_rho", "optimizer")}
    if loop["optimizer"] == "muon" and loop["moments_every"] is not None:
        raise ValueError(
            f'sync.level.0 with recipe = "{near.name}" and sync.level.1 with recipe = "{far.name}": moments that accumulate are '
            'AdamW\'s, and one of them is defined with Muon; use recipe = "dpsgd" in sync.level.0'
        )
    return replace(far, near=Near(islands, near), **loop)


def _group(levels: Sequence[Mapping[str, object]], num_islands: int) -> int:
    islands = levels[0].get("islands")
    if levels[1].get("islands") is not None:
        raise ValueError(
            f"sync.level.1.islands = {levels[1]['islands']}: the far level joins all groups of the near one; leave it out"
        )
    if not isinstance(islands, int) or islands < 2:
        raise ValueError(f"sync.level.0.islands = {islands!r}: say how many neighbouring islands are a group, 2 or more")
    if num_islands % islands or num_islands < 2 * islands:
        raise ValueError(
            f"sync.level.0.islands = {islands} of islands.count = {num_islands}: the islands are two groups or more, all of as "
            f"many; use a multiple of {islands} from {2 * islands} on as islands.count"
        )
    return islands


def _answers(level: Mapping[str, object], number: int, num_islands: int, resolve: Resolve) -> Recipe:
    name = level.get("recipe")
    if not isinstance(name, str):
        example = ("accum_adam", "dilocox")[number]
        raise ValueError(f'sync.level.{number} names no recipe; say one, recipe = "{example}" for instance')
    try:
        recipe = resolve(name, {k: v for k, v in level.items() if k not in ("recipe", *LINK_KEYS)}, num_islands)
    except ValueError as e:
        raise ValueError(f"sync.level.{number}: {e}") from None
    if recipe.schedule != schedule.EVERY:
        raise ValueError(
            f'sync.level.{number}: sync.schedule = "{recipe.schedule}" is for a job without levels; use '
            f'schedule = "{schedule.EVERY}"'
        )
    return recipe


def _check_near(near: Recipe) -> None:
    if near.algorithm not in NEAR:
        raise ValueError(
            f'sync.level.0: recipe = "{near.name}" is of algorithm "{near.algorithm}", and beneath an outer loop only '
            f'{", ".join(NEAR)} can be; use recipe = "dpsgd", "accum_adam" or "allreduce"'
        )


def _check_far(far: Recipe, near: Recipe) -> None:
    if far.algorithm != "diloco":
        raise ValueError(
            f'sync.level.1: recipe = "{far.name}" is of algorithm "{far.algorithm}", and groups are joined by an outer loop '
            'with one anchor, "diloco"; use recipe = "diloco", "dilocox" or "fedavg"'
        )
    if far.landing == "blend":
        raise ValueError(
            'sync.level.1: landing = "blend" takes a share of the parameters\' place whatever near rounds are in flight; use '
            'landing = "keep", which adds, or another recipe than "' + far.name + '"'
        )
    if far.quorum is not None and far.quorum != "100%":
        raise ValueError(f'sync.level.1: quorum = {far.quorum!r} is for a job with one level of rounds; use quorum = "100%"')
    if far.participants is not None or far.every_adapts:
        key, said = ("every", schedule.adaptive(far.every)) if far.every_adapts else ("participants", far.participants)
        raise ValueError(f"sync.level.1: {key} = {said!r} is for a job with one level of rounds; leave it out")
    if (far.include, far.exclude) != (near.include, near.exclude):
        raise ValueError(
            "sync.level.0 and sync.level.1 share other parameters: the groups' mean is of those that both share; give both the "
            "same include and exclude"
        )
    _check_room(far, near)
    aligned = far.every % near.every == 0 and (near.fragments, far.fragments) == (1, 1)
    if replaces(far) and near.delay_steps > 1 and not aligned:
        late = "delay = 0" if far.delay_steps == 0 else f'landing = "{far.landing}"'
        raise ValueError(
            f"sync.level.1: with {late} a far round takes the parameters' place where it begins, and rounds of sync.level.0, "
            f"{near.delay_steps} steps late, may be in flight there; use delay = 1 in sync.level.0, or landing = "
            '"keep" with a delay in sync.level.1'
        )


def _check_room(far: Recipe, near: Recipe) -> None:
    each = gcd(near.every, far.every)
    first = -(-far.delay_steps // each) * each  # where a near round begins soonest after a far landing, in whichever far round
    mixes = near.algorithm not in ("allreduce", "local")
    if mixes and not replaces(far) and first + near.delay_steps > far.every:
        room = (far.every - near.delay_steps) // each * each
        remedy = f"delay = {room} or less" if room > 0 else f"every = {first + near.delay_steps} or more"
        raise ValueError(
            f"sync.level.1: rounds every {far.every} steps land {far.delay_steps} later, and no round of sync.level.0 mixes "
            f"between that and the next, so that islands of a group would drift apart; use {remedy} in sync.level.1"
        )


def replaces(far: Recipe) -> bool:
    """Whether a round takes the parameters' place where it begins."""
    return far.landing in ("eager", "pure") or far.delay_steps == 0


def _common(axis: str, near: Recipe, far: Recipe) -> Any:
    """What a row says of the loop; None where neither does."""
    ours, theirs = getattr(near, axis), getattr(far, axis)
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(
            f'sync.level.0 with recipe = "{near.name}" is defined with {axis} = {ours!r}, and sync.level.1 with '
            f'recipe = "{far.name}" with {axis} = {theirs!r}; use recipes that go together'
        )
    return theirs if ours is None else ours

"""Does a landing fit the rounds, and does the outer loop bear it? Each question that is answered no is one line. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dtrain import schedule, stability

if TYPE_CHECKING:
    from dtrain.recipes import Recipe


def check_landing(r: Recipe) -> None:
    """Raises ValueError for a landing that has nothing to do, or rounds that it is not made for."""
    late = r.landing in ("eager", "pure")
    if r.algorithm != "diloco" or (late and r.delay_steps == 0):
        with_delay, remedy = (" with a delay", ", or set sync.delay") if late else ("", "")
        raise ValueError(f'sync.landing = "{r.landing}" is for algorithm = "diloco"{with_delay}; use landing = "keep"{remedy}')
    if r.landing == "blend":
        _check_one_in_flight(r)


def _check_one_in_flight(r: Recipe) -> None:
    if r.schedule != schedule.EVERY:
        if r.fragments == 1:
            return
        raise ValueError(
            f'sync.landing = "blend" has one fragment in flight at most, and with sync.schedule = "{r.schedule}" several may be; '
            f'use schedule = "{schedule.EVERY}", or fragments = 1'
        )
    apart, over = divmod(r.every, r.fragments)
    if over:
        fewer = max(p for p in range(1, r.fragments) if r.every % p == 0)
        raise ValueError(
            f'sync.fragments = {r.fragments} does not divide sync.every = {r.every}, and with sync.landing = "blend" they start '
            f"equally far apart; use fragments = {fewer}, or every = {(apart + 1) * r.fragments}"
        )
    if r.delay_steps and r.delay_steps >= apart:
        raise ValueError(
            f'sync.delay = {r.delay_steps} is not below every / fragments = {apart}, and with sync.landing = "blend" one fragment'
            f' is in flight at most; use at most {apart - 1}, or landing = "keep"'
        )


def loop_of(r: Recipe, num_islands: int) -> stability.Loop:
    """The outer loop of algorithm = "diloco", but for its learning rate. A budget's rounds may fly for their whole period."""
    momentum = r.outer_momentum if r.outer in ("nesterov", "delayed_nesterov") else 0.0
    if r.landing in ("eager", "pure"):
        return stability.Loop(r.landing, momentum, num_islands if r.landing == "eager" else 1)
    every = r.every if r.schedule == schedule.EVERY else max(1, r.delay_steps)
    return stability.Loop(r.landing, momentum, 1, every, r.delay_steps, r.alpha if r.landing == "blend" else 0.0)


def check_stable(r: Recipe, num_islands: int, unequal: Sequence[int] = ()) -> None:
    """Raises ValueError for an outer loop that drives a quadratic loss up, with the learning rate that would not. Of ``unequal``
    islands (``Pace.shares``) eager bears what it bears of as many as the smallest share goes into all."""
    least = 1 if not unequal else -(-sum(unequal) // min(unequal))
    lr = 1.0 if r.outer == "copy" else r.outer_lr
    # Where H falls, a round of so many steps flies for ever more of its period, and keep bears less.
    loops = [loop_of(replace(r, every=every), max(num_islands, least)) for every in (r.every, r.least_every)]
    if all(stability.is_stable(loop, lr) for loop in loops):
        return
    loop = min(loops, key=stability.largest_outer_lr)
    most = math.floor(1000 * stability.largest_outer_lr(loop)) / 1000
    what, remedy, less = f"sync.outer_lr = {lr:g}", f"use an outer_lr below {most:g}", ""
    if r.outer == "copy":
        what, remedy = 'sync.outer = "copy"', f'use outer = "sgd" with an outer_lr below {most:g}'
    elif loop.momentum:
        what, less = f"{what} with sync.outer_momentum = {loop.momentum:g}", ", or less momentum"
    late = "rounds that are waited for" if r.delay_steps == 0 else f'sync.landing = "{r.landing}"'
    whose = f" of {num_islands} islands" if r.landing == "eager" else ""
    if whose and least > num_islands:
        whose += f", of which the slowest has 1 / {least} of each mean"
    raise ValueError(
        f"{what} is not stable with {late}{whose}: on a quadratic loss it grows {stability.radius(loop, lr):.3g} times a round; "
        f"{remedy}{less}"
    )

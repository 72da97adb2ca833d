"""What do slow islands and slow links cost, beside islands and links that are alike? A job's [sim] names them.

Of [sim] the planner reads how long a step takes and how unequal steps, islands and links are; what it would have no effect on,
jitter and loss of packets among it, is refused."""

from __future__ import annotations

import math
from dataclasses import replace

from dtrain.config import Job
from dtrain.plan.company import LinkSpeed
from dtrain.plan.plans import Planner, Row, Setting, baseline
from dtrain.units import links
from dtrain.virtual_job import slow_islands

READ = ("step_s", "step_noise", "stragglers", "straggler_factor", "links")
"""Keys of [sim]."""


def factors_of(job: Job, num_islands: int) -> tuple[float, ...] | None:
    """How many times longer each computes, as in ``dtrain sim``; None where all are alike."""
    slow = slow_islands(job, num_islands)
    return tuple(job.sim.straggler_factor if node in slow else 1.0 for node in range(num_islands)) if slow else None


def jitter_of(job: Job, step_s: float) -> float | None:
    """Standard deviation of a lognormal step; None where [sim] says nothing of it."""
    return step_s * math.sqrt(math.expm1(job.sim.step_noise**2)) if job.sim.step_noise else None


def with_links(job: Job, link: LinkSpeed) -> LinkSpeed:
    return replace(link, between=links(job.sim.links))


def note(job: Job) -> list[str]:
    """What [sim] says, in a line; none where it says nothing."""
    sim, said = job.sim, list[str]()
    if sim.stragglers:
        many = f"{sim.stragglers:g}" if sim.stragglers >= 1 else f"{sim.stragglers:.0%}"
        said.append(f"of the islands {many} are slow and compute {sim.straggler_factor:g} times longer")
    if sim.links:
        said.append(f"between some islands there are other links, {sim.links}")
    return [f"as [sim] says, {' and '.join(said)}"] if said else []


def unequal_lines(rows: list[Row], chosen: Row, setting: Setting) -> list[str]:
    """One, where islands or links are not alike."""
    n = chosen.num_islands
    if setting.factors(n) is None and not setting.link.between:
        return []
    equal = Planner(replace(setting, factors=lambda _: None, link=replace(setting.link, between={})))
    costs = [
        f"{row.recipe.name} takes {(row.time.step_s - equal.row(row.recipe, n).time.step_s) * 1e3:.3g} ms a step longer"
        for row in dict.fromkeys((baseline(rows), chosen))
    ]
    return [f"slow islands and links: {', '.join(costs)} than with the others' pace and link everywhere"]

"""How far do pairs get that meet at random times? ``sim.clock = "poisson"`` of a job file, simulated, in numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from dtrain import metrics, schedule, units
from dtrain.build import build_recipe
from dtrain.config import Job
from dtrain.events.run import EventRun, MethodName, Posed, pose, run
from dtrain.recipe import Recipe
from dtrain.recipes import row_of

METHODS: dict[str, MethodName] = {"dpsgd": "gossip", "a2cid2": "a2cid2", "dadao": "dadao"}
"""Algorithm -> its form under Poisson clocks."""
_OF_ROUNDS = ("every", "delay", "fragments", "bucket_bytes", "error_feedback", "feedback_decay")
"""Answers that say nothing of pairs that meet at random times."""
_LOOKS = 50
_SHOWN = 5
"""Looks that are printed, evenly spaced; all are in the file."""


@dataclass(frozen=True, slots=True)
class Timed:
    run: EventRun
    real_s: float


def check_events(job: Job, recipe: Recipe) -> None:
    """Raises ValueError for a recipe that has no form under Poisson clocks, for answers without effect there, and where graph,
    problem and method do not fit."""
    if recipe.algorithm not in METHODS or recipe.reduce != "neighbours":
        raise ValueError(
            f'sim.clock = "poisson" is for pairs that meet: recipes dpsgd, a2cid2 and dadao, and not "{recipe.name}" with '
            f'sync.reduce = "{recipe.reduce}"; use one of those, or sim.clock=steps'
        )
    if recipe.codec != "identity" or recipe.server is not None:
        said = f'codec = "{recipe.codec}"' if recipe.server is None else f'server = "{recipe.server}"'
        raise ValueError(f'sync.{said} has no effect with sim.clock = "poisson", whose pairs exchange numbers as they are')
    if schedule.parse(recipe.schedule) is not None:
        raise ValueError(
            f'sim.clock = "poisson" lets pairs meet at random times, and sync.recipe = "{recipe.name}" has sync.schedule = '
            f'"{recipe.schedule}"; use sync.recipe = "{recipe.algorithm}", or sim.clock=steps'
        )
    row = row_of(recipe.name)
    for axis in _OF_ROUNDS:
        value = getattr(recipe, axis)
        if value != getattr(row, axis):
            raise ValueError(f'sync.{axis} = {value!r} has no effect with sim.clock = "poisson": it has no rounds; leave it out')
    if job.train.lr != type(job.train).model_fields["lr"].default:
        raise ValueError(
            f'train.lr = {job.train.lr:g} has no effect with sim.clock = "poisson", whose steps follow the problem\'s curvature; '
            "leave it out"
        )
    _posed(job, recipe)


def run_events(job: Job) -> Timed:
    """Of a job that ``check_events`` let pass; raises ValueError where the run diverges."""
    begun = time.monotonic()
    found = run(_posed(job, build_recipe(job)), horizon=float(job.train.steps), seeds=(job.job.seed,), looks=_LOOKS)
    return Timed(found, time.monotonic() - begun)


def _posed(job: Job, recipe: Recipe) -> Posed:
    return pose(
        METHODS[recipe.algorithm], job.islands.count, topology=recipe.topology, graph=recipe.graph, problem=job.sim.problem,
        numel=job.sim.numel, seeds=(job.job.seed,), meetings_per_node=job.sim.meetings, rates=job.sim.rates,
    )  # fmt: skip


def write_events(folder: Path, timed: Timed) -> None:
    """``virtual.json``."""
    found = timed.run
    content = {
        "times": found.trace.times.tolist(),
        "squared_error": found.trace.error[:, 0].tolist(),
        "squared_disagreement": found.trace.consensus[:, 0].tolist(),
        "gradients": found.trace.gradients,
        "meetings": found.trace.meetings,
        "meetings_per_island": found.meetings_per_node,
        "chi1": found.chi.chi1,
        "chi2": found.chi.chi2,
        "bound_per_time": found.bound,
        "real_s": timed.real_s,
    }
    metrics.write_json(folder / "virtual.json", content)


def event_rows(timed: Timed) -> list[list[str]]:
    """The thing, its value, what it means."""
    found, trace = timed.run, timed.run.trace
    rows = [
        ["Gradients", f"{trace.gradients:,}", "of all islands, one each a unit of time in the mean"],
        ["Meetings", f"{trace.meetings:,}", f"of two, {found.meetings_per_node:.3g} of an island a unit of time"],
        [
            "chi1, chi2",
            f"{found.chi.chi1:.4g}, {found.chi.chi2:.4g}",
            "of the graph at those rates; the larger chi1 / chi2, the more momentum gains",
        ],
    ]
    for look in range(_LOOKS // _SHOWN - 1, _LOOKS, _LOOKS // _SHOWN):
        at = f"At time {trace.times[look]:g}"
        apart = f"mean squared distance from the optimum; from their own mean {trace.consensus[look, 0]:.3g}"
        rows.append([at, f"{trace.error[look, 0]:.4g}", apart])
    if found.bound is not None:
        rows.append(["Promised", f"exp(-{found.bound:.3g} t)", "how the squared distance falls at least, by the theory"])
    return [*rows, ["Took", units.show_seconds(timed.real_s), "of this machine's time"]]

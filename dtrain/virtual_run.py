"""What would a job's islands wait for, and where would they end? ``[sim]`` of a job file, run on a virtual clock, in numbers."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dtrain import metrics, units
from dtrain.bucket import flatten
from dtrain.build import build_recipe
from dtrain.config import Job
from dtrain.errors import NonFinite
from dtrain.train import cpu_threads
from dtrain.virtual import Account
from dtrain.virtual_job import problem_of
from dtrain.virtual_problem import Problem, Quadratic, consensus_distance, mean_of
from dtrain.virtual_processes import Islands

Row = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Stand:
    """Where all islands are."""

    consensus_distance: float
    gap: float | None
    """f(mean of the islands) - f(x*), of a problem that has an optimum."""


@dataclass(frozen=True, slots=True)
class Virtual:
    """What ``virtual.json`` holds. Bytes are those of the rounds."""

    problem: str
    recipe: str
    islands: int
    parameters: int
    steps: int
    """That were done on this clock."""
    virtual_s: float
    """Until the last island has done its steps and has the wires of its last rounds."""
    real_s: float
    """That this machine took for the steps."""
    start: Stand | None
    """None where no problem is solved."""
    end: Stand | None
    accounts: list[Account]
    """By island."""
    resent_bytes: list[float]
    """By island: packets that were lost, besides."""


def simulate_job(job: Job) -> Virtual:
    """The problem that ``[sim]`` names. Raises what a method raises: NonFinite, PeerLost; and NonFinite where it diverged."""
    sim = job.sim
    # With two, a copy of 40,000 bytes is shared by OpenMP threads that spin for each other: 10 times slower on a busy machine.
    torch.set_num_threads(cpu_threads(job))
    shapes = [("x", (sim.numel,))]
    problem = problem_of(job, shapes)
    with Islands(job, shapes, problem, with_parameters=True) as islands:
        start = _stand(islands, problem)
        virtual_s, real_s = _run(islands)
    _refuse_diverged(islands, job)
    return _result(job, islands, sim.numel, virtual_s, real_s, start, _stand(islands, problem))


def account_of_model(job: Job, model: nn.Module, *, first_step: int) -> Virtual:
    """Time and bytes of the job's rounds over the buckets of a model, whose parameters do not move; no more than these depend on
    what is sent. Of the steps after ``first_step``."""
    recipe = build_recipe(job)
    trained = ((name, nn.Parameter(p.detach().clone())) for name, p in model.named_parameters() if p.requires_grad)
    flat = flatten(trained, recipe.include, recipe.exclude)
    shapes = [(name, tuple(p.shape)) for name, p in zip(flat.names, flat.parameters, strict=True)]
    with Islands(job, shapes, problem_of(job, shapes), first_step, with_parameters=False) as islands:
        return _result(job, islands, flat.numel, *_run(islands), None, None, first_step)


def write(run: Path, virtual: Virtual) -> None:
    metrics.write_json(run / "virtual.json", asdict(virtual))


def rows(virtual: Virtual) -> list[Row]:
    """The thing, its value, what it means."""
    accounts = virtual.accounts
    waited = [account.waited_s for account in accounts]
    spent_s = sum(account.ended_s for account in accounts)
    share = f"{100 * sum(waited) / spent_s:.1f} %" if spent_s else "0.0 %"
    seconds = f"{units.show_seconds(statistics.mean(waited))} an island, {share}"
    shown: list[Row] = [
        ("Virtual time", units.show_seconds(virtual.virtual_s), f"for {virtual.steps:,} steps of {virtual.islands:,} islands"),
        ("Waited for the link", seconds, f"at most {units.show_seconds(max(waited))}; the rest is computing"),
        (
            "Bytes an island sent",
            units.show_bytes(statistics.mean(account.wire_bytes_sent for account in accounts)),
            f"in {statistics.mean(account.rounds for account in accounts):,.0f} rounds of a bucket",
        ),
    ]
    if any(virtual.resent_bytes):
        resent = units.show_bytes(statistics.mean(virtual.resent_bytes))
        shown.append(("Sent again", resent, "by an island, for packets that were lost"))
    if virtual.start is not None and virtual.end is not None:
        distance = f"{virtual.start.consensus_distance:.4g}, then {virtual.end.consensus_distance:.4g}"
        shown.append(("Islands apart", distance, "root mean square distance from their mean"))
        if virtual.start.gap is not None and virtual.end.gap is not None:
            gap = f"{virtual.start.gap:.4g}, then {virtual.end.gap:.4g}"
            shown.append(("Loss above the best", gap, "of the islands' mean"))
    shown.append(("Took", units.show_seconds(virtual.real_s), "of this machine's time"))
    return shown


def _run(islands: Islands) -> tuple[float, float]:
    begun = time.monotonic()
    virtual_s = islands.run()
    return virtual_s, time.monotonic() - begun


def _refuse_diverged(islands: Islands, job: Job) -> None:
    """Islands that never talk put nothing on a wire, where it would have been seen."""
    for node, x in enumerate(islands.parameters):
        if not bool(torch.isfinite(x).all()):
            said = f"the parameters of island {node} hold inf or NaN after {job.train.steps} steps of train.lr = {job.train.lr:g}"
            raise NonFinite(f"{said}; use a smaller train.lr")


def _stand(islands: Islands, problem: Problem) -> Stand:
    each = islands.parameters
    return Stand(consensus_distance(each), problem.gap(mean_of(each)) if isinstance(problem, Quadratic) else None)


def _result(
    job: Job,
    islands: Islands,
    numel: int,
    virtual_s: float,
    real_s: float,
    start: Stand | None,
    end: Stand | None,
    first_step: int = 0,
) -> Virtual:
    return Virtual(
        problem=job.sim.problem,
        recipe=job.sync.recipe or "",
        islands=job.islands.count,
        parameters=numel,
        steps=job.train.steps - first_step,
        virtual_s=virtual_s,
        real_s=real_s,
        start=start,
        end=end,
        accounts=islands.accounts,
        resent_bytes=islands.resent_bytes,
    )



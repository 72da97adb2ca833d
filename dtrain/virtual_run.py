"""What would a job's islands wait for, and where would they end? ``[sim]`` of a job file, run on a virtual clock, in numbers."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dtrain import metrics, units
from dtrain.assemble import assemble
from dtrain.bucket import flatten
from dtrain.build import build_recipe
from dtrain.config import Job
from dtrain.errors import NonFinite
from dtrain.train import cpu_threads
from dtrain.virtual import Account, Shapes, Simulation
from dtrain.virtual_link import LinkModel, VirtualLink, Way
from dtrain.virtual_problem import Consensus, Problem, Quadratic, Still, consensus_distance, drawn_quadratic, mean_of

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
    sim, seed, count = job.sim, job.job.seed, job.islands.count
    # With two, a copy of 40,000 bytes is shared by OpenMP threads that spin for each other: 10 times slower on a busy machine.
    torch.set_num_threads(cpu_threads(job))
    quadratic = drawn_quadratic(count, sim.numel, seed) if sim.problem == "quadratic" else None
    problem = Consensus(sim.numel, seed) if quadratic is None else quadratic
    simulation, link = _simulation(job, [("x", (sim.numel,))], problem, 0)
    start = _stand(simulation, quadratic)
    virtual_s, real_s = _run(simulation, job.train.steps)
    _refuse_diverged(simulation, job)
    return _result(job, simulation, link, virtual_s, real_s, start, _stand(simulation, quadratic))


def account_of_model(job: Job, model: nn.Module, *, first_step: int) -> Virtual:
    """Time and bytes of the job's rounds over the buckets of a model, whose parameters do not move; no more than these depend on
    what is sent. Of the steps after ``first_step``."""
    flat = flatten((name, nn.Parameter(p.detach().clone())) for name, p in model.named_parameters() if p.requires_grad)
    shapes = [(name, tuple(p.shape)) for name, p in zip(flat.names, flat.parameters, strict=True)]
    simulation, link = _simulation(job, shapes, Still(flat.numel), first_step)
    return _result(job, simulation, link, *_run(simulation, job.train.steps), None, None, first_step)


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


def _simulation(job: Job, shapes: Shapes, problem: Problem, first_step: int) -> tuple[Simulation, VirtualLink]:
    count, seed = job.islands.count, job.job.seed
    link = VirtualLink(_link_model(job), count, seed)
    simulation = Simulation(
        assemble(build_recipe(job), seed, count), count, shapes, problem,
        lr=job.train.lr, link=link, compute_s=_pace(job), first_step=first_step,
    )  # fmt: skip
    return simulation, link


def _link_model(job: Job) -> LinkModel:
    path = Way(units.bits_per_s(job.link.rate), units.seconds(job.link.rtt))
    between = {pair: Way(*said) for pair, said in units.links(job.sim.links).items()}
    return LinkModel(path, units.seconds(job.sim.jitter), job.sim.loss, between)


def slow_islands(job: Job, count: int) -> set[int]:
    """Of ``count``, those that compute longer; all, where there are no more than the job names."""
    many = job.sim.stragglers
    num_slow = min(count, int(many)) if many >= 1 else round(many * count)
    return set(random.Random(f"stragglers/{job.job.seed}").sample(range(count), num_slow))


def _pace(job: Job) -> Callable[[int], float]:
    """Island -> the seconds of its next step: step_s, times straggler_factor where it is slow, times exp(s z - s^2 / 2) for
    step_noise s and z drawn from the normal distribution, which is 1 in the mean."""
    sim, count, sigma = job.sim, job.islands.count, job.sim.step_noise
    slow = slow_islands(job, count)
    usual = [sim.step_s * (sim.straggler_factor if node in slow else 1.0) for node in range(count)]
    if not sigma:
        return usual.__getitem__
    draws = [np.random.default_rng((job.job.seed, 2, node)) for node in range(count)]
    return lambda node: usual[node] * draws[node].lognormal(-sigma * sigma / 2, sigma)


def _run(simulation: Simulation, steps: int) -> tuple[float, float]:
    begun = time.monotonic()
    virtual_s = simulation.run(steps)
    return virtual_s, time.monotonic() - begun


def _refuse_diverged(simulation: Simulation, job: Job) -> None:
    """Islands that never talk put nothing on a wire, where it would have been seen."""
    for node, x in enumerate(simulation.parameters):
        if not bool(torch.isfinite(x).all()):
            said = f"the parameters of island {node} hold inf or NaN after {job.train.steps} steps of train.lr = {job.train.lr:g}"
            raise NonFinite(f"{said}; use a smaller train.lr")


def _stand(simulation: Simulation, problem: Quadratic | None) -> Stand:
    each = simulation.parameters
    return Stand(consensus_distance(each), None if problem is None else problem.gap(mean_of(each)))


def _result(
    job: Job,
    simulation: Simulation,
    link: VirtualLink,
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
        parameters=simulation.parameters[0].numel(),
        steps=job.train.steps - first_step,
        virtual_s=virtual_s,
        real_s=real_s,
        start=start,
        end=end,
        accounts=simulation.accounts,
        resent_bytes=link.resent_bytes,
    )



"""What does a job say of a simulation on the virtual clock? The same in each of its processes, and so is what follows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from dtrain import units
from dtrain.assemble import assemble
from dtrain.build import build_recipe
from dtrain.config import Job
from dtrain.virtual import Shapes, Simulation
from dtrain.virtual_link import LinkModel, VirtualLink, Way
from dtrain.virtual_problem import Consensus, Problem, Still, drawn_quadratic


def problem_of(job: Job, shapes: Shapes) -> Problem:
    """Still where a model is trained elsewhere."""
    sim, seed = job.sim, job.job.seed
    if sim.problem == "quadratic":
        return drawn_quadratic(job.islands.count, sim.numel, seed)
    if sim.problem == "consensus":
        return Consensus(sim.numel, seed)
    return Still(numel_of(shapes))


def numel_of(shapes: Shapes) -> int:
    return sum(math.prod(shape) for _, shape in shapes)


def simulation_of(
    job: Job, shapes: Shapes, problem: Problem, first_step: int, nodes: Sequence[int] | None = None
) -> tuple[Simulation, VirtualLink]:
    """With the islands ``nodes``; None: all."""
    count, seed = job.islands.count, job.job.seed
    link = VirtualLink(link_model(job), count, seed)
    simulation = Simulation(
        assemble(build_recipe(job), seed, count), count, shapes, problem,
        lr=job.train.lr, link=link, compute_s=_pace(job), first_step=first_step, nodes=nodes,
    )  # fmt: skip
    return simulation, link


def link_model(job: Job) -> LinkModel:
    path = Way(units.bits_per_s(job.link.rate), units.seconds(job.link.rtt))
    between = {pair: Way(*said) for pair, said in units.links(job.sim.links).items()}
    return LinkModel(path, units.seconds(job.sim.jitter), job.sim.loss, between)


def slow_islands(job: Job, count: int) -> set[int]:
    """Of ``count``, those that compute longer; all, where there are no more than the job names."""
    many = job.sim.stragglers
    num_slow = min(count, int(many)) if many >= 1 else round(many * count)
    return set(random.Random(f"stragglers/{job.job.seed}").sample(range(count), num_slow))


def _pace(job: Job) -> Callable[[int], float]:
    """Island -> the seconds of its next step: step_s over its speed, times straggler_factor where it is slow, times
    exp(s z - s^2 / 2) for step_noise s and z drawn from the normal distribution, which is 1 in the mean."""
    sim, count, sigma = job.sim, job.islands.count, job.sim.step_noise
    slow, speeds = slow_islands(job, count), job.islands.speeds or [1.0] * count
    usual = [sim.step_s * (sim.straggler_factor if node in slow else 1.0) / speeds[node] for node in range(count)]
    if not sigma:
        return usual.__getitem__
    draws = [np.random.default_rng((job.job.seed, 2, node)) for node in range(count)]
    return lambda node: usual[node] * draws[node].lognormal(-sigma * sigma / 2, sigma)

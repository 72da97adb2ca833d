"""Which named methods are there? One row a recipe: the answers to the eight questions, in words that a job file can
override.

Pure: no torch. ``assemble.py`` turns a row into code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from dtrain import topology as topologies

DEFAULT_RECIPE = "delayed_diloco"
"""What join, the quickstart and the README use when nothing is said."""


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    summary: str
    paper: str
    algorithm: Literal["local", "allreduce", "dpsgd", "choco", "diloco"]
    payload: Literal["none", "gradients", "parameters", "differences", "pseudo_gradients"]
    every: int
    reduce: Literal["none", "neighbours", "gather", "all_to_all"] = "all_to_all"
    topology: Literal["complete", "ring", "one_peer_exponential", "random_pairs"] = "complete"
    codec: str = "identity"
    error_feedback: bool = False
    combine: Literal["mean", "gossip"] = "mean"
    outer: Literal["copy", "sgd", "nesterov"] = "copy"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    gamma: float = 1.0
    delay: int | Literal["round"] = 0
    landing: Literal["keep", "eager"] = "keep"
    fragments: int = 1
    bucket_bytes: int | None = None

    @property
    def delay_steps(self) -> int:
        return self.every if self.delay == "round" else self.delay


_ROWS = (
    Recipe(
        name="local",
        summary="islands never talk; one exact merge at the end",
        paper="the floor",
        algorithm="local",
        payload="none",
        reduce="none",
        every=1,
    ),
    Recipe(
        name="allreduce",
        summary="gradients averaged every step, in fp32: the baseline",
        paper="synchronous data parallelism",
        algorithm="allreduce",
        payload="gradients",
        every=1,
    ),
    Recipe(
        name="fedavg",
        summary="parameters averaged every 50 steps",
        paper="McMahan et al. 2017, arXiv 1602.05629",
        algorithm="diloco",
        payload="pseudo_gradients",
        every=50,
    ),
    Recipe(
        name="diloco",
        summary="outer Nesterov on the mean progress of 100 local steps, in fp32, waited for",
        paper="Douillard et al. 2023, arXiv 2311.08105",
        algorithm="diloco",
        payload="pseudo_gradients",
        every=100,
        outer="nesterov",
        outer_lr=0.7,
        outer_momentum=0.9,
    ),
    Recipe(
        name="delayed_diloco",
        summary="DiLoCo with 4-bit pseudo-gradients, error feedback, and rounds that fly while training goes on",
        paper="arXiv 2311.08105, 2501.18512, 2506.21263",
        algorithm="diloco",
        payload="pseudo_gradients",
        every=28,
        codec="int4:64",
        error_feedback=True,
        outer="nesterov",
        outer_lr=0.7,
        outer_momentum=0.6,
        delay=6,
    ),
    Recipe(
        name="dpsgd",
        summary="every step, one peer's parameters, a step late",
        paper="Lian et al. 2017, arXiv 1705.09056",
        algorithm="dpsgd",
        payload="parameters",
        every=1,
        reduce="neighbours",
        topology="one_peer_exponential",
        combine="gossip",
        delay=1,
    ),
    Recipe(
        name="choco",
        summary="every step, 8-bit differences to the ring's neighbours, a step late",
        paper="Koloskova et al. 2019, arXiv 1902.00340",
        algorithm="choco",
        payload="differences",
        every=1,
        reduce="neighbours",
        topology="ring",
        codec="int8:64",
        combine="gossip",
        gamma=0.9,
        delay=1,
    ),
)

RECIPES: dict[str, Recipe] = {row.name: row for row in _ROWS}

AXES = tuple(f.name for f in fields(Recipe) if f.name not in ("name", "summary", "paper", "payload", "combine"))
"""What a job file or join() may override."""


def resolve(name: str | None, overrides: Mapping[str, object], num_islands: int) -> Recipe:
    """The named row with its overrides, checked as a whole; raises ValueError with one line."""
    wanted = name or DEFAULT_RECIPE
    if wanted not in RECIPES:
        raise ValueError(f"recipe {wanted!r} is not known; use one of {', '.join(sorted(RECIPES))}")
    changes = {key: value for key, value in overrides.items() if value is not None}
    unknown = sorted(set(changes) - set(AXES))
    assert not unknown, unknown
    recipe = replace(RECIPES[wanted], **changes)
    _check(recipe, num_islands)
    return recipe


def _check(r: Recipe, num_islands: int) -> None:
    if r.delay != "round" and r.delay > r.every:
        raise ValueError(
            f"sync.delay = {r.delay} is longer than sync.every = {r.every}: a round must land before the next starts; "
            f'use at most {r.every}, or "round"'
        )
    smallest = topologies.MIN_NODES[r.topology]
    if num_islands < smallest:
        raise ValueError(
            f'sync.topology = "{r.topology}" needs at least {smallest} islands, got {num_islands}; use "complete"'
        )
    paths = {
        "local": ("none",),
        "allreduce": ("gather", "all_to_all"),
        "dpsgd": ("neighbours", "gather", "all_to_all"),
        "choco": ("neighbours",),
        "diloco": ("gather", "all_to_all"),
    }[r.algorithm]
    if r.reduce not in paths:
        raise ValueError(
            f'sync.reduce = "{r.reduce}" does not fit sync.algorithm = "{r.algorithm}"; use one of {", ".join(paths)}'
        )
    if r.reduce in ("gather", "all_to_all") and r.topology != "complete":
        raise ValueError(
            f'sync.topology = "{r.topology}" has no effect with sync.reduce = "{r.reduce}"; use reduce = "neighbours"'
        )
    if r.algorithm == "choco" and r.topology not in topologies.STATIC:
        raise ValueError(
            f"choco keeps sums of its neighbours' public copies, so its topology must not change by round; "
            f'"{r.topology}" does: use one of {", ".join(sorted(topologies.STATIC))}'
        )
    if r.landing == "eager" and (r.algorithm != "diloco" or r.delay_steps == 0):
        raise ValueError(
            'sync.landing = "eager" is for algorithm = "diloco" with a delay; use landing = "keep", or set sync.delay'
        )
    if r.algorithm == "allreduce" and (r.every != 1 or r.delay_steps != 0 or r.fragments != 1):
        raise ValueError(
            "allreduce averages gradients each step before the update; every = 1, delay = 0 and fragments = 1 are all it can do"
        )
    if r.fragments > r.every:
        raise ValueError(
            f"sync.fragments = {r.fragments} cannot take turns within sync.every = {r.every} steps; use at most {r.every}"
        )

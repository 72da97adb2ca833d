"""Which named methods are there? One row a recipe: the answers to the eight questions, in words that a job file can
override.

Pure: no torch. ``assemble.py`` turns a row into code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dtrain import own
from dtrain.recipe_fits import check_together, check_used, check_values

DEFAULT_RECIPE = "delayed_diloco"
"""What join, the quickstart and the README use when nothing is said."""


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    summary: str
    paper: str
    algorithm: Literal[
        "local", "allreduce", "dpsgd", "push_sum", "multi_gossip", "chebyshev", "deepsqueeze", "gradient_tracking", "choco",
        "beer", "diloco", "own",
    ]  # fmt: skip
    payload: Literal["none", "gradients", "parameters", "differences", "pseudo_gradients"]
    every: int
    reduce: Literal["none", "neighbours", "gather", "all_to_all"] = "all_to_all"
    topology: str = "complete"
    graph: str | None = None
    codec: str = "identity"
    error_feedback: bool = False
    combine: Literal["mean", "gossip", "push"] = "mean"
    """push: gossip whose weights keep another mean than the plain one."""
    outer: Literal["copy", "sgd", "nesterov"] = "copy"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    gamma: float = 1.0
    gossip_steps: int = 1
    delay: int | Literal["round"] = 0
    landing: Literal["keep", "eager"] = "keep"
    fragments: int = 1
    bucket_bytes: int | None = None
    method: Callable[..., Any] | None = None
    """Of algorithm = "own" (``own.py``): (recipe, mixing) -> ``dtrain.algorithm.Method``."""
    moments_every: int | None = None
    """s of AccumAdamW, which the method is defined with; None: any optimizer."""

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
        name="decent_adam",
        summary="decentralized AdamW: every step, one peer's parameters, a step late, mixed and updated in one pass",
        paper="arXiv 2410.11998",
        algorithm="dpsgd",
        payload="parameters",
        every=1,
        reduce="neighbours",
        topology="one_peer_exponential",
        combine="gossip",
        delay=1,
        moments_every=1,
    ),
    Recipe(
        name="accum_adam",
        summary="decent_adam whose moments follow the mean gradient of 4 steps, as if the batch were 4 times larger",
        paper="arXiv 2410.11998",
        algorithm="dpsgd",
        payload="parameters",
        every=1,
        reduce="neighbours",
        topology="one_peer_exponential",
        combine="gossip",
        delay=1,
        moments_every=4,
    ),
    Recipe(
        name="push_sum",
        summary="every step, over links that go one way: parameters to those that the graph says, a step late",
        paper="Assran et al. 2019, arXiv 1811.10792",
        algorithm="push_sum",
        payload="parameters",
        every=1,
        reduce="neighbours",
        topology="directed",
        graph="cycle",
        combine="push",
        delay=1,
    ),
    Recipe(
        name="multi_gossip",
        summary="every 4 steps, 4 gossip steps in a row with the ring's neighbours",
        paper="Shi et al. 2023, arXiv 2302.04083 (MGS)",
        algorithm="multi_gossip",
        payload="parameters",
        every=4,
        reduce="neighbours",
        topology="ring",
        combine="gossip",
        gossip_steps=4,
        delay=4,
    ),
    Recipe(
        name="chebyshev",
        summary="multi_gossip by Chebyshev's polynomial: less disagreement is left after as many steps",
        paper="Scaman et al. 2017, arXiv 1702.08704",
        algorithm="chebyshev",
        payload="parameters",
        every=4,
        reduce="neighbours",
        topology="ring",
        combine="gossip",
        gossip_steps=4,
        delay=4,
    ),
    Recipe(
        name="deepsqueeze",
        summary="every step, 8-bit parameters with error feedback to one peer, a step late",
        paper="Tang et al. 2019, arXiv 1907.07346",
        algorithm="deepsqueeze",
        payload="parameters",
        every=1,
        reduce="neighbours",
        topology="one_peer_exponential",
        codec="int8:64",
        error_feedback=True,
        combine="gossip",
        gamma=0.5,
        delay=1,
    ),
    Recipe(
        name="gradient_tracking",
        summary="every step, parameters and an estimate of the mean gradient, to one peer",
        paper="Nedic et al. 2017, arXiv 1607.03218",
        algorithm="gradient_tracking",
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
    Recipe(
        name="beer",
        summary="gradient tracking with 8-bit differences to the ring's neighbours",
        paper="Zhao et al. 2022, arXiv 2201.13320",
        algorithm="beer",
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

_NO_AXES = ("name", "summary", "paper", "payload", "combine", "method", "moments_every")
AXES = tuple(f.name for f in fields(Recipe) if f.name not in _NO_AXES)
"""What a job file or join() may override."""

FUSED = frozenset({"dpsgd", "choco"})
"""Algorithms that can land, step and send in one pass, where dtrain's AccumAdamW owns the update."""

_WORDS = {axis: get_args(hint) for axis, hint in get_type_hints(Recipe).items() if get_origin(hint) is Literal}
"""The axes that are answered by one of a few words."""


def resolve(name: str | None, overrides: Mapping[str, object], num_islands: int) -> Recipe:
    """The named row with its overrides, checked as a whole; raises ValueError with one line."""
    wanted = name or DEFAULT_RECIPE
    if not own.is_own(wanted) and wanted not in RECIPES:
        raise ValueError(f"recipe {wanted!r} is not known; use one of {', '.join(sorted(RECIPES))}, or FILE.py:ROW")
    row = own.load(wanted) if own.is_own(wanted) else RECIPES[wanted]
    changes = {key: value for key, value in overrides.items() if value is not None}
    unknown = sorted(set(changes) - set(AXES))
    assert not unknown, unknown
    recipe = replace(row, **changes)
    if (recipe.algorithm == "own") != callable(recipe.method):
        raise ValueError(
            'sync.algorithm = "own" is for a row of your own file that has a method, and for nothing else; use sync.recipe = '
            '"FILE.py:ROW"'
        )
    check_values(recipe, _WORDS)
    check_used(recipe, row, changes)
    check_together(recipe, num_islands)
    return recipe


def of_section(sync: Mapping[str, object], num_islands: int) -> Recipe:
    """The recipe that a job file's [sync] describes: the row that it names, with its other keys over it."""
    name = sync.get("recipe")
    assert name is None or isinstance(name, str)
    return resolve(name, {key: value for key, value in sync.items() if key != "recipe"}, num_islands)

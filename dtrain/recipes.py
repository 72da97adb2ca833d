"""Which named methods are there? One row a recipe: the answers to the eight questions, in words that a job file can
override.

Pure: no torch. ``assemble.py`` turns a row into code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeGuard, get_args, get_origin, get_type_hints

from dtrain import codec_name
from dtrain import topology as topologies

DEFAULT_RECIPE = "delayed_diloco"
"""What join, the quickstart and the README use when nothing is said."""


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    summary: str
    paper: str
    algorithm: Literal[
        "local", "allreduce", "dpsgd", "push_sum", "multi_gossip", "chebyshev", "deepsqueeze", "gradient_tracking", "choco",
        "beer", "diloco",
    ]  # fmt: skip
    payload: Literal["none", "gradients", "parameters", "differences", "pseudo_gradients"]
    every: int
    reduce: Literal["none", "neighbours", "gather", "all_to_all"] = "all_to_all"
    topology: str = "complete"
    graph: str | None = None
    codec: str = "identity"
    error_feedback: bool = False
    combine: Literal["mean", "gossip"] = "mean"
    outer: Literal["copy", "sgd", "nesterov"] = "copy"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    gamma: float = 1.0
    gossip_steps: int = 1
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
        name="push_sum",
        summary="every step, over links that go one way: parameters to those that the graph says, a step late",
        paper="Assran et al. 2019, arXiv 1811.10792",
        algorithm="push_sum",
        payload="parameters",
        every=1,
        reduce="neighbours",
        topology="directed",
        graph="cycle",
        combine="gossip",
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
        summary="multi_gossip with the steps of Chebyshev's polynomial, which leave the least disagreement",
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

AXES = tuple(f.name for f in fields(Recipe) if f.name not in ("name", "summary", "paper", "payload", "combine"))
"""What a job file or join() may override."""

FUSED = frozenset({"dpsgd", "choco"})
"""Algorithms that can land, step and send in one pass, where dtrain's AccumAdamW owns the update."""

_WORDS = {axis: get_args(hint) for axis, hint in get_type_hints(Recipe).items() if get_origin(hint) is Literal}
"""The axes that are answered by one of a few words."""

MOST_GOSSIP_STEPS = 64
"""A wire's name has 6 bits for the phase of its round."""

REWRITES_GRADIENTS = frozenset({"allreduce", "gradient_tracking", "beer"})
"""Algorithms that exchange something before each update, which waits for it."""

_NEED_STATIC = {
    "choco": "keeps sums of its neighbours' public copies",
    "beer": "keeps sums of its neighbours' public copies",
    "chebyshev": "has the polynomial of one matrix",
}

_ROUNDS = frozenset({"every", "delay", "fragments", "codec", "error_feedback", "reduce", "bucket_bytes"})
_USED: Mapping[str, frozenset[str]] = {
    "local": frozenset({"bucket_bytes"}),
    "allreduce": _ROUNDS,
    "dpsgd": _ROUNDS | {"topology", "graph"},
    "push_sum": _ROUNDS | {"topology", "graph"},
    "multi_gossip": _ROUNDS | {"topology", "graph", "gossip_steps"},
    "chebyshev": _ROUNDS | {"topology", "graph", "gossip_steps"},
    "deepsqueeze": _ROUNDS | {"topology", "graph", "gamma"},
    "gradient_tracking": (_ROUNDS - {"error_feedback"}) | {"topology", "graph"},
    "beer": (_ROUNDS - {"error_feedback"}) | {"topology", "graph", "gamma"},
    "choco": (_ROUNDS - {"error_feedback"}) | {"topology", "graph", "gamma"},
    "diloco": _ROUNDS | {"topology", "landing", "outer", "outer_lr", "outer_momentum"},
}
"""The axes that say something to an algorithm; any other would be ignored, so it is refused."""


def resolve(name: str | None, overrides: Mapping[str, object], num_islands: int) -> Recipe:
    """The named row with its overrides, checked as a whole; raises ValueError with one line."""
    wanted = name or DEFAULT_RECIPE
    if wanted not in RECIPES:
        raise ValueError(f"recipe {wanted!r} is not known; use one of {', '.join(sorted(RECIPES))}")
    changes = {key: value for key, value in overrides.items() if value is not None}
    unknown = sorted(set(changes) - set(AXES))
    assert not unknown, unknown
    recipe = replace(RECIPES[wanted], **changes)
    _check_values(recipe)
    _check_used(recipe, RECIPES[wanted], changes)
    _check(recipe, num_islands)
    return recipe


def of_section(sync: Mapping[str, object], num_islands: int) -> Recipe:
    """The recipe that a job file's [sync] describes: the row that it names, with its other keys over it."""
    name = sync.get("recipe")
    assert name is None or isinstance(name, str)
    return resolve(name, {key: value for key, value in sync.items() if key != "recipe"}, num_islands)


def _check_values(r: Recipe) -> None:
    """A job file's types are checked where it is read; those of join() only here."""
    for axis, words in _WORDS.items():
        value = getattr(r, axis)
        if value not in words:
            raise ValueError(f"{axis} = {value!r} is not known; use one of {', '.join(map(str, words))}")
    codec_name.parse(r.codec)
    ranges: tuple[tuple[str, bool, str], ...] = (
        ("every", _is_int(r.every) and r.every >= 1, "1 or more"),
        ("fragments", _is_int(r.fragments) and r.fragments >= 1, "1 or more"),
        ("delay", r.delay == "round" or (_is_int(r.delay) and r.delay >= 0), '0 or more, or "round"'),
        ("error_feedback", isinstance(r.error_feedback, bool), "true or false"),
        ("outer_lr", _is_number(r.outer_lr) and r.outer_lr > 0, "a number above 0"),
        ("outer_momentum", _is_number(r.outer_momentum) and 0 <= r.outer_momentum < 1, "0 or more and less than 1"),
        ("gamma", _is_number(r.gamma) and 0 < r.gamma <= 1, "more than 0 and at most 1"),
        ("gossip_steps", _is_int(r.gossip_steps) and 1 <= r.gossip_steps <= MOST_GOSSIP_STEPS, f"1 to {MOST_GOSSIP_STEPS}"),
        ("bucket_bytes", r.bucket_bytes is None or (_is_int(r.bucket_bytes) and r.bucket_bytes >= 4), "4 or more"),
    )
    for axis, allowed, words in ranges:
        if not allowed:
            raise ValueError(f"{axis} = {getattr(r, axis)!r} is not allowed; use {words}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return _is_int(value) or isinstance(value, float)


def _check_used(r: Recipe, row: Recipe, changes: Mapping[str, object]) -> None:
    """Refuse an axis that was changed and would have no effect."""
    used = _USED[r.algorithm] | {"algorithm"}
    idle = {"copy": {"outer_lr", "outer_momentum"}, "sgd": {"outer_momentum"}, "nesterov": set()}[r.outer]
    for axis, value in changes.items():
        if value == getattr(row, axis) or axis in used - idle:
            continue
        reason = f'outer = "{r.outer}"' if axis in used & idle else f'algorithm = "{r.algorithm}"'
        raise ValueError(f"sync.{axis} = {value!r} has no effect with sync.{reason}; leave it out, or choose another recipe")


def _check(r: Recipe, num_islands: int) -> None:
    if r.delay != "round" and r.delay > r.every:
        raise ValueError(
            f"sync.delay = {r.delay} is longer than sync.every = {r.every}: a round must land before the next starts; "
            f'use at most {r.every}, or "round"'
        )
    topologies.check(r.topology, r.graph, num_islands)
    paths = {
        "local": ("none",),
        "allreduce": ("gather", "all_to_all"),
        "dpsgd": ("neighbours", "gather", "all_to_all"),
        "push_sum": ("neighbours",),
        "multi_gossip": ("neighbours",),
        "chebyshev": ("neighbours",),
        "deepsqueeze": ("neighbours",),
        "gradient_tracking": ("neighbours",),
        "beer": ("neighbours",),
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
    if r.algorithm in _NEED_STATIC and r.topology not in topologies.STATIC:
        raise ValueError(
            f"{r.algorithm} {_NEED_STATIC[r.algorithm]}, so its topology must not change by round; "
            f'"{r.topology}" does: use one of {", ".join(topologies.STATIC)}'
        )
    if (r.topology in topologies.DIRECTED) != (r.algorithm == "push_sum"):
        raise ValueError(
            f'sync.algorithm = "{r.algorithm}" needs a topology whose rows and columns sum to one, and those of "{r.topology}" '
            'need not: use sync.recipe = "push_sum"'
            if r.topology in topologies.DIRECTED
            else f'push_sum is for links that go one way, and those of sync.topology = "{r.topology}" go both; use topology = '
            '"directed", or sync.recipe = "dpsgd"'
        )
    if r.landing == "eager" and (r.algorithm != "diloco" or r.delay_steps == 0):
        raise ValueError(
            'sync.landing = "eager" is for algorithm = "diloco" with a delay; use landing = "keep", or set sync.delay'
        )
    if r.algorithm == "allreduce" and (r.every != 1 or r.delay_steps != 0 or r.fragments != 1):
        raise ValueError(
            "allreduce averages gradients each step before the update; every = 1, delay = 0 and fragments = 1 are all it can do"
        )
    if r.algorithm in REWRITES_GRADIENTS and (r.every != 1 or r.fragments != 1):
        raise ValueError(f"{r.algorithm} exchanges something before each update; every = 1 and fragments = 1 are all it can do")
    if r.algorithm == "beer" and r.delay_steps != 1:
        raise ValueError(f"beer mixes with the public copies of the step before: use sync.delay = 1, not {r.delay!r}")
    if r.fragments > r.every:
        raise ValueError(
            f"sync.fragments = {r.fragments} cannot take turns within sync.every = {r.every} steps; use at most {r.every}"
        )

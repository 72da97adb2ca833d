"""Which recipes could a job use? The rows of recipe_rows.py, with the topologies and codecs that fit them and so many islands.

Left out are rows that are only simulated, those whose rounds do not come at even distances, and those that the job refuses: ones
defined with SAM where train.sam_rho is 0, with AdamW where it trains with Muon, and those whose islands have one rank where
islands.ranks is more. A row of Muon is looked at where the job has Muon too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from dtrain import chosen
from dtrain import topology as topologies
from dtrain.codec_fits import refused
from dtrain.matrices import highest, rank_of
from dtrain.methods import RULES, InnerOptimizer
from dtrain.own_topology import mixing_of
from dtrain.plan.order import FEWEST_ROUNDS
from dtrain.recipe_fits import check_ranks, check_trains
from dtrain.recipes import RECIPES, Recipe, resolve
from dtrain.topology.consensus import consensus

CODECS = ("identity", "bf16", "int8:64", "int4:64")
_MOST_COMPLETE = 16
"""Islands up to which gossip with everyone is looked at: it keeps a wire of each of the others."""
_LONGER = (4, 16)
"""Times as many steps between two rounds, for links on which an outer loop's own are too few. Gossip's rounds are a part of how
it is defined: less often, it is another method."""
_MOST_EVERY = 500
"""What DiLoCo was published with; more is known to cost quality."""
_FEW_BITS = ("int4:64",)
"""Codecs that lose so much of a pseudo-gradient that what they lost must go out with the next round."""


def candidates(
    asked: Recipe, num_islands: int, *, per_host: int = 1, sam_rho: float | None = None, steps: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None, optimizer: InnerOptimizer | None = None, num_ranks: int = 1,
    moments_every: int | None = None,
) -> list[Recipe]:  # fmt: skip
    """The recipe that the job asks for, first; then all others, each once. ``sam_rho``, ``steps``, ``optimizer`` and
    ``moments_every`` are the job's own; outer loops that have fewer than ``FEWEST_ROUNDS`` rounds in so many steps are left out,
    and rows with a rank that no shared parameter of ``shapes`` is sent by."""
    check_plannable(asked)
    check_ranks(asked, num_ranks)
    if shapes is not None:
        kept = chosen.shared(list(shapes), asked.include, asked.exclude)
        shapes = {name: shape for name, shape in shapes.items() if name in kept}
    found = {_key(asked): asked}
    for row in RECIPES.values():
        if RULES[row.algorithm].simulated is not None or row.schedule != "every":
            continue
        one_rank = RULES[row.algorithm].one_rank is not None or row.quorum is not None
        if (row.sam_rho is not None and sam_rho == 0) or (one_rank and num_ranks > 1):
            continue
        if not _steps_with(row, optimizer, asked) or (moments_every is not None and RULES[row.algorithm].signs):
            continue
        if row.rank is not None and shapes is not None and not any(rank_of(n, s, highest(row.rank)) for n, s in shapes.items()):
            continue
        for overrides in _variants(row, num_islands, per_host, steps):
            if refused(replace(row, **overrides), num_islands) is not None:  # 4 bits and this gamma, say, over this topology
                continue
            recipe = resolve(row.name, overrides | _of_job(asked, row), num_islands)
            found.setdefault(_key(recipe), recipe)
    return list(found.values())


def _of_job(asked: Recipe, row: Recipe) -> dict[str, Any]:
    """What the job says of any recipe: what islands share, and where an outer loop's state lies."""
    state = {"outer_state": asked.outer_state} if "outer_state" in RULES[row.algorithm].axes else {}
    return {"include": asked.include, "exclude": asked.exclude} | state


def _steps_with(row: Recipe, optimizer: InnerOptimizer | None, asked: Recipe) -> bool:
    """Whether the job would train with the optimizer that the row is defined with, and all that it trains."""
    if row.optimizer is not None:
        return row.optimizer in (optimizer, asked.optimizer)
    if RULES[row.algorithm].signs:
        return optimizer is None and asked.include is None and asked.exclude is None
    return (row.moments_every is None and row.moments is None) or optimizer in ("adamw", None)


def check_plannable(recipe: Recipe) -> None:
    """Raises ValueError for a recipe whose rounds do not come at even distances: a step's mean would mean nothing."""
    check_trains(recipe)
    if recipe.schedule != "every":
        how = "come when two are ready" if recipe.schedule == "ready" else "come ever faster"
        raise ValueError(
            f'sync.schedule = "{recipe.schedule}": its rounds {how}, and dtrain plan looks at a step like any other; '
            'plan with sync.schedule=every'
        )


def _variants(row: Recipe, num_islands: int, per_host: int, steps: int | None) -> Iterator[dict[str, Any]]:
    if row.payload == "none":
        yield {}
        return
    several = "gossip_steps" in RULES[row.algorithm].axes
    for (topology, graph), codec, (every, delay) in product(
        _topologies(row, num_islands, per_host), _codecs(row), _times(row, steps)
    ):
        feedback = True if row.payload == "pseudo_gradients" and codec in _FEW_BITS else row.error_feedback
        axes = {"topology": topology, "graph": graph, "codec": codec, "every": every, "delay": delay}
        if several and _exact(topology, graph, row.server, num_islands):
            axes["gossip_steps"] = 1
        yield axes | {"error_feedback": feedback and (codec != "identity" or row.reduce == "low_rank")}


def _topologies(row: Recipe, num_islands: int, per_host: int) -> list[tuple[str, str | None]]:
    own = (row.topology, row.graph)
    if row.reduce != "neighbours":
        return [own]
    names = ["ring", "one_peer_exponential", "torus", "hypercube"]
    names += ["complete"] if num_islands <= _MOST_COMPLETE else []
    names += [f"alternating_exp_ring:{per_host}"] if per_host > 1 else []
    plain = [(name, None) for name in names if name != row.topology]
    looked_at = (own, *([("directed", "random_out:2")] if row.combine == "push" else plain))
    return [(name, graph) for name, graph in looked_at if _takes(row, name, graph) and _exists(row, name, graph, num_islands)]


def _takes(row: Recipe, topology: str, graph: str | None) -> bool:
    """Whether a method runs over a topology. No key of a job takes away the graph that a row names."""
    rules = RULES[row.algorithm]
    allowed = topologies.PAIRS if rules.pairs else topologies.STATIC if rules.static is not None else topologies.NAMES
    if topology == "complete" and row.gossip_steps > 1:
        return False
    return topologies.parameter(topology)[0] in allowed and (graph is not None or row.graph is None)


def _exists(row: Recipe, topology: str, graph: str | None, num_islands: int) -> bool:
    """Whether there is one for so many islands: a hypercube of 6, say, is none. Its one refusal is what is asked for."""
    try:
        topologies.check(topology, graph, num_islands, server=row.server)
    except ValueError:
        return False
    return True


def _codecs(row: Recipe) -> list[str]:
    if RULES[row.algorithm].signs:  # its momentum is what its codec does not send: with another it is another method
        return [row.codec]
    return list(dict.fromkeys((row.codec, *CODECS)))


@cache
def _exact(topology: str, graph: str | None, server: str | None, num_islands: int) -> bool:
    """Whether every round leaves the exact mean, as a ring of two or three does: more of them in a row would move nothing."""
    if num_islands > _MOST_COMPLETE:
        return False
    mixed = mixing_of(topology, graph, 0, server)
    return not mixed.drawn and mixed.period(num_islands) == 1 and consensus(mixed, num_islands).lambda2 == 0


def _times(row: Recipe, steps: int | None) -> list[tuple[int, int | str]]:
    """(every, delay): the row's own, and for an outer loop longer ones in proportion, those with rounds enough in the job."""
    if row.payload != "pseudo_gradients":
        return [(row.every, row.delay)]
    longer = [(row.every * k, row.delay_steps * k) for k in _LONGER if row.every * k <= _MOST_EVERY]
    return [time for time in ((row.every, row.delay), *longer) if steps is None or time[0] * FEWEST_ROUNDS <= steps]


def _key(recipe: Recipe) -> tuple[object, ...]:
    own = (recipe.outer, recipe.outer_lr, recipe.outer_momentum, recipe.gamma, recipe.landing, recipe.alpha, recipe.fragments)
    coded = (recipe.error_feedback, recipe.feedback_decay, recipe.reduce, recipe.rank)
    more = (*coded, recipe.gossip_steps, recipe.bucket_bytes, recipe.moments, recipe.outer_state)
    when = (recipe.every, recipe.every_adapts, recipe.delay_steps)
    talks = (recipe.topology, recipe.graph, recipe.server, recipe.codec, *when)
    return (recipe.name, *talks, *own, *more)

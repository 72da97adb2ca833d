"""What does each recipe cost at so many islands, which factor buys what, and which recipe should be taken?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from dtrain.bucket import whole
from dtrain.own_codec import codec_of
from dtrain.own_name import is_own
from dtrain.own_topology import mixing_of
from dtrain.plan.accelerators import Work
from dtrain.plan.company import LinkSpeed
from dtrain.plan.lateness import When
from dtrain.plan.memory import Memory, memory
from dtrain.plan.model import Island, StepTime, step_time
from dtrain.plan.sent import Sent, Shapes, sent
from dtrain.recipes import Recipe, rho_of
from dtrain.topology import parse_server
from dtrain.topology.consensus import consensus

NEAR_BEST = 0.05
"""Recipes that are slower than the fastest by no more than this are as good; predictions are not finer."""
MOST_LAMBDA2 = 64
"""Islands up to which eigenvalues are found: it is a column beside the point."""

_KINDS = {"gradients": (0, 16), "parameters": (1, 8), "differences": (1, 4), "pseudo_gradients": (2, 4), "none": (4, 0)}
"""Payload -> its place in the order, and the fewest bits a number with which it keeps it."""
_COARSE = 3
ORDER = (
    "all-reduce, gossip, local steps with an outer optimizer, codecs too coarse for what they carry; in each the shortest time "
    "between rounds first, then the most bits"
)
_BITS = {"identity": 32, "bf16": 16, "int8": 8, "int4": 4, "e3m0": 4, "lut4": 4, "sign": 1, "topk": 1}
_MANY = 2**20
"""Numbers, beside which a wire's header is nothing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A job without its recipe."""

    shapes: Shapes
    work: Work
    vocab: int
    tokens_per_step: int
    """Of one island."""
    num_ranks: int
    micro_batches: int
    moments_every: int | None
    number_bytes: int
    per_host: int
    seed: int
    link: LinkSpeed
    island: Callable[[str], Island]
    """Codec -> what computes, without SAM: codecs move bytes at unlike speeds."""
    sam_rho: float | None = None
    """The job's own."""
    factors: Callable[[int], tuple[float, ...] | None] = lambda _: None
    """Number of islands -> how many times longer each computes; None: all are alike."""


@dataclass(frozen=True, slots=True)
class Row:
    recipe: Recipe
    num_islands: int
    sent: Sent
    time: StepTime
    memory: Memory
    tokens_per_s: float
    """Of all islands together."""
    lambda2: float | None

    @property
    def bytes_per_step(self) -> float:
        return self.sent.mean_round_bytes / self.recipe.every


class Planner:
    """Counts what a recipe sends once, however often it is asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._sent: dict[tuple[Recipe, int], Sent] = {}
        self._lambda2: dict[tuple[str, str | None, str | None, int], float] = {}

    def row(self, recipe: Recipe, num_islands: int) -> Row:
        s = self.setting
        counted = self._count(recipe, num_islands)
        when = When(recipe.every, recipe.delay_steps, recipe.fragments)
        island = replace(s.island(recipe.codec), factors=s.factors(num_islands))
        sam = rho_of(recipe, s.sam_rho) > 0
        if sam:  # forward and backward twice
            island = replace(island, step_s=2 * island.step_s)
        time = step_time(counted, when, island, s.link)
        accumulates = (s.moments_every or recipe.moments_every or 1) > 1
        held = memory(
            counted, s.work, vocab=s.vocab, number_bytes=s.number_bytes, accumulates=accumulates, sam=sam,
            num_ranks=s.num_ranks, micro_batches=s.micro_batches,
        )  # fmt: skip
        speed = num_islands * s.tokens_per_step / time.step_s
        return Row(recipe, num_islands, counted, time, held, speed, self._mixes(recipe, num_islands))

    def _count(self, recipe: Recipe, num_islands: int) -> Sent:
        """When rounds start and how their mean is applied does not change what is sent."""
        same = replace(recipe, name="", summary="", paper="", every=1, delay=0, moments_every=None)
        key = (same, num_islands)
        if key not in self._sent:
            s = self.setting
            self._sent[key] = sent(recipe, s.shapes, num_islands, seed=s.seed, per_host=s.per_host, num_ranks=s.num_ranks)
        return self._sent[key]

    def _mixes(self, recipe: Recipe, num_islands: int) -> float | None:
        if recipe.reduce == "none":
            return 1.0
        if recipe.reduce != "neighbours":
            return 0.0
        if num_islands > MOST_LAMBDA2:
            return None
        key = (recipe.topology, recipe.graph, recipe.server, num_islands)
        if key not in self._lambda2:
            mixed = mixing_of(recipe.topology, recipe.graph, self.setting.seed, recipe.server)
            self._lambda2[key] = consensus(mixed, num_islands).lambda2
        return self._lambda2[key]


def rank(rows: Sequence[Row]) -> list[Row]:
    """By speed; of equal ones the one that loses less first."""
    return sorted(rows, key=lambda row: (-row.tokens_per_s, loss_order(row)))


def loss_order(row: Row) -> tuple[float, ...]:
    """How far a recipe departs from averaging all gradients each step; smaller is nearer to it.

    A model that is itself sent in 4 bits, or gradients in 8, without feedback, lose more than an outer loop does: their place is
    behind it. Disagreement that a topology leaves comes late in the order: sparse ones are what gossip is for."""
    r = row.recipe
    place, fewest = _KINDS[r.payload]
    bits = _bits(r.codec)
    # Rounds of neighbours that fall apart reach some islands only; those with the server join them.
    apart = r.every if r.server is None else r.every * (1 + parse_server(r.server).every)
    return place if bits >= fewest else _COARSE, apart, -bits, not r.error_feedback, row.lambda2 or 0.0, r.delay_steps


@cache
def _bits(codec: str) -> float:
    """A number's, on the wire; of an own codec what its wire is long, as nothing else is known of it."""
    if not is_own(codec):
        return _BITS[codec.partition(":")[0]]
    bound = codec_of(codec, error_feedback=False).bind(whole("bits", torch.empty(_MANY, device="meta")))
    return bound.wire_bytes * 8 / _MANY


def recommend(rows: Sequence[Row]) -> Row:
    """The least lossy of those that are as fast as the fastest that talks, to NEAR_BEST; of equally lossy ones the fastest."""
    talking = [row for row in rows if row.recipe.payload != "none"] or list(rows)
    best = max(row.tokens_per_s for row in talking)
    near = [row for row in talking if row.tokens_per_s >= (1 - NEAR_BEST) * best]
    return min(near, key=lambda row: (loss_order(row), -row.tokens_per_s))


def baseline(rows: Sequence[Row]) -> Row:
    """All-reduce in fp32."""
    return next(row for row in rows if row.recipe.name == "allreduce" and row.recipe.codec == "identity")


def reason(chosen: Row, rows: Sequence[Row]) -> str:
    """One sentence."""
    talking = [row for row in rows if row.recipe.payload != "none"]
    best = max((row.tokens_per_s for row in talking), default=chosen.tokens_per_s)
    plain = baseline(rows)
    against = "" if chosen is plain else f", {chosen.tokens_per_s / plain.tokens_per_s:.3g} times all-reduce's"
    return (
        f"{chosen.num_islands} islands: take {said(chosen.recipe)}: {chosen.tokens_per_s:,.0f} tokens/s{against}, waiting "
        f"{chosen.time.waits:.1%} of the time; of all within {NEAR_BEST:.0%} of the fastest ({best:,.0f}) it is the nearest to "
        f"averaging every gradient (the order: {ORDER})"
    )


def said(r: Recipe) -> str:
    if r.payload == "none":
        return r.name
    over = f" over {where(r)}" if r.reduce == "neighbours" else ""
    steps = "every step" if r.every == 1 else f"every {r.every} steps"
    late = "waited for" if r.delay_steps == 0 else "a step late" if r.delay_steps == 1 else f"{r.delay_steps} steps late"
    return f"{r.name}, {r.codec}{over}, {steps}, {late}"


def where(r: Recipe) -> str:
    return r.topology if r.graph is None else f"{r.topology} {r.graph}"


def factors(planner: Planner, chosen: Row) -> list[str]:
    """What each of the recipe's answers buys: the same recipe without it."""
    r, n = chosen.recipe, chosen.num_islands
    lines = []
    if r.payload not in ("none", "gradients") and r.delay_steps and r.landing == "keep" and r.algorithm != "beer":
        waits = planner.row(replace(r, delay=0), n)
        lines.append(f"overlap: {_gain(chosen, waits)} the speed of waiting for each round (delay 0)")
    if r.payload != "none" and r.codec != "identity":
        plain = planner.row(replace(r, codec="identity", error_feedback=False), n)
        fewer = plain.bytes_per_step / chosen.bytes_per_step
        lines.append(f"compression: {_gain(chosen, plain)} the speed of fp32 on the wire, {fewer:.3g} times fewer bytes")
    if r.every > 1 and r.payload == "pseudo_gradients":
        each = planner.row(replace(r, every=1, delay=min(r.delay_steps, 1), fragments=1), n)
        lines.append(f"local steps: {_gain(chosen, each)} the speed of a round each step, {r.every} times fewer bytes")
    return lines


def jitter_line(rows: Sequence[Row], chosen: Row, jitter_s: float) -> str:
    plain = baseline(rows)
    return (
        f"unequal steps (standard deviation {jitter_s * 1e3:.3g} ms): all-reduce waits {plain.time.late_s * 1e3:.3g} ms a step "
        f"for the slowest of {plain.num_islands}, {chosen.recipe.name} {chosen.time.late_s * 1e3:.3g} ms"
    )


def topology_lines(rows: Sequence[Row], chosen: Row) -> list[str]:
    """The chosen recipe over the other topologies that were looked at."""
    r = chosen.recipe
    others = {
        where(row.recipe): row
        for row in rows
        if r.reduce == "neighbours" and row.recipe.name == r.name and (row.recipe.codec, row.recipe.every) == (r.codec, r.every)
    }
    if len({round(row.tokens_per_s) for row in others.values()}) < 2:  # two islands have one edge, whatever its name
        return []
    by_speed = sorted(others.items(), key=lambda item: -item[1].tokens_per_s)
    shown = ", ".join(f"{name} {row.tokens_per_s:,.0f}" for name, row in by_speed)
    return [f"topology: {r.name} with {r.codec}, tokens/s over {shown}"]


def _gain(row: Row, other: Row) -> str:
    return f"{row.tokens_per_s / other.tokens_per_s:.3g} times"


def as_json(row: Row) -> Mapping[str, object]:
    r, t, m = row.recipe, row.time, row.memory
    return {
        "islands": row.num_islands,
        **{key: getattr(r, key) for key in ("name", "topology", "graph", "codec", "error_feedback", "every", "fragments")},
        "delay_steps": r.delay_steps,
        "step_s": t.step_s,
        "link_wait_s": t.link_s,
        "late_wait_s": t.late_s,
        "late_wait_error_s": t.error_s,
        "unequal_wait_s": t.unequal_s,
        "work_s": t.work_s,
        "wire_bytes_per_step": row.bytes_per_step,
        "memory_bytes": {"model": m.model, "sync": m.sync, "activations": m.activations},
        "tokens_per_s": row.tokens_per_s,
        "lambda2": row.lambda2,
    }

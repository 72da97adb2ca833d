"""What does each recipe cost at so many islands, and which factor buys what?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.methods import InnerOptimizer
from dtrain.own_topology import mixing_of
from dtrain.plan.accelerators import Work
from dtrain.plan.company import LinkSpeed
from dtrain.plan.lateness import When
from dtrain.plan.memory import WHOLE, Memory, Shards, memory
from dtrain.plan.model import Island, StepTime, step_time
from dtrain.plan.sent import Sent, Shapes, sent, together
from dtrain.plan.write import answers
from dtrain.recipes import Recipe, optimizer_of, rho_of
from dtrain.topology.consensus import consensus

MOST_LAMBDA2 = 64
"""Islands up to which eigenvalues are found: it is a column beside the point."""

HOST_BYTES_PER_S = 1e10
"""At which a round moves bytes whose state lies on the host of a GPU: a few cores' kernels and copies over PCIe, both of this
order. A machine that is slower itself stays so."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A job without its recipe."""

    shapes: Shapes
    """Of trained parameters: no recipe knows of frozen ones."""
    work: Work
    vocab: int
    tokens_per_step: int
    """Of one island."""
    num_ranks: int
    micro_batches: int
    """Into which a step is divided, train.accumulate."""
    moments_every: int | None
    number_bytes: int
    per_host: int
    seed: int
    link: LinkSpeed
    island: Callable[[str], Island]
    """Codec -> what computes, without SAM: codecs move bytes at unlike speeds."""
    sam_rho: float | None = None
    """The job's own."""
    optimizer: InnerOptimizer | None = None
    """The job's own."""
    hidden: int = 0
    """Parameters that Muon would step."""
    factors: Callable[[int], tuple[float, ...] | None] = lambda _: None
    """Number of islands -> how many times longer each computes; None: all are alike."""
    gpu: str | None = None
    gpu_bytes: float | None = None
    """Memory of one; None where it is not known."""
    stages: Sequence[Shapes] = ()
    """The parts of ``shapes`` that each rank has, where they are stages of a pipeline; ``work`` is then that of the busiest."""
    stages_per_rank: int = 1
    """Of each of ``stages``, which then lie apart in the model."""
    in_flight: int = 1
    """Micro-batches whose activations a stage holds at once."""
    shards: Shards = WHOLE
    """Ranks that share the model's, or a stage's, weights, gradients and moments."""
    recomputes: bool = False
    """Whether a layer is computed again for its backward pass."""

    @property
    def parameters(self) -> int:
        """Of the whole model, frozen ones too."""
        return sum(math.prod(shape) for part in self.stages for shape in part.values()) or self.work.parameters

    def fits(self, rank_bytes: int) -> bool:
        return self.gpu_bytes is None or rank_bytes <= self.gpu_bytes


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
        if recipe.outer_state == "host":
            island = replace(island, memory_bytes_per_s=min(island.memory_bytes_per_s, HOST_BYTES_PER_S))
        sam = rho_of(recipe, s.sam_rho) > 0
        if sam:  # forward and backward twice
            island = replace(island, step_s=2 * island.step_s)
        time = step_time(counted, when, island, s.link)
        inner = optimizer_of(recipe, s.optimizer, s.moments_every)
        accumulates = inner == "adamw" and (s.moments_every or recipe.moments_every or 1) > 1
        held = memory(
            counted, s.work, vocab=s.vocab, number_bytes=s.number_bytes, moments=inner != "sgd", accumulates=accumulates, sam=sam,
            num_ranks=s.num_ranks, micro_batches=s.micro_batches, in_flight=s.in_flight,
            by_muon=s.hidden if inner == "muon" else 0, averages=inner == "schedule_free",
            on_host=recipe.outer_state == "host", shards=s.shards, recomputes=s.recomputes,
            model_parameters=s.parameters if s.stages else None,
        )  # fmt: skip
        speed = num_islands * s.tokens_per_step / time.step_s
        return Row(recipe, num_islands, counted, time, held, speed, self._mixes(recipe, num_islands))

    def _count(self, recipe: Recipe, num_islands: int) -> Sent:
        """When rounds start and how their mean is applied does not change what is sent."""
        same = replace(recipe, name="", summary="", paper="", every=1, delay=0, moments_every=None, optimizer=None)
        key = (same, num_islands)
        if key not in self._sent:
            s = self.setting
            if s.stages and not s.shards.in_parts:
                first = {_alike(shapes): shapes for shapes in s.stages}
                model = s.shapes if s.stages_per_rank > 1 else None
                each = {
                    of: sent(recipe, shapes, num_islands, seed=s.seed, per_host=s.per_host, model=model)
                    for of, shapes in first.items()
                }
                self._sent[key] = together([each[_alike(shapes)] for shapes in s.stages])
            else:
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


def _alike(stage: Shapes) -> Hashable:
    """The same of stages that differ by the numbers of their blocks alone, which send as much as each other."""
    return tuple((re.sub(r"\d+", "", name), tuple(shape)) for name, shape in stage.items())


def baseline(rows: Sequence[Row]) -> Row:
    """All-reduce in fp32."""
    return next(row for row in rows if row.recipe.name == "allreduce" and row.recipe.codec == "identity")


def speed_text(tokens_per_s: float) -> str:
    """Three digits, or all before the point."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 999.5 else f"{tokens_per_s:.3g}"


def time_text(seconds: float) -> str:
    """``0.0301`` -> ``30.1 ms``, ``27.42`` -> ``27.4 s``, ``27420.0`` -> ``27,420 s``."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{speed_text(seconds)} s"


def said(r: Recipe) -> str:
    if r.payload == "none":
        return r.name
    over = f" over {where(r)}" if r.reduce == "neighbours" else ""
    steps = "every step" if r.every == 1 else f"every {r.every} steps{' or fewer' if r.every_adapts else ''}"
    late = "waited for" if r.delay_steps == 0 else "a step late" if r.delay_steps == 1 else f"{r.delay_steps} steps late"
    return f"{r.name}, {r.codec}{over}, {steps}, {late}"


def adapting(r: Recipe) -> str:
    """How rounds of an H that adapts are reckoned."""
    return (
        f"{r.name} is reckoned with the rank and the {r.every} steps of its first rounds: as the rank falls, fewer bytes go "
        "after fewer steps, so that matrices take as many bytes a step as before, and what goes whole more"
    )


def where(r: Recipe) -> str:
    return r.topology if r.graph is None else f"{r.topology} {r.graph}"


def factors(planner: Planner, chosen: Row) -> list[str]:
    """What each of the recipe's answers buys: the same recipe without it."""
    r, n = chosen.recipe, chosen.num_islands
    lines: list[str] = []
    if r.payload not in ("none", "gradients") and r.delay_steps and r.landing in ("keep", "blend") and r.algorithm != "beer":
        waits = planner.row(replace(r, delay=0), n)
        lines.append(f"overlap: {_gain(chosen, waits)} the speed of waiting for each round (delay 0)")
    if r.payload != "none" and (r.codec != "identity" or r.reduce == "low_rank"):
        whole = "all_to_all" if r.reduce == "low_rank" else r.reduce
        plain = planner.row(replace(r, codec="identity", error_feedback=False, reduce=whole), n)
        fewer = plain.bytes_per_step / chosen.bytes_per_step
        lines.append(f"compression: {_gain(chosen, plain)} the speed of fp32 on the wire, {fewer:.3g} times fewer bytes")
    if r.every > 1 and r.payload == "pseudo_gradients":
        each = planner.row(replace(r, every=1, delay=min(r.delay_steps, 1), fragments=1), n)
        lines.append(f"local steps: {_gain(chosen, each)} the speed of a round each step, {r.every} times fewer bytes")
    return [f"{r.name}, {line}" for line in lines]


def jitter_line(rows: Sequence[Row], chosen: Row, jitter_s: float) -> str:
    plain = baseline(rows)
    return (
        f"unequal steps (standard deviation {time_text(jitter_s)}): all-reduce waits {time_text(plain.time.late_s)} a step "
        f"for the slowest of {plain.num_islands}, {chosen.recipe.name} {time_text(chosen.time.late_s)}"
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
    """``sync`` is what a job file says in [sync] to run it."""
    r, t, m = row.recipe, row.time, row.memory
    talks = ("topology", "graph", "server", "reduce", "codec", "error_feedback", "every", "fragments", "gossip_steps", "gamma")
    return {
        "islands": row.num_islands,
        "name": r.name,
        **{key: getattr(r, key) for key in talks},
        "delay_steps": r.delay_steps,
        "sync": dict(answers(r, row.num_islands)),
        "step_s": t.step_s,
        "link_wait_s": t.link_s,
        "late_wait_s": t.late_s,
        "late_wait_error_s": t.error_s,
        "unequal_wait_s": t.unequal_s,
        "work_s": t.work_s,
        "wire_bytes_per_step": row.bytes_per_step,
        "memory_bytes": {"model": m.model, "kept": m.kept, "wires": m.wires, "activations": m.activations, "host": m.host},
        "tokens_per_s": row.tokens_per_s,
        "lambda2": row.lambda2,
    }

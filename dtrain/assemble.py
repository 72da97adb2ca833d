"""Which code does a recipe name? Literal tables from its words to the functions of each axis."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from dtrain import codec as codecs
from dtrain import combine as combines
from dtrain import outer as outers
from dtrain import quorum, schedule, slots, units
from dtrain import reduce as reduces
from dtrain.algorithm import Method
from dtrain.algorithms.a2cid2 import a2cid2
from dtrain.algorithms.a2cid2_ready import a2cid2_ready
from dtrain.algorithms.allreduce import allreduce
from dtrain.algorithms.beer import beer
from dtrain.algorithms.choco import choco
from dtrain.algorithms.demo import demo
from dtrain.algorithms.desloc import desloc
from dtrain.algorithms.diloco import diloco_blend, diloco_eager, diloco_keep, diloco_pure
from dtrain.algorithms.dpsgd import dpsgd
from dtrain.algorithms.gossip import gossip
from dtrain.algorithms.gradient_tracking import gradient_tracking
from dtrain.algorithms.local import local
from dtrain.algorithms.multi_gossip import chebyshev, multi_gossip
from dtrain.algorithms.noloco import noloco
from dtrain.algorithms.push_sum import push_sum
from dtrain.bucket import Bucket, Flat, Span, make_buckets
from dtrain.codec import State
from dtrain.events.graph_constants import rates_of_rounds
from dtrain.hierarchical import hierarchical
from dtrain.low_rank import low_rank, ranks_now
from dtrain.matchmaker import Graph, graph_of
from dtrain.matrices import adapts, check_rank, highest, rank_of
from dtrain.methods import RULES
from dtrain.on_host import on_host
from dtrain.outer import Outer
from dtrain.own_codec import codec_of
from dtrain.own_name import is_own
from dtrain.own_topology import digest_of_rows, mixing_of
from dtrain.recipe_fits import check_trains
from dtrain.recipes import Recipe
from dtrain.reduce import Reduce
from dtrain.schedule import Control, When
from dtrain.slots import Pace
from dtrain.topology import Mixing, Topology, fingerprint, parse_server


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe as code, before it meets a model."""

    recipe: Recipe
    methods: tuple[Method, ...]
    """Buckets take them in turn: one, but for the far level of a job with two, which has one for each owner."""
    topology: Topology
    when: When
    control: Control
    delay_steps: int
    rewrites_gradients: bool
    edges: int
    """A number of what says who talks to whom where that is more than a name: a graph, a server, one's own topology; else 0."""
    sends: bool
    """Whether the method has rounds that land (all but local, all-reduce and demo)."""
    moves: bool
    """Whether to send changes the parameters as well."""
    turns: int
    """Rounds after which a method does the same again, over the same edges; 1 of all but those with a calendar of their own."""
    graph: Graph | None
    """Who may meet whom, where islands meet when both are ready; None where rounds have their steps."""
    ranks: Callable[[State], list[int]] | None
    """Of a bucket's state: its matrices' ranks in its next round; None where they stay, and in a job of two levels, where an
    island has those of its own buckets alone."""
    every_adapts: bool
    """Whether H follows them."""
    quorum: int | None
    """The fewest islands of a round; None where each waits for all."""
    grace_s: float
    signs: bool
    """Whether what is exchanged before an update leaves signs in the place of gradients."""
    pace: Pace
    """In which steps each island trains."""

    def exchanges(self, num_islands: int) -> bool:
        """Whether each update waits for an exchange; an island alone has none, unless its gradients are to become signs."""
        return self.rewrites_gradients and (num_islands > 1 or self.signs)


def assemble(recipe: Recipe, seed: int, num_islands: int) -> Plan:
    """Raises ValueError for a recipe that is only simulated."""
    check_trains(recipe)
    rules = RULES[recipe.algorithm]
    moves = rules.moves or recipe.landing in ("eager", "pure")
    needed = quorum.size(recipe.quorum, num_islands)
    kind = "same" if rules.static is not None else "pairs" if rules.pairs else "any"
    mixed = mixing_of(recipe.topology, recipe.graph, seed, recipe.draws, kind)
    methods = tuple(_method(recipe, mixed, owner) for owner in range(1 if recipe.near is None else recipe.near.islands))
    return Plan(
        recipe=recipe,
        methods=methods if recipe.outer_state == "device" else tuple(on_host(method, moves=moves) for method in methods),
        topology=mixed.rows,
        when=when_of(recipe),
        control=Control(every=recipe.every),
        delay_steps=recipe.delay_steps,
        edges=_edges(recipe, seed, num_islands),
        rewrites_gradients=RULES[recipe.algorithm].rewrites_gradients or recipe.payload == "gradients",
        sends=recipe.algorithm not in ("local", "allreduce", "demo"),
        moves=moves,
        turns=1 if recipe.moments is None else math.lcm(*schedule.multiples(recipe.moments)),
        graph=_graph(mixed, num_islands) if recipe.schedule == schedule.READY else None,
        ranks=ranks_now if _adapts(recipe) and recipe.near is None else None,
        every_adapts=recipe.every_adapts and recipe.reduce == "low_rank",
        quorum=needed if needed < num_islands else None,
        grace_s=units.seconds(recipe.grace),
        signs=rules.signs,
        pace=slots.pace(recipe.speeds, recipe.every),
    )


def prepare_kernels(recipe: Recipe, device: torch.device, say: Callable[[], None]) -> None:
    """So that no round waits for them: those of the recipe's codec, and of the exact merge."""
    for place in {device, torch.device("cpu")} if recipe.outer_state == "host" else (device,):
        codecs.prepare_kernels(recipe.codec, place, say)


def assemble_levels(recipe: Recipe, seed: int, num_islands: int) -> tuple[Plan, ...]:
    """``assemble`` of each level, the nearest first."""
    sizes = (num_islands,) if recipe.near is None else (recipe.near.islands, num_islands)
    return tuple(assemble(level, seed, size) for level, size in zip(recipe.levels, sizes, strict=True))


def cut(r: Recipe, flat: Flat, *, num_ranks: int, with_grad: bool, num_lanes: int | None = None) -> list[Bucket]:
    """The buckets that a recipe asks for; raises ValueError where no parameter of the model is sent by a rank that it names."""
    if r.reduce == "low_rank" and r.rank is not None:
        check_rank({name: p.shape for name, p in zip(flat.names, flat.parameters, strict=True)}, r.rank)
    return make_buckets(
        flat, num_fragments=r.fragments, bucket_bytes=r.bucket_bytes, num_ranks=num_ranks, num_lanes=num_lanes,
        with_grad=with_grad,
        keeps_whole=lambda s: r.combine == "radial" or columns(r, s) > 0,
    )  # fmt: skip


def columns(r: Recipe, s: Span) -> int:
    """Of the factors by which a parameter is sent; 0: as it is."""
    return 0 if r.reduce != "low_rank" or r.rank is None else rank_of(s.name, s.shape, highest(r.rank))


def _adapts(r: Recipe) -> bool:
    return r.reduce == "low_rank" and r.rank is not None and adapts(r.rank)


def _graph(mixed: Mixing, num_islands: int) -> Graph:
    pairs, _ = rates_of_rounds(mixed, num_islands, every=1)
    return graph_of([(a, b) for a, b in pairs.tolist()], num_islands)


def _edges(r: Recipe, seed: int, num_islands: int) -> int:
    """63 bits, the same on every host."""
    of_graph = fingerprint(r.topology, r.graph, num_islands, seed)
    of_server = None if r.server is None else (*parse_server(r.server), seed)
    of_rows = digest_of_rows(r.topology, num_islands) if is_own(r.topology) else None
    if of_server is None and of_rows is None:
        return of_graph
    said = repr((of_graph, of_server, of_rows))
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") >> 1


def when_of(r: Recipe) -> When:
    """Of a recipe that ``recipes.with_steps`` has seen, where its schedule spends a budget."""
    budget = schedule.parse(r.schedule)
    if budget is not None:
        assert r.total_steps is not None, "recipes.with_steps"
        return schedule.spent(budget, r.fragments, r.total_steps)
    return schedule.every if r.fragments == 1 else schedule.staggered(r.fragments)


def _method(r: Recipe, mixed: Mixing, owner: int) -> Method:
    match r.algorithm:
        case "own":
            assert r.method is not None, "own.load refuses a row without"
            return r.method(r, mixed)
        case "local":
            return local()
        case "allreduce":
            return allreduce(_reduce(r))
        case "dpsgd" if r.reduce == "neighbours":
            return gossip(codec_of(r.codec, error_feedback=r.error_feedback), mixed)
        case "dpsgd":
            return dpsgd(_reduce(r))
        case "deepsqueeze":
            return gossip(codec_of(r.codec, error_feedback=r.error_feedback, feedback_decay=r.feedback_decay), mixed, r.gamma)
        case "multi_gossip":
            return multi_gossip(codec_of(r.codec, error_feedback=r.error_feedback), r.gossip_steps)
        case "chebyshev":
            return chebyshev(codec_of(r.codec, error_feedback=r.error_feedback), r.gossip_steps, mixed)
        case "push_sum":
            return push_sum(codec_of(r.codec, error_feedback=r.error_feedback), mixed)
        case "gradient_tracking":
            return gradient_tracking(codec_of(r.codec, error_feedback=False), mixed)
        case "beer":
            return beer(codecs.plain(r.codec), r.gamma, mixed)
        case "choco":
            return choco(codecs.plain(r.codec), r.gamma, mixed)
        case "a2cid2" if r.schedule == schedule.READY:
            return a2cid2_ready(codec_of(r.codec, error_feedback=False), mixed)
        case "a2cid2":
            return a2cid2(codec_of(r.codec, error_feedback=False), mixed, r.every, r.delay_steps)
        case "dadao":
            raise AssertionError("check_trains refuses it")
        case "diloco":
            path = _reduce(r)
            return _diloco(r, path if r.near is None else hierarchical(path, r.near.islands, owner), _outer(r))
        case "demo":
            return demo(_reduce(r))
        case "desloc":
            assert r.moments is not None, "check_together"
            uncoded = _reduce(replace(r, codec="identity", error_feedback=False))
            return desloc(_reduce(r), uncoded, schedule.multiples(r.moments), r.delay_steps)
        case "noloco":
            return noloco(codec_of(r.codec, error_feedback=False), r.outer_lr, r.outer_momentum, r.gamma)


def _diloco(r: Recipe, reduce: Reduce, outer: Outer) -> Method:
    match r.landing:
        case "keep":
            return diloco_keep(reduce, outer)
        case "eager":
            return diloco_eager(reduce, outer)
        case "pure":
            return diloco_pure(reduce, outer)
        case "blend":
            return diloco_blend(reduce, outer, r.alpha)


def _reduce(r: Recipe) -> Reduce:
    if r.reduce == "low_rank":
        assert r.rank is not None, "check_together refuses it"
        plain = codec_of(r.codec, error_feedback=False)
        decay = r.feedback_decay if r.error_feedback else None
        return low_rank(plain, functools.partial(columns, r), feedback_decay=decay, adapts=adapts(r.rank))
    codec = codec_of(r.codec, error_feedback=r.error_feedback, feedback_decay=r.feedback_decay)
    if r.combine == "radial":
        return reduces.gather(codec, combines.radial)
    table = {"gather": reduces.gather, "all_to_all": reduces.all_to_all}
    return table[r.reduce](codec)


def _outer(r: Recipe) -> Outer:
    match r.outer:
        case "copy":
            return outers.copy()
        case "sgd":
            return outers.sgd(r.outer_lr)
        case "nesterov":
            return outers.nesterov(r.outer_lr, r.outer_momentum)
        case "delayed_nesterov":
            return outers.delayed_nesterov(r.outer_lr, r.outer_momentum)

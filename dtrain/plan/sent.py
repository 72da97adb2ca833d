"""What does a recipe send, and to whom? Its own code says so: it is run once on tensors that have shapes and no values.

No recipe has a rule here. A method posts its wires to a Link that nobody carries, is handed wires of the lengths that it expects,
and lands; its state, its wires and the bytes that its kernels move are counted on the way. A method or a codec of somebody's
own runs on zeros in memory, because it may look at values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

import torch
from torch import nn

from dtrain import spans
from dtrain.assemble import Plan, assemble, columns, cut
from dtrain.bucket import GRAIN, Bucket, Flat, flatten
from dtrain.core import Core, Flight
from dtrain.island.stages import in_runs
from dtrain.link import Peers
from dtrain.moments import Unmade
from dtrain.own_name import is_own
from dtrain.own_topology import mixing_of
from dtrain.plan.company import Company, Talks, everyone, neighbours
from dtrain.plan.kinds import Degrees, Kind, Seen, kinds_of
from dtrain.recipes import Recipe
from dtrain.waves import at_once

Shapes = Mapping[str, tuple[int, ...]]
"""Trained parameters of fp32 by name, in the model's order."""


@dataclass(frozen=True, slots=True)
class Phase:
    """From a resumption of a flight until it waits for wires."""

    work_bytes: int
    """Moved through memory by kernels before the wires are posted."""
    far_bytes: int
    near_bytes: int
    """Posted to peers of other hosts and of the same one."""
    wires: int
    heard_bytes: int
    """Waited for."""
    near_heard_bytes: int = 0
    """Of these, from islands of the same host."""

    @property
    def far_load(self) -> int:
        """Bytes of the busier direction: links are full duplex."""
        return max(self.far_bytes, self.heard_bytes - self.near_heard_bytes)

    @property
    def near_load(self) -> int:
        return max(self.near_bytes, self.near_heard_bytes)


@dataclass(frozen=True, slots=True)
class Flown:
    """One flight of one bucket."""

    fragment: int
    phases: tuple[Phase, ...]
    landing_bytes: int
    """Moved through memory after the last wires came, the landing included."""
    rank: int = 0
    """Of its island, that carries the bucket."""
    values_bytes: int = 0
    """The bucket's own numbers, which the island's other ranks get from it."""
    room_bytes: int = 0
    """Of buffers that it was the first to need, and that stay."""

    @property
    def sent_bytes(self) -> int:
        return sum(p.far_bytes + p.near_bytes for p in self.phases)

    @property
    def background_bytes(self) -> int:
        """Moved by the thread that resumes the flight, between its first wires and its landing."""
        return sum(p.work_bytes for p in self.phases[1:])


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one island does in one round: ``gradients`` before an update, ``rounds`` behind it; one entry a bucket that flies."""

    gradients: tuple[Flown, ...]
    rounds: tuple[Flown, ...]

    @property
    def sent_bytes(self) -> int:
        return sum(f.sent_bytes for f in (*self.gradients, *self.rounds))

    @property
    def far_load(self) -> int:
        return sum(p.far_load for f in (*self.gradients, *self.rounds) for p in f.phases)


@dataclass(frozen=True, slots=True)
class Sent:
    """Of all islands, where a round of each fragment is done in turn."""

    period: tuple[Exchange, ...]
    """The rounds of the island that sends or hears most over far links, then sends most over all, in expectation: drawn rounds
    are those of the mean island among those that are as likely to meet, not of the luckiest."""
    mean_round_bytes: float
    """What an island sends in a round, the mean over islands and rounds."""
    state_bytes: int
    """Of all State: anchors, momenta, residuals, public copies, arrived wires. What a checkpoint holds."""
    wire_bytes: int
    """Buffers for wires under way."""
    company: Company
    """Who waits for whom."""
    room_bytes: int = 0
    """Of buffers beside State that are made once and stay: encoded wires, parts and factors that are combined."""
    gradient_bytes: int = 0
    """Of the buckets' gradients, of which each rank has all."""
    at_hand: float = 1.0
    """Share of a rank's buckets that are gathered at once, where ranks hold parts of the parameters."""
    under_way: float = 1.0
    """Share of them that fly at once there."""
    averaged: float = 0.0
    """And in an exact average, which is in fp32 whatever the recipe."""

    @property
    def kept_bytes(self) -> int:
        """What lies in memory between two steps, because of the recipe, while nothing is under way; of an island of one rank."""
        return self.state_bytes + self.room_bytes + self.gradient_bytes


def model_flat(shapes: Shapes, device: torch.device, recipe: Recipe | None = None, model: Shapes | None = None) -> Flat:
    """Of the parameters that the recipe lets islands share; None: of all. ``model``: of which these are a rank's, where they are
    stages that lie apart."""
    named = ((name, nn.Parameter(torch.zeros(shape, device=device))) for name, shape in shapes.items())
    flat = flatten(named) if recipe is None else flatten(named, recipe.include, recipe.exclude)
    if model is None:
        return flat
    starts = dict(zip(model, accumulate(map(math.prod, model.values()), initial=0), strict=False))
    return in_runs(flat, [starts[name] for name in flat.names])


def sent(
    recipe: Recipe, shapes: Shapes, num_islands: int, *, seed: int = 0, per_host: int = 1, num_ranks: int = 1,
    model: Shapes | None = None,
) -> Sent:
    """Count a recipe's bytes; ``per_host`` islands with neighbouring numbers share a host, where their wires stay. ``model``: as
    ``model_flat`` has it."""
    plan = assemble(recipe, seed, num_islands)
    device = torch.device("cpu" if recipe.algorithm == "own" or is_own(recipe.codec) else "meta")
    flat = model_flat(shapes, device, recipe, model)
    buckets = cut(recipe, flat, num_ranks=num_ranks, with_grad=plan.rewrites_gradients)
    if recipe.moments is not None:
        buckets = [replace(b, moments=Unmade(len(b.layout.spans))) for b in buckets]
    alike = _Alike(buckets, recipe)

    def make(node: int) -> Core:
        return Core(plan, alike.one_each, Peers(node, num_islands))

    talks = recipe.topology, recipe.graph, seed, recipe.draws
    mixed = mixing_of(*talks)
    kinds = kinds_of(talks, num_islands, per_host)
    cores = {kind.node: make(kind.node) for kind in kinds}
    if mixed.drawn:
        roomy = max(range(num_islands), key=lambda node: mixed.in_degree(node, num_islands))
        cores.setdefault(roomy, make(roomy))
    done: dict[tuple[int, Degrees, int], Exchange] = {}
    turns = range(plan.turns)

    def exchange(seen: Seen, turn: int) -> Exchange:
        key = seen.node, seen.degrees, turn
        if key not in done:
            core = cores.get(seen.node) or cores.setdefault(seen.node, make(seen.node))
            done[key] = _exchange(core, plan, alike, seen.number + turn, per_host)
        return done[key]

    def load(kind: Kind) -> tuple[Fraction, Fraction]:
        far = kind.mean(lambda seen: sum(exchange(seen, turn).far_load for turn in turns))
        return far / plan.turns, kind.mean(lambda seen: sum(exchange(seen, turn).sent_bytes for turn in turns)) / plan.turns

    at_hand, few = at_once(buckets) if num_ranks > 1 else (1.0, 1.0)
    busiest = max(kinds, key=load)
    whole = sum(kind.how_many * load(kind)[1] for kind in kinds)
    return Sent(
        period=tuple(exchange(seen, turn) for turn in turns for seen in busiest.period),
        mean_round_bytes=float(whole / num_islands),
        state_bytes=max(map(alike.state_bytes, cores.values())),
        wire_bytes=max(_in_flight(exchange(seen, turn)) for seen in busiest.shares for turn in turns),
        company=_company(recipe, talks, num_islands, per_host),
        room_bytes=max(_rooms(e for (node, _, _), e in done.items() if node == one) for one in {node for node, _, _ in done}),
        gradient_bytes=sum(4 * b.x.numel() for b in buckets) if plan.rewrites_gradients else 0,
        at_hand=at_hand,
        under_way=few if plan.delay_steps == 0 and plan.sends else 1.0,
        averaged=few,
    )


def together(stages: Sequence[Sent]) -> Sent:
    """Of an island whose ranks are stages, from what each sends of its own part: nobody gets what another one has landed."""

    def of(flown: Sequence[Sequence[Flown]]) -> tuple[Flown, ...]:
        return tuple(replace(f, rank=rank, values_bytes=0) for rank, own in enumerate(flown) for f in own)
    return Sent(
        period=tuple(
            Exchange(of([e.gradients for e in each]), of([e.rounds for e in each]))
            for each in zip(*(s.period for s in stages), strict=True)
        ),
        mean_round_bytes=sum(s.mean_round_bytes for s in stages),
        state_bytes=sum(s.state_bytes for s in stages),
        wire_bytes=sum(s.wire_bytes for s in stages),
        company=stages[0].company,
        room_bytes=sum(s.room_bytes for s in stages),
        gradient_bytes=max(s.gradient_bytes for s in stages),
    )


def _exchange(core: Core, plan: Plan, alike: _Alike, index: int, per_host: int) -> Exchange:
    """Round ``index`` of every bucket, whatever its fragment's turn; buckets that are alike fly once."""
    for lane in core.lanes:
        both = lane.algorithm.grad is not None and lane.algorithm.send is not None
        lane.round = 2 * index if both else index
    with _watched() as recorder:
        gradients = [_fly(core, flight, recorder, per_host, lands=False) for flight in core.start_gradients()]
        rounds = [
            _fly(core, core.start(lane, core.step), recorder, per_host, lands=True)
            for lane in core.lanes
            if lane.algorithm.send is not None
        ]
    return Exchange(alike.each(gradients), alike.each(rounds))


class _Alike:
    """Which buckets send as much as another: a large model has hundreds, of a few kinds."""

    def __init__(self, buckets: Sequence[Bucket], recipe: Recipe) -> None:
        by_shape = recipe.codec.startswith("dct")
        self._kind_of: list[object] = [(_kind_of(b, recipe), _shapes_of(b) if by_shape else None) for b in buckets]
        self._places = [(b.fragment, b.owner) for b in buckets]
        self._many = Counter(self._kind_of)
        first: dict[object, Bucket] = {}
        for kind, bucket in zip(self._kind_of, buckets, strict=True):
            first.setdefault(kind, bucket)
        self.one_each = list(first.values())
        self._kinds = list(first)

    def each(self, flown: Sequence[Flown]) -> tuple[Flown, ...]:
        """Of every bucket, from those of ``one_each``; of none where there are none."""
        if not flown:
            return ()
        of = dict(zip(self._kinds, flown, strict=True))
        places = zip(self._kind_of, self._places, strict=True)
        return tuple(replace(of[kind], fragment=fragment, rank=rank) for kind, (fragment, rank) in places)

    def state_bytes(self, core: Core) -> int:
        held = [sum(t.numel() * t.element_size() for t in lane.state.values()) for lane in core.lanes]
        return sum(count * self._many[kind] for count, kind in zip(held, self._kinds, strict=True))


def _kind_of(bucket: Bucket, recipe: Recipe) -> object:
    """Wires and parts follow from where a bucket's parameters begin and end, those side by side that fill whole grains being as
    good as one, and from the shapes of those that are sent by factors. A bucket that lies in memory, where a method of one's own
    may look at it, is a kind of its own."""
    if bucket.x.device.type != "meta":
        return bucket.index
    runs: list[tuple[int, int, bool]] = []
    for s in bucket.layout.spans:
        full = s.numel % GRAIN == 0
        if full and runs and runs[-1][2]:
            runs[-1] = (runs[-1][0], s.stop, True)
        else:
            runs.append((s.start, s.stop, full))
    return tuple(runs), tuple((s.start, s.shape) for s in bucket.layout.spans if columns(recipe, s))


def _shapes_of(bucket: Bucket) -> object:
    """For a codec that cuts matrices along their rows and columns."""
    return tuple((s.shape, s.offset, s.numel) for s in bucket.layout.spans)


@contextmanager
def _watched() -> Iterator[spans.Recorder]:
    recorder = spans.Recorder()
    spans.record(recorder)
    try:
        yield recorder
    finally:
        spans.record(None)


@torch.no_grad()
def _fly(core: Core, flight: Flight, recorder: spans.Recorder, per_host: int, *, lands: bool) -> Flown:
    lane = next(lane for lane in core.lanes if lane.bucket.index == flight.bucket)
    link, phases = flight.link, []
    recorder.rooms.clear()
    while True:
        recorder.spans.clear()
        flight.advance()
        if flight.done:
            break
        near = [peer // per_host == link.node // per_host for peer, _ in link.outbox]
        lengths = [wire.numel() for _, wire in link.outbox]
        phases.append(
            Phase(
                _moved(recorder),
                far_bytes=sum(n for n, same in zip(lengths, near, strict=True) if not same),
                near_bytes=sum(n for n, same in zip(lengths, near, strict=True) if same),
                wires=len(lengths),
                heard_bytes=sum(link.expected.values()),
                near_heard_bytes=sum(n for peer, n in link.expected.items() if peer // per_host == link.node // per_host),
            )
        )
        link.inbox = {p: torch.zeros(n, dtype=torch.uint8, device=lane.bucket.x.device) for p, n in link.expected.items()}
    if lands and lane.algorithm.land is not None:
        lane.algorithm.land(lane.bucket, lane.state)
    lane.flight, lane.land_step = None, -1
    b = lane.bucket
    return Flown(b.fragment, tuple(phases), _moved(recorder), b.owner, 4 * b.x.numel(), sum(recorder.rooms))


def _moved(recorder: spans.Recorder) -> int:
    return sum(s.moved_bytes for s in recorder.spans)


def _rooms(exchanges: Iterable[Exchange]) -> int:
    """Of one island; a later exchange finds those that an earlier one has made."""
    return sum(f.room_bytes for e in exchanges for f in (*e.gradients, *e.rounds))


def _in_flight(exchange: Exchange) -> int:
    """Copies of what is posted and rooms for what is expected, of the largest phase of each flight; a copy serves all peers."""
    return sum(
        max((p.heard_bytes + (p.far_bytes + p.near_bytes) // max(1, p.wires) for p in f.phases), default=0)
        for f in (*exchange.gradients, *exchange.rounds)
    )


def _company(recipe: Recipe, talks: Talks, num_islands: int, per_host: int) -> Company:
    if recipe.reduce == "none":
        return everyone(1, 1)
    by_rows = recipe.reduce == "neighbours" or recipe.participants is not None
    return neighbours(talks, num_islands, per_host) if by_rows else everyone(num_islands, per_host)

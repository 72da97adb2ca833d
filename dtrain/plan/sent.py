"""What does a recipe send, and to whom? Its own code says so: it is run once on tensors that have shapes and no values.

No recipe has a rule here. A method posts its wires to a Link that nobody carries, is handed wires of the lengths that it expects,
and lands; its state, its wires and the bytes that its kernels move are counted on the way. A method or a codec of somebody's
own runs on zeros in memory, because it may look at values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from dtrain import spans
from dtrain.assemble import Plan, assemble
from dtrain.bucket import Flat, flatten, make_buckets
from dtrain.core import Core, Flight
from dtrain.link import Peers
from dtrain.own_name import is_own
from dtrain.own_topology import mixing_of
from dtrain.recipes import Recipe
from dtrain.topology import Mixing, Round, parse_server

MOST_EXACT = 4
"""Islands up to which each is counted; of more, one of each kind."""
_MOST_ROUNDS = 32
"""Of a topology's period that are looked at: more than two periods of the one-peer topologies of 1,000 islands."""

Shapes = Mapping[str, tuple[int, ...]]
"""Parameters of fp32 by name, in the model's order."""


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


@dataclass(frozen=True, slots=True)
class Flown:
    """One flight of one bucket."""

    fragment: int
    phases: tuple[Phase, ...]
    landing_bytes: int
    """Moved through memory after the last wires came, the landing included."""

    @property
    def sent_bytes(self) -> int:
        return sum(p.far_bytes + p.near_bytes for p in self.phases)


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one island does in one round: ``gradients`` before an update, ``rounds`` behind it; one entry a bucket that flies."""

    gradients: tuple[Flown, ...]
    rounds: tuple[Flown, ...]

    @property
    def sent_bytes(self) -> int:
        return sum(f.sent_bytes for f in (*self.gradients, *self.rounds))

    @property
    def far_bytes(self) -> int:
        return sum(p.far_bytes for f in (*self.gradients, *self.rounds) for p in f.phases)


@dataclass(frozen=True, slots=True)
class Sent:
    """Of all islands, where a round of each fragment is done in turn."""

    period: tuple[Exchange, ...]
    """The rounds of the island that sends most over far links, then over all."""
    mean_round_bytes: float
    """What an island sends in a round, the mean over islands and rounds."""
    state_bytes: int
    """Kept between rounds: residuals, anchors, arrived wires."""
    wire_bytes: int
    """Buffers for wires under way."""
    group: float
    """Islands whom a round brings together, oneself included, on average."""


def model_flat(shapes: Shapes, device: torch.device) -> Flat:
    return flatten((name, nn.Parameter(torch.zeros(shape, device=device))) for name, shape in shapes.items())


def sent(recipe: Recipe, shapes: Shapes, num_islands: int, *, seed: int = 0, per_host: int = 1) -> Sent:
    """Count a recipe's bytes; ``per_host`` islands with neighbouring numbers share a host, where their wires stay."""
    plan = assemble(recipe, seed, num_islands)
    device = torch.device("cpu" if recipe.algorithm == "own" or is_own(recipe.codec) else "meta")
    buckets = make_buckets(
        model_flat(shapes, device),
        num_fragments=recipe.fragments,
        bucket_bytes=recipe.bucket_bytes,
        num_ranks=1,
        with_grad=plan.rewrites_gradients,
    )
    talks = recipe.topology, recipe.graph, seed, recipe.server
    mixed = mixing_of(*talks)
    rounds, kinds = _rounds(mixed, num_islands, recipe.server), _kinds(talks, num_islands, per_host)
    whole = 0.0
    busiest: tuple[Exchange, ...] = ()
    state_bytes = 0
    for node, how_many in kinds.items():
        core = Core(plan, buckets, Peers(node, num_islands))
        state_bytes = max(state_bytes, _state_bytes(core))
        period = _period(core, plan, mixed, rounds, per_host)
        whole += how_many * sum(e.sent_bytes for e in period) / len(period)
        if not busiest or _load(period) > _load(busiest):
            busiest = period
    return Sent(
        period=busiest,
        mean_round_bytes=whole / num_islands,
        state_bytes=state_bytes + (sum(4 * b.x.numel() for b in buckets) if plan.rewrites_gradients else 0),
        wire_bytes=max(_in_flight(e) for e in busiest),
        group=_group(recipe, mixed, num_islands, rounds),
    )


def _period(core: Core, plan: Plan, mixed: Mixing, rounds: int, per_host: int) -> tuple[Exchange, ...]:
    node, num_nodes = core.peers.node, core.peers.num_nodes
    of: dict[tuple[int, ...], Exchange] = {}
    out = []
    for index in range(rounds):
        alike = _degrees(mixed.rows(index, node, num_nodes), node, per_host)
        if alike not in of:
            of[alike] = _exchange(core, plan, index, per_host)
        out.append(of[alike])
    return tuple(out)


def _exchange(core: Core, plan: Plan, index: int, per_host: int) -> Exchange:
    """Round ``index`` of every bucket, whatever its fragment's turn."""
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
    return Exchange(tuple(gradients), tuple(rounds))


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
            )
        )
        link.inbox = {p: torch.zeros(n, dtype=torch.uint8, device=lane.bucket.x.device) for p, n in link.expected.items()}
    if lands and lane.algorithm.land is not None:
        lane.algorithm.land(lane.bucket, lane.state)
    lane.flight, lane.land_step = None, -1
    return Flown(lane.bucket.fragment, tuple(phases), _moved(recorder))


def _moved(recorder: spans.Recorder) -> int:
    return sum(s.moved_bytes for s in recorder.spans)


def _state_bytes(core: Core) -> int:
    return sum(t.numel() * t.element_size() for lane in core.lanes for t in lane.state.values())


def _in_flight(exchange: Exchange) -> int:
    """Copies of what is posted and rooms for what is expected, of the largest phase of each flight; a copy serves all peers."""
    return sum(
        max((p.heard_bytes + (p.far_bytes + p.near_bytes) // max(1, p.wires) for p in f.phases), default=0)
        for f in (*exchange.gradients, *exchange.rounds)
    )


def _load(period: Sequence[Exchange]) -> tuple[int, int]:
    return sum(e.far_bytes for e in period), sum(e.sent_bytes for e in period)


def _rounds(mixed: Mixing, num_islands: int, server: str | None) -> int:
    if not mixed.drawn:
        return min(_MOST_ROUNDS, mixed.period(num_islands))
    turn = 1 if server is None else 1 + parse_server(server).every
    return turn * max(1, 8 // turn)


def _degrees(row: Round, node: int, per_host: int) -> tuple[int, ...]:
    """How many wires go and come, near and far: rounds in which these are equal send as much."""
    near = sum(peer // per_host == node // per_host for peer in row.sends)
    heard = sum(peer // per_host == node // per_host for peer, _ in row.recvs)
    return near, len(row.sends) - near, heard, len(row.recvs) - heard


@cache
def _kinds(talks: tuple[str, str | None, int, str | None], num_islands: int, per_host: int) -> Mapping[int, int]:
    """One node of each kind -> how many there are of it."""
    mixed = mixing_of(*talks)
    rounds = _rounds(mixed, num_islands, talks[-1])
    if num_islands <= MOST_EXACT:
        return dict.fromkeys(range(num_islands), 1)
    counts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for node in range(num_islands):
        row = tuple(_degrees(mixed.rows(i, node, num_islands), node, per_host) for i in range(rounds))
        counts.setdefault(row, []).append(node)
    return {nodes[0]: len(nodes) for nodes in counts.values()}


def _group(recipe: Recipe, mixed: Mixing, num_islands: int, rounds: int) -> float:
    if recipe.reduce == "none":
        return 1.0
    if recipe.reduce in ("gather", "all_to_all"):
        return float(num_islands)
    nodes = range(min(num_islands, MOST_EXACT))
    heard = [len(mixed.rows(i, node, num_islands).recvs) for i in range(rounds) for node in nodes]
    return 1 + sum(heard) / len(heard)

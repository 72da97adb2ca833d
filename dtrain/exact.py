"""How are the islands made equal at the start, and averaged exactly later? What happens on the link outside the rounds."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from dtrain import own
from dtrain.bucket import EXTRA_NAMES, Bucket, Flat, Layout, whole
from dtrain.buffers import Frozen, averaged_buffers, pack, persistent_buffers, together, unpack
from dtrain.connect import Connection
from dtrain.core import Flight
from dtrain.corrected import correct, moments
from dtrain.errors import IslandsDiffer
from dtrain.exchange import DIGEST_BYTES, align, digest, merge, replace, tell
from dtrain.held import frozen_of
from dtrain.link import Link
from dtrain.membership import Notice
from dtrain.own_name import OWN_AXES, is_own
from dtrain.recipes import Recipe
from dtrain.rounds import Rounds
from dtrain.shards import is_part
from dtrain.topology.static import complete
from dtrain.traffic import Traffic
from dtrain.transport.base import MERGE, START
from dtrain.wait import Wait
from dtrain.waves import Wave, in_turn_at_hand, waves_of_average

_PROMISES = ("recipe", "model", "ranks", "seed")
"""What all islands must have brought to join, each compared by 8 bytes of its hash."""
_PROMISE_BYTES = 8
_BUFFERS, _NOTES, _FROZEN = range(EXTRA_NAMES)


def _names_own(axis: str, answer: object) -> TypeGuard[str]:
    return axis in OWN_AXES and isinstance(answer, str) and is_own(answer)


def _answers(recipe: Recipe, edges: int) -> dict[str, object]:
    """Files may lie elsewhere on every host, and differ: a graph's edges count, and what a method of one's own says."""
    left_out = ("name", "summary", "paper", "graph", "method", "near")
    answers = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in left_out}
    answers |= {axis: f"{own.digest(n)}:{n.rpartition(':')[2]}" for axis, n in answers.items() if _names_own(axis, n)}
    return answers | {"edges": edges, "file": own.digest(recipe.name) if is_own(recipe.name) else ""}


class Averaged(NamedTuple):
    """What an exact average found before it made all islands equal."""

    distance: float
    """sqrt(mean_i |x_i - mean|^2) over all trained parameters."""
    steps: tuple[int, ...]
    """Optimizer steps of each island."""


def refuse_unequal_steps(merged_at: Sequence[int]) -> None:
    """Islands that averaged after different numbers of steps have lost each other: no later round would pair up."""
    if len(set(merged_at)) > 1:
        steps = ", ".join(f"island {n} after {s}" for n, s in enumerate(merged_at))
        raise IslandsDiffer(
            f"the islands averaged their models after different numbers of steps ({steps}) and cannot go on together; "
            "give all islands loaders of one length"
        )


class Exact:
    """The exchanges of one rank; its island's ranks call each method together."""

    def __init__(
        self, model: nn.Module, flat: Flat, buckets: Sequence[Bucket], connection: Connection, traffic: Traffic, wait: Wait
    ) -> None:
        self.merges = 0
        """Exact averages done so far."""
        self._model, self._flat, self._buckets = model, flat, buckets
        self._connection, self._traffic, self._wait = connection, traffic, wait
        self._ranks = connection.ranks
        self._device = buckets[0].x.device
        self._averaged: list[Tensor] = []
        self._as_trained: dict[int, Tensor] = {}
        """Parameters by bucket as they were before ``rest`` moved them, from which the next average takes their distance."""

    @torch.no_grad()
    def align(self, recipe: Recipe, seed: int, edges: Sequence[int]) -> None:
        """Refuse islands that cannot work together (``edges``: a number of each level's graph); then give all island 0's model
        where they differ (without its trained parameters where each starts from its own, and those that stay an island's own)."""
        buffers = persistent_buffers(self._model)
        several = self._connection.num_nodes > 1
        if several:
            self._compare(recipe, seed, edges)

        def of_wave(own: Sequence[Bucket]) -> list[Flight]:
            same = own if several and recipe.start == "same" else []
            return [self._flight(START, b.index, lambda link, b=b: align([b.x], link)) for b in same]

        beside = [self._flight(START, self._beyond(_BUFFERS), lambda link: align(buffers, link))] if several and buffers else []
        self._by_waves(0, of_wave, beside, lambda own: None)
        apart = [p.detach() for p in self._flat.apart if not is_part(p)]  # a part is its rank's alone
        self._ranks.share([*buffers, *apart])
        self._averaged = averaged_buffers(self._model)
        self._align_frozen()

    @torch.no_grad()
    def keep(self, rounds: Rounds) -> Callable[[], None]:
        """Make the parameters what ``merge`` would average, that of rounds in flight apart; the call puts all that changes back,
        here and in an average."""
        rests = [value for lane in rounds.lanes if lane.algorithm.rest is not None for value in lane.state.values()]
        tensors = [*self._flat.storages, *self._averaged, *rests]
        saved = [x.clone() for x in tensors]
        self.rest(rounds)

        @torch.no_grad()
        def restore() -> None:
            for x, value in zip(tensors, saved, strict=True):
                x.copy_(value)
            self._flat.changed()

        return restore

    @torch.no_grad()
    def rest(self, rounds: Rounds) -> None:
        """Move the parameters to where a plain mean of theirs is the mean that the method keeps."""
        moves = any(lane.algorithm.rest is not None for lane in rounds.lanes)

        def before(wave: Wave) -> None:
            if moves:
                self._as_trained |= {b.index: b.x.clone() for b in self._own(wave)}

        rounds.rest(before)

    @torch.no_grad()
    def average(self, step: int) -> Averaged:
        """Replace the model, buffers too, by the mean over islands, the same bits on all of them."""
        self._flat.check_in_place(self._model)
        means, apart = dict[int, Tensor](), dict[int, float]()

        def flight(index: int, layout: Layout, x: Tensor) -> Flight:
            means[index] = mean = torch.empty(x.numel(), device=x.device)
            return self._flight(MERGE, index, lambda link: merge(layout, x, mean, link))

        def land(own: Sequence[Bucket]) -> None:
            for b in own:
                mean, before = means.pop(b.index), self._as_trained.pop(b.index, b.x)
                apart[b.index] = float((before.to(torch.float64) - mean).square().sum())
                b.x.copy_(mean)

        buffers = pack(self._averaged) if self._ranks.replica == 0 else None
        beside = [] if buffers is None else [flight(self._beyond(_BUFFERS), whole("buffers", buffers), buffers)]
        self._connection.membership.announce(Notice(step, self.merges, merging=True))
        self._by_waves(step, lambda own: [flight(b.index, b.layout, b.x) for b in own], beside, land)
        if buffers is not None:
            unpack(self._averaged, means[self._beyond(_BUFFERS)])
        self._ranks.share(self._averaged)
        averaged = self._compare_notes(step, self._ranks.total([sum(apart[index] for index in sorted(apart))])[0])
        self.merges += 1
        return averaged

    def correct(self, step: int, before: Tensor) -> None:
        """Give the average that was just taken back the variance of what it is of; ``before``: this island's ``moments`` then."""
        if not len(before):  # biases and gains alone
            return
        parameters = self._flat.parameters
        rows = self._tell(step, torch.cat((before[:, 0], moments(parameters).flatten())).tolist())
        told = torch.tensor(rows, dtype=torch.float64)
        tensors = len(before)
        # Island 0's moments of the mean, so that no island's arithmetic sets it apart.
        correct(parameters, told[:, :tensors].mean(dim=0), told[0, tensors:].view(tensors, 2))
        self.merges += 1

    def _align_frozen(self) -> None:
        """Apart, so that a statistic that differs does not send a frozen model along. Digests of all go at once, and then a few
        parameters at a time where they differ."""
        groups = list(together(frozen_of(self._model)))
        digests = list[Tensor]()
        for few in groups:
            values = [p.read() for p in few]
            self._ranks.share(values)
            if self._connection.num_nodes > 1 and self._ranks.replica == 0:
                digests.append(digest(values))
        if not groups or self._connection.num_nodes == 1:
            return
        for number, apart in enumerate(self._differing(digests, len(groups))):
            if apart and self._connection.node in (0, *apart):
                self._replace(groups[number], apart, 1 + number)

    def _differing(self, digests: Sequence[Tensor], count: int) -> list[list[int]]:
        """Of each of so many groups the islands whose values are not island 0's; all who hold the same parameters learn them."""
        everyone: list[Tensor] = []
        flights: list[Flight] = []
        if self._ranks.replica == 0:
            own = torch.cat([*digests]).to(self._device)
            flights.append(self._flight(START, self._beyond(_FROZEN), lambda link: tell(own, everyone, link), 0))
        self._run(0, flights)
        told = torch.zeros(self._connection.num_nodes, count, DIGEST_BYTES, dtype=torch.uint8, device=self._device)
        for row, one in zip(told, everyone, strict=False):
            row.copy_(one.view(count, DIGEST_BYTES))
        self._ranks.share([told])
        differ = (told != told[0]).any(dim=2).T.tolist()
        return [[node for node, differs in enumerate(row) if differs] for row in differ]

    def _replace(self, few: Sequence[Frozen], apart: Sequence[int], number: int) -> None:
        values = [p.read() for p in few]
        flight = self._flight(START, self._beyond(_FROZEN), lambda link: replace(values, apart, link), number)
        self._run(0, [flight] if self._ranks.replica == 0 else [])
        self._ranks.share(values)
        for p, value in zip(few, values, strict=True):
            p.write(value)

    def _compare_notes(self, step: int, apart: float) -> Averaged:
        told = self._tell(step, [apart, float(step)])
        return Averaged((sum(d for d, _ in told) / self._connection.num_nodes) ** 0.5, tuple(int(s) for _, s in told))

    def _tell(self, step: int, values: Sequence[float]) -> list[list[float]]:
        """An island tells a few numbers, as many as the others; all who hold the same parameters learn them, a list an island."""
        everyone: list[Tensor] = []
        if self._ranks.replica == 0:
            own = torch.tensor(values, dtype=torch.float64).view(torch.uint8).to(self._device)
            self._run(step, [self._flight(MERGE, self._beyond(_NOTES), lambda link: tell(own, everyone, link))])
        else:
            self._run(step, [])
        told = torch.zeros(self._connection.num_nodes, len(values), dtype=torch.float64, device=self._device)
        for row, note in zip(told, everyone, strict=False):
            row.copy_(note.clone().view(torch.float64))
        self._ranks.share([told])
        return told.tolist()

    def _compare(self, recipe: Recipe, seed: int, edges: Sequence[int]) -> None:
        """Raises IslandsDiffer where an island brought another recipe, model, number of ranks or seed than island 0. Ranks that
        share buckets bring the same, and one of them compares."""
        everyone: list[Tensor] = []
        own = torch.frombuffer(bytearray(self._promises(recipe, seed, edges)), dtype=torch.uint8).to(self._device)
        notes = [self._flight(START, self._beyond(_NOTES), lambda link: tell(own, everyone, link))]
        self._run(0, notes if self._ranks.replica == 0 else [])
        for node, told in enumerate(everyone):
            for k, name in enumerate(_PROMISES):
                part = slice(k * _PROMISE_BYTES, (k + 1) * _PROMISE_BYTES)
                if not torch.equal(told.cpu()[part], everyone[0].cpu()[part]):
                    raise IslandsDiffer(
                        f"island {node} has another {name} than island 0; join all islands of a job with the same "
                        "recipe, axes, model, number of ranks and seed"
                    )

    def _promises(self, recipe: Recipe, seed: int, edges: Sequence[int]) -> bytes:
        answers = [_answers(level, number) for level, number in zip(recipe.levels, edges, strict=True)]
        group = None if recipe.near is None else recipe.near.islands
        model = [
            (str(b.x.dtype), b.lane, [(s.shape, s.global_offset, s.start, s.stop) for s in b.layout.spans]) for b in self._buckets
        ]
        beside = [(str(x.dtype), list(x.shape)) for x in [*frozen_of(self._model), *persistent_buffers(self._model)]]
        facts = ([answers, group], [model, beside], self._connection.num_lanes, seed)
        return b"".join(hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).digest()[:_PROMISE_BYTES] for fact in facts)

    def _by_waves(
        self, step: int, flights_of_wave: Callable[[Sequence[Bucket]], Sequence[Flight]], beside: Sequence[Flight],
        land: Callable[[Sequence[Bucket]], None],
    ) -> None:  # fmt: skip
        """Launch the flights of this rank's buckets and land them, wave by wave; rank 0's ``beside`` go with the last."""
        order, flying = waves_of_average(self._ranks, self._buckets), deque[Sequence[Flight]]()

        def begin(wave: Wave) -> None:
            flights = flights_of_wave(self._own(wave))
            if wave is order[-1] and self._ranks.replica == 0:
                flights = [*flights, *beside]
            self._traffic.launch(flights)
            flying.append(flights)

        def end(wave: Wave) -> None:
            self._wait.all(step, self.merges, flying.popleft())
            land(self._own(wave))

        in_turn_at_hand(self._ranks, order, begin, end)

    def _own(self, wave: Wave) -> list[Bucket]:
        return [b for b in wave if b.owner == self._ranks.replica]

    def _run(self, step: int, flights: Sequence[Flight]) -> None:
        self._traffic.launch(flights)
        self._wait.all(step, self.merges, flights)

    def _beyond(self, name: int) -> int:
        """The bucket number of what is no bucket."""
        return len(self._buckets) + name

    def _flight(
        self, kind: int, bucket: int, generator: Callable[[Link], Iterator[None]], number: int | None = None
    ) -> Flight:
        node, num_nodes = self._connection.node, self._connection.num_nodes
        link = Link(node, num_nodes, complete(0, node, num_nodes), keeps_nothing=True)
        return Flight(generator(link), link, kind=kind, index=self.merges if number is None else number, bucket=bucket, step=0)

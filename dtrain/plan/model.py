"""How long does a step take? The runtime model: one island's clock, its uplink, and what it waits for.

Were all islands alike and in step, one would stand for all: what it waits for left its peers when its own wires of the same phase
left. With t the seconds of a step without exchange, and all times in seconds:
    uplink:    a wire of b bytes that is posted at p has left at   f <- max(f, p) + 8 b / rate      (f: when the uplink is free);
    phase:     its wires are there at   a = f + rtt / 2 + c,   c = phase_s + wires x wire_s + bytes x byte_s   (of threads);
               a round of Q phases posts phase q + 1 where phase q is there, behind what else the uplink has taken on meanwhile;
    step k:    clock <- clock + t;
               a round that started after step k - delay is waited for:   clock <- max(clock, a);
               gradients, where the method has them: posted and waited for here;
               then rounds that start after step k:   clock <- clock + encoding,   and they fly.
With one phase that is the familiar   max(0, rtt / 2 + 8 b / rate - delay t)   a round. Wires to islands on the same host take
another uplink, with a rate of its own. Links are full duplex, and a phase takes as long as the larger of what it sends and hears.

Where ranks hold parts of the parameters, w of a round's n waves are under way at once (waves.py), and a round that is waited for
makes ceil(n / w) trips: of each but the last is waited for what of the way L, rtt / 2 a phase, the others' bytes, encoding and
landing, b a wave, do not hide:   max(0, L - (w - 1) b).

To that is added what islands wait longer where steps are unequal, by chance or because some islands or links are slow: the
difference between two recursions over all islands, with it and without (lateness.py).

Where islands compute on the cores that also carry their wires, the carrying is not free although it is hidden: its CPU time, and
that of decoding in the background, is added to the step, times ``crowd``, the threads that share a core."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from dtrain.plan.company import LinkSpeed
from dtrain.plan.lateness import Course, Leg, Pace, Trip, When, follow
from dtrain.plan.sent import Exchange, Flown, Phase, Sent


class Carrying(NamedTuple):
    """CPU seconds of an island, for who sends and hears one wire each."""

    phase_s: float
    wire_s: float
    wire_s_per_byte: float


@dataclass(frozen=True, slots=True)
class Island:
    """What computes."""

    step_s: float
    """A step without exchange, with all islands of its machine at work."""
    jitter_s: float
    """Standard deviation of it, of what is an island's own."""
    memory_bytes_per_s: float
    """At which encoding, decoding and landing move bytes."""
    phase_s: float = 0.0
    wire_s: float = 0.0
    wire_s_per_byte: float = 0.0
    """CPU time of carrying: of each phase of a flight, of each wire that it posts, and of each of their bytes."""
    crowd: float = 0.0
    """Threads that share a core with what carries the wires; 0 where that has cores of its own."""
    num_ranks: int = 1
    """Which share its buckets."""
    intra_bytes_per_s: float = math.inf
    """At which ranks give each other the values that have landed."""
    factors: tuple[float, ...] | None = None
    """By island, times as long as ``step_s``; None: all are alike."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Means of an island's steps, all in seconds."""

    step_s: float
    link_s: float
    """Waited for bytes."""
    late_s: float
    """Waited for islands that were slower by chance."""
    work_s: float
    """Encoding, landing, and what carrying and decoding take from the cores."""
    unequal_s: float = 0.0
    """Waited for islands and links that are slower than others, always."""
    error_s: float = 0.0
    """Standard error of ``late_s``, which is drawn."""

    @property
    def waits(self) -> float:
        """The part of a step in which nothing is computed."""
        return (self.link_s + self.late_s + self.unequal_s) / self.step_s


def step_time(sent: Sent, when: When, island: Island, link: LinkSpeed) -> StepTime:
    """Follow one island until every round of the topology's period has been done, after two periods of rounds to settle; then
    all, where they are not alike."""
    run = _Run(sent, when, island, link)
    before = max(2 * when.every, when.delay_steps + 1)
    for step in range(1, before + 1):
        run.step(step)
    run.begin_count()
    counted = when.every * len(sent.period)
    for step in range(before + 1, before + counted + 1):
        run.step(step)
    alike = run.mean(counted)
    if sent.company.num_islands == 1 and island.factors:  # each goes at its own pace
        return replace(alike, step_s=alike.step_s * len(island.factors) / sum(1 / f for f in island.factors))
    if sent.company.num_islands == 1 or not (island.jitter_s or island.factors or link.between):
        return alike
    return _unlike(sent, when, island, link, alike)


def _unlike(sent: Sent, when: When, island: Island, link: LinkSpeed, alike: StepTime) -> StepTime:
    """The same rounds are followed with what is unequal and without: how many islands come to their pace from where they began,
    which takes a ring of 64 about as many rounds, is then in both."""
    course, hidden_s = _course(sent, when, island, link)
    pace = Pace(island.step_s, island.jitter_s, island.factors)
    noisy = follow(course, sent.company, link, pace, hidden_s=hidden_s)

    def calm_s(link: LinkSpeed, factors: tuple[float, ...] | None) -> float:
        steady = Pace(island.step_s, 0.0, factors)
        return follow(course, sent.company, link, steady, settle=noisy.settled, rounds=noisy.rounds).mean_s

    always_s = calm_s(link, island.factors) if island.jitter_s else noisy.mean_s
    in_step_s = calm_s(replace(link, between={}), None) if island.factors or link.between else always_s
    late_s, unequal_s = max(0.0, noisy.mean_s - always_s), max(0.0, always_s - in_step_s)
    slower_s = (sum(island.factors) / len(island.factors) - 1) * island.step_s if island.factors else 0.0
    return replace(
        alike, step_s=alike.step_s + slower_s + late_s + unequal_s, late_s=late_s, unequal_s=unequal_s, error_s=noisy.error_s
    )


def _course(sent: Sent, when: When, island: Island, link: LinkSpeed) -> tuple[Course, float]:
    """An island's steps, all buckets of a round together, and how much longer its rounds could take before they are waited for.
    Of a topology's rounds the one with the most wires says how long a wire is."""
    exchange = max(sent.period, key=lambda e: sum(p.wires for f in (*e.gradients, *e.rounds) for p in f.phases))
    gradients, _ = _trip(exchange.gradients, island, link, hidden=False)
    window = _Window.of(sent, when)
    trips = [
        _trip([f for f in exchange.rounds if f.fragment == p], island, link, hidden=when.delay_steps > 0, window=window)
        for p in range(when.fragments)
    ]
    rounds = tuple(trip for trip, _ in trips) if exchange.rounds else ()
    longest_s = max(takes_s for _, takes_s in trips)
    hidden_s = max(0.0, when.delay_steps * island.step_s - longest_s) if when.delay_steps and not exchange.gradients else 0.0
    return Course(when, gradients if exchange.gradients else None, rounds), hidden_s


@dataclass(frozen=True, slots=True)
class _Window:
    """Of a round's waves, where ranks hold parts of the parameters."""

    at_hand: float = 1.0
    """One, as a share of the round."""
    under_way: float = 1.0
    """Those that fly at once."""

    @classmethod
    def of(cls, sent: Sent, when: When) -> _Window:
        return cls(min(1.0, sent.at_hand * when.fragments), min(1.0, sent.under_way * when.fragments))

    def stalls_s(self, flown: Sequence[Flown], link: LinkSpeed, took_s: float, landing_s: float) -> float:
        """How much longer a round is waited for than if all flew at once, which took so long from the first's encoding on."""
        trips, way_s = math.ceil(1 / self.under_way - 1e-9), _way_s(flown, link)
        phases = [p for f in flown for p in f.phases]
        leave_s = max(
            _seconds(sum(p.far_load for p in phases), link.far_bits_per_s),
            _seconds(sum(p.near_load for p in phases), link.near_bits_per_s),
        )
        busy_s = max(leave_s, took_s - way_s) + landing_s  # of several phases some leave while others are on the way
        return (trips - 1) * max(0.0, way_s - (self.under_way - self.at_hand) * busy_s)


def _way_s(flown: Sequence[Flown], link: LinkSpeed) -> float:
    """Of a flight's phases, one behind the other, without bytes."""
    return max(
        (sum(max(_leaves_s(p.far_load, None, link.rtt_s), _leaves_s(p.near_load, None, link.near_rtt_s)) for p in f.phases)
         for f in flown), default=0.0,
    )  # fmt: skip


def _trip(
    flown: Sequence[Flown], island: Island, link: LinkSpeed, *, hidden: bool, window: _Window | None = None
) -> tuple[Trip, float]:
    """All flights together, and how long the last is under way, from when the first is encoded."""
    uplinks = _Uplinks(island, link)
    flights, encoding_s = uplinks.start(flown, 0.0)
    takes_s, landing_s = uplinks.finish(flights) if flights else 0.0, uplinks.landing_s(flown)
    if window is not None:
        takes_s += window.stalls_s(flown, link, takes_s, landing_s)
    phases = [[f.phases[k] for f in flown if k < len(f.phases)] for k in range(max((len(f.phases) for f in flown), default=0))]
    plain = [
        max(_leaves_s(sum(p.far_load for p in of), link.far_bits_per_s, link.rtt_s),
            _leaves_s(sum(p.near_load for p in of), link.near_bits_per_s, link.near_rtt_s))
        for of in phases
    ]  # fmt: skip
    more_s = (takes_s - sum(plain)) / max(1, len(phases))
    legs = tuple(
        Leg(sum(8 * (p.far_bytes + p.near_bytes) / max(1, p.wires) for p in of), more_s) for of in phases
    )
    return Trip(encoding_s, legs, landing_s, uplinks.stolen_s(flown) if hidden else 0.0), takes_s


def _leaves_s(num_bytes: int, bits_per_s: float | None, rtt_s: float) -> float:
    return _seconds(num_bytes, bits_per_s) + rtt_s / 2 if num_bytes else 0.0


class _Flight:
    def __init__(self, flown: Flown, ready_s: float) -> None:
        self.flown = flown
        self.done_s: float | None = None if flown.phases else ready_s


class _Uplinks:
    """Wires leave in the order in which they are posted, far ones and near ones each by a link of their own."""

    def __init__(self, island: Island, link: LinkSpeed) -> None:
        self._island, self._link = island, link
        self._far_s = self._near_s = 0.0
        self._carrier_s = [0.0] * island.num_ranks
        """When the threads of each rank that carry its wires are free."""
        self._posts: list[tuple[float, int, int, _Flight]] = []
        self._count = 0

    def post(self, flight: _Flight, at_s: float, phase: int = 0) -> None:
        if flight.flown.phases:
            self._count += 1
            heapq.heappush(self._posts, (at_s, self._count, phase, flight))

    def until(self, at_s: float) -> None:
        """Let go what is posted before then; later posts may still come."""
        while self._posts and self._posts[0][0] <= at_s:
            self._one()

    def finish(self, flights: Sequence[_Flight]) -> float:
        """When the last of them is here."""
        while any(f.done_s is None for f in flights):
            self._one()
        return max(f.done_s for f in flights if f.done_s is not None)

    def _one(self) -> None:
        at_s, _, k, flight = heapq.heappop(self._posts)
        phase = flight.flown.phases[k]
        here_s = self._carried(phase, flight.flown.rank, at_s + (self.work_s(phase.work_bytes) if k else 0.0))
        if k + 1 < len(flight.flown.phases):
            self.post(flight, here_s, k + 1)
        else:
            flight.done_s = here_s

    def _carried(self, phase: Phase, rank: int, at_s: float) -> float:
        here_s = at_s
        if phase.far_load:
            self._far_s = max(self._far_s, at_s) + _seconds(phase.far_load, self._link.far_bits_per_s)
            here_s = max(here_s, self._far_s + self._link.rtt_s / 2)
        if phase.near_load:
            self._near_s = max(self._near_s, at_s) + _seconds(phase.near_load, self._link.near_bits_per_s)
            here_s = max(here_s, self._near_s + self._link.near_rtt_s / 2)
        carried_s = carry_s(phase, self._island)
        self._carrier_s[rank] = max(self._carrier_s[rank], at_s) + carried_s
        return max(here_s + carried_s, self._carrier_s[rank])

    def work_s(self, moved_bytes: int) -> float:
        return moved_bytes / self._island.memory_bytes_per_s * max(1.0, self._island.crowd)

    def start(self, flown: Sequence[Flown], clock_s: float) -> tuple[list[_Flight], float]:
        """Each rank encodes its buckets one after another, and posts each as soon as it is; returns when the last of them has."""
        self.until(clock_s)
        clocks_s, flights = [clock_s] * self._island.num_ranks, list[_Flight]()
        for f in flown:
            clocks_s[f.rank] += self.work_s(f.phases[0].work_bytes) if f.phases else 0.0
            flights.append(_Flight(f, clocks_s[f.rank]))
            self.post(flights[-1], clocks_s[f.rank])
        return flights, max(clocks_s)

    def landing_s(self, flown: Sequence[Flown]) -> float:
        """Each rank lands its buckets; then all have to get what the others landed, whatever path a broadcast takes."""
        ranks, values_bytes = self._island.num_ranks, sum(f.values_bytes for f in flown)
        shared_s = values_bytes * (ranks - 1) / ranks / self._island.intra_bytes_per_s
        return self.longest_s(flown, lambda f: self.work_s(f.landing_bytes)) + shared_s

    def longest_s(self, flown: Sequence[Flown], takes_s: Callable[[Flown], float]) -> float:
        """Of the rank that has most to do."""
        each_s = [0.0] * self._island.num_ranks
        for f in flown:
            each_s[f.rank] += takes_s(f)
        return max(each_s)

    def stolen_s(self, flown: Sequence[Flown]) -> float:
        """What the flights' threads take from the compute that they hide behind."""
        if not self._island.crowd:
            return 0.0
        return self.longest_s(
            flown, lambda f: sum(carry_s(p, self._island) for p in f.phases) + self.work_s(f.background_bytes)
        )


def carry_s(phase: Phase, island: Island) -> float:
    """CPU seconds for the wires of a phase to leave and for those of the peers to come, in wall time."""
    own_s = island.phase_s + phase.wires * island.wire_s + (phase.far_bytes + phase.near_bytes) * island.wire_s_per_byte
    return own_s * max(1.0, island.crowd)


def _seconds(num_bytes: int, bits_per_s: float | None) -> float:
    return 0.0 if bits_per_s is None else num_bytes * 8 / bits_per_s


class _Run:
    def __init__(self, sent: Sent, when: When, island: Island, link: LinkSpeed) -> None:
        self._sent, self._when, self._island = sent, when, island
        self._uplinks, self._link, self._window = _Uplinks(island, link), link, _Window.of(sent, when)
        self._clock_s = self._link_s = self._work_s = self._begun_s = 0.0
        self._from = (0.0, 0.0, 0.0)
        self._round = [0] * when.fragments
        self._flying: dict[int, list[_Flight]] = {}
        """Landing step -> flights."""

    def begin_count(self) -> None:
        self._from = (self._clock_s, self._link_s, self._work_s)

    def mean(self, steps: int) -> StepTime:
        now = (self._clock_s, self._link_s, self._work_s)
        step_s, link_s, work_s = ((b - a) / steps for a, b in zip(self._from, now, strict=True))
        return StepTime(step_s, link_s, 0.0, work_s)

    def step(self, step: int) -> None:
        when = self._when
        self._clock_s += self._island.step_s
        exchange = self._exchange(0)
        if when.delay_steps:
            self._land(step)
        if exchange.gradients:
            flights = self._start(exchange.gradients)
            self._wait(flights)
            self._work(self._uplinks.landing_s([f.flown for f in flights]))
            if not exchange.rounds:
                self._round[0] += 1
        self._begun_s = self._clock_s
        starting = [p for p in range(when.fragments) if when.starts(step, p)]
        for fragment in starting:
            flown = [f for f in self._exchange(fragment).rounds if f.fragment == fragment]
            self._flying.setdefault(step + when.delay_steps, []).extend(self._start(flown))
            self._round[fragment] += 1
        if not when.delay_steps:
            self._land(step)

    def _exchange(self, fragment: int) -> Exchange:
        return self._sent.period[self._round[fragment] % len(self._sent.period)]

    def _start(self, flown: Sequence[Flown]) -> list[_Flight]:
        flights, encoded_s = self._uplinks.start(flown, self._clock_s)
        self._work(encoded_s - self._clock_s)
        return flights

    def _land(self, step: int) -> None:
        flights = self._flying.pop(step, [])
        if flights:
            if self._when.delay_steps:
                self._work(self._uplinks.stolen_s([f.flown for f in flights]))
            flown = [f.flown for f in flights]
            self._wait(flights)
            landing_s, took_s = self._uplinks.landing_s(flown), self._clock_s - self._begun_s
            if not self._when.delay_steps:
                self._stall(self._window.stalls_s(flown, self._link, took_s, landing_s))
            self._work(landing_s)

    def _wait(self, flights: Sequence[_Flight]) -> None:
        self._stall(max(0.0, self._uplinks.finish(flights) - self._clock_s))

    def _stall(self, seconds: float) -> None:
        self._link_s += seconds
        self._clock_s += seconds

    def _work(self, seconds: float) -> None:
        self._work_s += seconds
        self._clock_s += seconds

"""How long do islands wait for those that are slower, by chance or always? All of them are followed, with steps that are drawn.

An island that comes late to a round keeps those waiting who hear it, and who was ahead stays ahead until somebody stops it: a
round that is hidden behind later steps is waited for once the islands have drifted apart by what it hides. So lateness is no
function of one round; it is the growth of the recursion over rounds, in which + is an island's time and max is waiting:
    computing:  clock_i <- clock_i + t_i;    t_i lognormal, of the step's mean and standard deviation;
    a round:    wire (i, j) is there at   max(clock_i, free_i) + queue_ij + way_ij;   free_i: when i's uplink is;
                island j has the round at   a_j = max over i that j hears,   and posts the next phase then;
    landing:    clock_j <- max(clock_j, a_j)   and what that adds was waited for.
Where a downlink has more to carry than the uplinks that it hears from, the round is not there before it has.

Followed are all islands, up to the 1,000 that a plan has, each with its own peers; of few, several copies of the job. Left out: a
round's phases take the uplink one behind the other, where in truth a later round's first may slip in between; buckets of a round
are one; an island's steps are independent of each other and of other islands'. Batches of rounds are followed until the standard
error of what is waited for is ERROR of a step or PART of itself, or there were MOST_BATCHES."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from dtrain.plan.company import Company, Floats, Laid, LinkSpeed, as_rounds, lay

ERROR, PART = 0.003, 0.03
BATCHES, MOST_BATCHES, _ROUNDS_A_BATCH = 8, 40, 12
_LEAST_SETTLE, _MOST_SETTLE = 24, 240
_AT_ONCE = 64
"""Islands of all copies: numpy takes as long for fewer."""
_SEED = 20241011


@dataclass(frozen=True, slots=True)
class When:
    """A recipe's rounds in time."""

    every: int
    delay_steps: int
    fragments: int = 1

    def starts(self, step: int, fragment: int) -> bool:
        return step % self.every == fragment * self.every // self.fragments


@dataclass(frozen=True, slots=True)
class Leg:
    """A phase of a flight, all buckets together."""

    wire_bits: float
    """Of one wire."""
    more_s: float
    """On the way, besides half of a round trip: carrying, decoding, what buckets save or lose by following each other."""


@dataclass(frozen=True, slots=True)
class Trip:
    """A round of a fragment, or an exchange of gradients."""

    encoding_s: float
    legs: tuple[Leg, ...]
    landing_s: float
    stolen_s: float = 0.0
    """That an island's clock takes when it is here, and that carrying took from the steps that it was hidden behind."""


@dataclass(frozen=True, slots=True)
class Course:
    """What an island does over its steps."""

    when: When
    gradients: Trip | None
    rounds: tuple[Trip, ...]
    """By fragment."""


@dataclass(frozen=True, slots=True)
class Pace:
    step_s: float
    jitter_s: float = 0.0
    factors: tuple[float, ...] | None = None
    """By island; None: all are alike."""


@dataclass(frozen=True, slots=True)
class Waited:
    """Seconds a step, the mean over islands."""

    mean_s: float
    error_s: float
    """Standard error, of batches of rounds."""
    each_s: tuple[float, ...]
    """By copy."""
    settled: int
    rounds: int
    """That were not counted, and that were."""


@cache
def follow(
    course: Course,
    company: Company,
    link: LinkSpeed,
    pace: Pace,
    *,
    hidden_s: float = 0.0,
    settle: int | None = None,
    rounds: int | None = None,
    copies: int | None = None,
) -> Waited:
    """``hidden_s``: what a round could take longer before it is waited for, were all in step; islands begin as far apart as that,
    and settle. ``settle``, ``rounds`` and ``copies``: so many, where they are said; islands begin in step where ``settle`` is
    said."""
    copies = copies or (max(1, _AT_ONCE // company.num_islands) if pace.jitter_s else 1)
    run = _Islands(course, company, link, pace, copies)
    if settle is None:
        settle = _settling(course.when, pace, hidden_s)
        if pace.factors or link.between:  # who is slow is known all around a ring after as many rounds as it has islands
            settle = min(_MOST_SETTLE, max(settle, _LEAST_SETTLE + 2 * company.num_islands))
        run.spread(hidden_s)
    if not pace.jitter_s:
        rounds = rounds or 2 * run.period
    every = course.when.every
    most, size = (MOST_BATCHES, _ROUNDS_A_BATCH) if rounds is None else (1, rounds)
    run.until(settle * every)
    began, batches = run.waited_s.copy(), list[float]()
    for batch in range(1, most + 1):
        before = run.waited_s.mean()
        run.until((settle + batch * size) * every)
        batches.append(float(run.waited_s.mean() - before) / (size * every))
        if batch >= BATCHES and _error(batches) <= max(ERROR * pace.step_s, PART * float(np.mean(batches))):
            break
    counted = len(batches) * size
    each = (run.waited_s - began) / (counted * every)
    return Waited(float(each.mean()), _error(batches), tuple(each.tolist()), settle, counted)


def _error(batches: list[float]) -> float:
    return float(np.std(batches, ddof=1)) / math.sqrt(len(batches)) if len(batches) > 1 else 0.0


def _settling(when: When, pace: Pace, hidden_s: float) -> int:
    """Rounds until islands have drifted as far apart as a round hides: the square of it in their noise's standard deviation.
    Where that is more than _MOST_SETTLE, an island waits less than a fifteenth of a round's noise: its start matters little."""
    noise_s = pace.jitter_s * math.sqrt(when.every)
    return _LEAST_SETTLE if not noise_s else int(min(_MOST_SETTLE, max(_LEAST_SETTLE, (hidden_s / noise_s) ** 2)))


class _Islands:
    def __init__(self, course: Course, company: Company, link: LinkSpeed, pace: Pace, copies: int) -> None:
        self._course, self._pace, self._n = course, pace, company.num_islands
        said = as_rounds(company, link)
        self._laid = None if said is None else [lay(heard, self._n, link) for heard in said]
        self._everyone_per_bit = 0.0 if link.far_bits_per_s is None else 1 / link.far_bits_per_s
        self._everyone_way_s = link.rtt_s / 2
        self.period = 1 if self._laid is None else len(self._laid)
        self._draws = np.random.default_rng(_SEED)
        self._factors = None if pace.factors is None else np.array(pace.factors)
        shape = copies, self._n
        self.clock = np.zeros(shape)
        self.waited_s = np.zeros(copies)
        """Of the mean island, so far."""
        self._far_free, self._near_free = np.zeros(shape), np.zeros(shape)
        self._round = [0] * course.when.fragments
        self._step = 0
        self._flying: dict[int, list[tuple[Floats, Trip]]] = {}
        """Landing step -> when each island has a round."""

    def spread(self, over_s: float) -> None:
        self.clock += self._draws.uniform(0.0, over_s, self.clock.shape) if self._pace.jitter_s and over_s > 0 else 0.0

    def until(self, step: int) -> None:
        for busy in self._busy(step):
            self._compute(busy - self._step)
            self._step = busy
            self._exchange(busy)

    def _busy(self, last: int) -> Iterator[int]:
        """Steps at which an island does more than computing."""
        when, each = self._course.when, self._course.gradients is not None
        while self._step < last:
            starts = (p * when.every // when.fragments for p in range(when.fragments))
            after = min((self._step - at) // when.every * when.every + when.every + at for at in starts)
            yield self._step + 1 if each else min(last, after, *self._flying)

    def _compute(self, steps: int) -> None:
        pace = self._pace
        seconds = np.full(self.clock.shape, pace.step_s * steps)
        if pace.jitter_s:
            variance = math.log1p((pace.jitter_s / pace.step_s) ** 2 / steps)
            seconds *= np.exp(self._draws.normal(-variance / 2, math.sqrt(variance), self.clock.shape))
        self.clock += seconds if self._factors is None else seconds * self._factors

    def _exchange(self, step: int) -> None:
        course = self._course
        if course.when.delay_steps:
            self._land(step)
        if course.gradients is not None:
            self._wait(self._fly(course.gradients, self._round[0]), course.gradients)
            if not course.rounds:
                self._round[0] += 1
        for fragment, trip in enumerate(course.rounds):
            if course.when.starts(step, fragment):
                here = self._fly(trip, self._round[fragment])
                self._flying.setdefault(step + course.when.delay_steps, []).append((here, trip))
                self._round[fragment] += 1
        if not course.when.delay_steps:
            self._land(step)

    def _land(self, step: int) -> None:
        for here, trip in self._flying.pop(step, ()):
            self._wait(here, trip)

    def _wait(self, here: Floats, trip: Trip) -> None:
        self.clock += trip.stolen_s
        waited = np.maximum(here - self.clock, 0.0)
        self.waited_s += waited.mean(axis=1)
        self.clock += waited + trip.landing_s

    def _fly(self, trip: Trip, index: int) -> Floats:
        """When each island has the round. Its uplink takes the first wires while later ones are encoded."""
        here = self.clock.copy()
        for leg in trip.legs:
            laid = None if self._laid is None else self._laid[index % self.period]
            here = self._heard_by_all(leg, here) if laid is None else self._heard(leg, here, laid)
        self.clock += trip.encoding_s
        return here

    def _heard(self, leg: Leg, post: Floats, laid: Laid) -> Floats:
        begin = np.maximum(self._far_free, post)
        self._far_free = begin + laid.far_busy * leg.wire_bits
        left = begin[:, laid.source]
        if laid.near is not None:
            near_begin = np.maximum(self._near_free, post)
            self._near_free = near_begin + laid.near_busy * leg.wire_bits
            left = np.where(laid.near, near_begin[:, laid.source], left)
        there = left + laid.queue * leg.wire_bits + np.maximum(laid.way_s + leg.more_s, 0.0)
        here = post.copy()
        if len(laid.starts):
            here[:, laid.hearers] = np.maximum.reduceat(there, laid.starts, axis=1)
            if laid.crowded:
                first = np.minimum.reduceat(left + np.maximum(laid.way_s + leg.more_s, 0.0), laid.starts, axis=1)
                here[:, laid.hearers] = np.maximum(here[:, laid.hearers], first + laid.hears * leg.wire_bits)
        return here

    def _heard_by_all(self, leg: Leg, post: Floats) -> Floats:
        """max over i of   begin_i + ((j - i) mod n) wires,   by running maxima over the islands before j and behind it."""
        n, wire_s = self._n, leg.wire_bits * self._everyone_per_bit
        if n == 1:
            return post
        begin = np.maximum(self._far_free, post)
        self._far_free = begin + (n - 1) * wire_s
        number = np.arange(n, dtype=np.float64) * wire_s
        from_zero = begin - number
        here = np.full(begin.shape, -math.inf)
        here[:, 1:] = np.maximum.accumulate(from_zero, axis=1)[:, :-1]
        behind = np.maximum.accumulate(from_zero[:, ::-1], axis=1)[:, ::-1]
        here[:, :-1] = np.maximum(here[:, :-1], behind[:, 1:] + n * wire_s)
        return here + number + max(0.0, self._everyone_way_s + leg.more_s)

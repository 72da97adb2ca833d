"""Who waits for whom in a round, and over which links? The recipe's own peers, as arrays over all islands.

An island's wires leave one behind the other, in the order in which it posts them; those to islands of its own host take an
uplink of their own. What a wire waits for in front of it, and its way, are laid out once a round: ``queue`` and ``way``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from dtrain.own_topology import mixing_of
from dtrain.topology import Mixing

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_MOST_ROUNDS = 32
"""Of a topology's period that are looked at: more than two periods of one_peer_exponential of 1,000 islands. Two others may be
longer: one_peer_ring of an odd number, whose rounds are alike but for who sits out, and a coloured graph of more colours."""
_MANY_DRAWS, _FEW_DRAWS, _FEW = 64, 8, 64
"""Rounds of a drawn topology that are looked at, of so few islands and of more."""
_MOST_PAIRS = 128
"""Islands up to which everyone's wires to everyone are laid out one by one, where their links are not all alike."""

Talks = tuple[str, str | None, int, str | None]
"""Topology, graph, seed, server."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Between islands of different hosts, and of the same one. None: no limit."""

    far_bits_per_s: float | None
    rtt_s: float
    near_bits_per_s: float | None = None
    near_rtt_s: float = 0.0
    between: Mapping[tuple[int, int], tuple[float | None, float]] = field(default_factory=dict, hash=False)
    """(lower island, higher island) -> rate and round trip that hold between them instead."""


@dataclass(frozen=True, eq=False)
class Heard:
    """Wires of one round, in the order of those who hear them."""

    source: Ints
    to: Ints
    place: Ints
    """In the order in which its island posts."""
    near: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Company:
    """``rounds`` in turn; None where everyone hears everyone in every round, of whom each posts to its next one first."""

    num_islands: int
    per_host: int
    rounds: tuple[Heard, ...] | None


@dataclass(frozen=True, eq=False)
class Laid:
    """A round over a link. Seconds a bit of a wire's length, and seconds."""

    source: Ints
    to: Ints
    near: npt.NDArray[np.bool_] | None
    """None: no wire is."""
    queue: Floats
    """Of a wire: from when its island began to post until it has left."""
    way_s: Floats
    far_busy: Floats
    near_busy: Floats
    """Of an island: its uplinks."""
    hearers: Ints
    starts: Ints
    """Who hears, and where its wires begin."""
    hears: Floats
    """Of each of them: its downlink."""

    @cached_property
    def crowded(self) -> bool:
        """Whether a downlink has more to carry than every uplink that it hears from."""
        busy = np.maximum(self.far_busy, self.near_busy)[self.source]
        return bool(len(self.starts)) and bool((self.hears > np.maximum.reduceat(busy, self.starts) * (1 + 1e-9)).any())


def num_rounds(mixed: Mixing, num_islands: int) -> int:
    if not mixed.drawn:
        return min(_MOST_ROUNDS, mixed.period(num_islands))
    return mixed.turn * max(1, (_MANY_DRAWS if num_islands <= _FEW else _FEW_DRAWS) // mixed.turn)


@cache
def neighbours(talks: Talks, num_islands: int, per_host: int) -> Company:
    mixed = mixing_of(*talks)
    rounds = tuple(_heard(mixed, index, num_islands, per_host) for index in range(num_rounds(mixed, num_islands)))
    return Company(num_islands, per_host, rounds)


@cache
def everyone(num_islands: int, per_host: int) -> Company:
    return Company(num_islands, per_host, None)


def alone() -> Company:
    return everyone(1, 1)


def as_rounds(company: Company, link: LinkSpeed) -> tuple[Heard, ...] | None:
    """Everyone's wires one by one where their links differ; None where they are alike, or too many to tell apart."""
    n = company.num_islands
    if company.rounds is not None:
        return company.rounds
    if n > _MOST_PAIRS or (company.per_host == 1 and not link.between):
        return None
    to, source = (a.ravel() for a in np.meshgrid(np.arange(n), np.arange(n), indexing="ij"))
    other = to != source
    to, source = to[other], source[other]
    return (Heard(source, to, (to - source) % n, source // company.per_host == to // company.per_host),)


def _heard(mixed: Mixing, index: int, num_islands: int, per_host: int) -> Heard:
    wires = [
        (to, source, place)
        for source in range(num_islands)
        for place, to in enumerate(mixed.rows(index, source, num_islands).sends)
    ]
    to, source, place = np.array(sorted(wires), dtype=np.int64).reshape(-1, 3).T
    return Heard(source, to, place, source // per_host == to // per_host)


def lay(heard: Heard, num_islands: int, link: LinkSpeed) -> Laid:
    source, to, near = heard.source, heard.to, heard.near
    per_bit = np.where(near, _per_bit(link.near_bits_per_s), _per_bit(link.far_bits_per_s))
    way_s = np.where(near, link.near_rtt_s / 2, link.rtt_s / 2)
    for (low, high), (rate, rtt_s) in link.between.items():
        these = (np.minimum(source, to) == low) & (np.maximum(source, to) == high)
        per_bit[these], way_s[these] = _per_bit(rate), rtt_s / 2
    far_busy = _sums(source, np.where(near, 0.0, per_bit), num_islands)
    near_busy = _sums(source, np.where(near, per_bit, 0.0), num_islands)
    order = np.lexsort((heard.place, near, source))
    lane = (source * 2 + near)[order]
    gone = np.cumsum(per_bit[order])
    first = np.concatenate([[True], lane[1:] != lane[:-1]]) if len(lane) else np.zeros(0, bool)
    before = np.maximum.accumulate(np.where(first, gone - per_bit[order], 0.0))
    queue = np.empty_like(gone)
    queue[order] = gone - before
    hearers, starts = np.unique(to, return_index=True)
    hears = _sums(to, per_bit, num_islands)[hearers]
    return Laid(source, to, near if near.any() else None, queue, way_s, far_busy, near_busy, hearers, starts, hears)


def _sums(island: Ints, of: Floats, num_islands: int) -> Floats:
    return np.bincount(island, of, num_islands).astype(np.float64)


def _per_bit(bits_per_s: float | None) -> float:
    return 0.0 if bits_per_s is None else 1 / bits_per_s

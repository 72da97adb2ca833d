"""Who sends to whom in a job, and which part of what it sends?

Of a link's own bytes nothing is counted: an island's go evenly over the wires of its topology's rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dtrain import topology
from dtrain.config import Job, runs_a_script
from dtrain.own_name import is_own
from dtrain.sections_sync import Answers

Level = Literal["only", "near", "far"]

MOST_LINKS = 400
"""More are a black disc on any screen."""
_ROUNDS = 64
"""That are looked at where they are drawn anew each time, or come with a server's."""


@dataclass(frozen=True, slots=True)
class Link:
    sender: int
    receiver: int
    share: float
    """Of the bytes that its sender sends on this level."""
    level: Level = "only"


def links(job: Job) -> tuple[Link, ...] | None:
    """None where they are too many. A script's recipe is its own to say, and so is a topology in a file of one's own: there each
    pair of islands is a link."""
    count, sync, seed = job.islands.count, job.sync, job.job.seed
    if sync.level is None:
        found = _level(sync, range(count), seed, "only", script=runs_a_script(job))
        return found if len(found) <= MOST_LINKS else None
    near, size = sync.level[0], sync.level[0].islands or count
    groups = [range(first, first + size) for first in range(0, count, size)]
    inside = [link for group in groups for link in _level(near, group, seed, "near")]
    # An owner in each group holds a part of what is shared, and meets those in its place in the other groups.
    between = [link for place in range(size) for link in _all_pairs(range(place, count, size), "far")]
    return (*inside, *between) if len(inside) + len(between) <= MOST_LINKS else None


def _level(answers: Answers, islands: range, seed: int, level: Level, *, script: bool = False) -> tuple[Link, ...]:
    if answers.reduce == "none" and not script:
        return ()
    name = answers.topology
    if script or name is None or is_own(name) or answers.reduce in ("gather", "all_to_all", "low_rank"):
        return tuple(_all_pairs(islands, level))
    mixing, count = topology.mixing(name, answers.graph, seed, answers.server), len(islands)
    if mixing.chances is not None:
        met = {(a, b): chance for pair, chance in mixing.chances(count).items() for a, b in (pair, pair[::-1])}
    else:
        met = dict[tuple[int, int], float]()
        for index in range(_ROUNDS if mixing.drawn else mixing.period(count)):
            for node in range(count):
                for peer in mixing.rows(index, node, count).sends:
                    met[node, peer] = met.get((node, peer), 0.0) + 1.0
    wires = [sum(weight for (node, _), weight in met.items() if node == k) for k in range(count)]
    return tuple(Link(islands[a], islands[b], weight / wires[a], level) for (a, b), weight in sorted(met.items()))


def _all_pairs(islands: range, level: Level) -> Iterator[Link]:
    yield from (Link(a, b, 1 / (len(islands) - 1), level) for a in islands for b in islands if a != b)

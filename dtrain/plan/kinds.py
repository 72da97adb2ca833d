"""Which islands send as much as one another, and in which rounds? One of each kind is counted, for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from dtrain.own_topology import mixing_of
from dtrain.plan.company import Talks, num_rounds
from dtrain.topology import Round

MOST_EXACT = 4
"""Islands up to which each is counted; of more, one of each kind."""


Degrees = tuple[int, int, int, int]
"""Wires that go, near and far, and that come, near and far."""


class Seen(NamedTuple):
    """A round of an island, and where it was seen."""

    degrees: Degrees
    number: int
    node: int


@dataclass(frozen=True, slots=True)
class Kind:
    """Islands that are alike."""

    node: int
    """One of them."""
    how_many: int
    period: tuple[Seen, ...]
    shares: Mapping[Seen, Fraction]
    """Of all its rounds, in expectation."""

    def mean(self, of: Callable[[Seen], int]) -> Fraction:
        return sum((share * of(seen) for seen, share in self.shares.items()), Fraction(0))


def degrees_of(row: Round, node: int, per_host: int) -> Degrees:
    """How many wires go and come, near and far: rounds in which these are equal send as much."""
    near = sum(peer // per_host == node // per_host for peer in row.sends)
    heard = sum(peer // per_host == node // per_host for peer, _ in row.recvs)
    return near, len(row.sends) - near, heard, len(row.recvs) - heard


@cache
def kinds_of(talks: Talks, num_islands: int, per_host: int) -> Sequence[Kind]:
    """Islands whose rounds are alike, those that are drawn in expectation.

    What an island does in drawn rounds is taken from all islands' draws together that are as likely: K of n islands meet in every
    round with a server, and as many pairs in each of random_pairs, so that their means are exact; of random_edges they are those
    of 64 or 8 rounds of all islands that meet as often. Of one's own topology nothing is known: each island is its own draws."""
    topology, graph, seed, server = talks
    mixed, base = mixing_of(*talks), mixing_of(topology, graph, seed, None)
    rounds = num_rounds(mixed, num_islands)
    chances = base.chances(num_islands) if base.chances is not None else {}
    meets = [Fraction(0)] * num_islands
    for pair, chance in chances.items():
        for node in pair:
            meets[node] += Fraction(chance)

    def lot(index: int, node: int) -> str | None:
        """Rounds of one lot are draws of the same chances; None is not drawn."""
        if server is not None and index % mixed.turn == mixed.turn - 1:
            return "server"
        return f"meets {float(meets[node]):.9f}" if chances else None

    each = {
        node: [
            (lot(i, node), Seen(degrees_of(mixed.rows(i, node, num_islands), node, per_host), i, node)) for i in range(rounds)
        ]
        for node in range(num_islands)
    }
    lots: dict[str, dict[Degrees, tuple[Seen, int]]] = {}
    alike: dict[tuple[object, ...], list[int]] = {}
    for node, row in each.items():
        for name, seen in row:
            if name is not None:
                first, count = lots.setdefault(name, {}).get(seen.degrees, (seen, 0))
                lots[name][seen.degrees] = first, count + 1
        key = tuple(seen.degrees if name is None else name for name, seen in row)
        alike.setdefault((*key, node) if num_islands <= MOST_EXACT and not mixed.drawn else key, []).append(node)
    return [_kind(each[nodes[0]], nodes, {name: dict(of.values()) for name, of in lots.items()}) for nodes in alike.values()]


def _kind(row: Sequence[tuple[str | None, Seen]], nodes: Sequence[int], lots: Mapping[str, Mapping[Seen, int]]) -> Kind:
    """Drawn rounds stand in the period in proportion, to one of each sort, and in the shares exactly."""
    owed = {name: dict.fromkeys(of, 0) for name, of in lots.items()}
    shares: dict[Seen, Fraction] = {}
    period = []
    for name, seen in row:
        of = {seen: 1} if name is None else lots[name]
        total = sum(of.values())
        for one, count in of.items():
            shares[one] = shares.get(one, Fraction(0)) + Fraction(count, total * len(row))
        if name is not None:
            due = owed[name]
            for one, count in of.items():
                due[one] += count
            seen = max(due, key=lambda one: due[one])
            due[seen] -= total
        period.append(seen)
    return Kind(nodes[0], len(nodes), tuple(period), shares)

"""What does a topology say of a round? For each node, its row of the mixing matrix W."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Round(NamedTuple):
    """One node's row of W: its own weight, whom it sends to, and (peer, W[node, peer]) for all it hears."""

    self_weight: float
    sends: tuple[int, ...]
    recvs: tuple[tuple[int, float], ...]


Topology = Callable[[int, int, int], Round]
"""(round index, node, number of nodes) -> the node's Round: a pure function, the same on every island."""

ALONE = Round(1.0, (), ())
"""A node that sits this round out."""


def symmetric(weights: dict[int, float]) -> Round:
    """The row of a symmetric W: what goes to a peer with a weight comes back with the same."""
    peers = tuple(sorted(weights))
    return Round(1.0 - sum(weights.values()), peers, tuple((peer, weights[peer]) for peer in peers))


def pair(peer: int) -> Round:
    """The row of a matching: the mean of two."""
    return Round(0.5, (peer,), ((peer, 0.5),))

"""Who talks to whom in a round?

A topology is a pure function (round index, node, num_nodes) -> Round, the node's row of the mixing matrix W. Every W
here is doubly stochastic, so that mixing never moves the mean of all islands. Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """One node's row of W: its own weight, whom it sends to, and (peer, W[node, peer]) for all it hears."""

    self_weight: float
    sends: tuple[int, ...]
    recvs: tuple[tuple[int, float], ...]


Topology = Callable[[int, int, int], Round]


def complete(index: int, node: int, num_nodes: int) -> Round:
    """Everyone hears everyone with weight 1/n; one round is the exact mean."""
    others = tuple(peer for peer in range(num_nodes) if peer != node)
    return Round(1 / num_nodes, others, tuple((peer, 1 / num_nodes) for peer in others))


def ring(index: int, node: int, num_nodes: int) -> Round:
    """Both neighbours and oneself with weight 1/3; two nodes share one edge with weight 1/2."""
    peers = tuple(sorted({(node - 1) % num_nodes, (node + 1) % num_nodes}))
    weight = 1 / (len(peers) + 1)
    return Round(weight, peers, tuple((peer, weight) for peer in peers))


def one_peer_exponential(index: int, node: int, num_nodes: int) -> Round:
    """Round r: send to node + 2^(r mod ceil(log2 n)), hear from node - 2^r, weight 1/2 each.

    For n = 2^k the product of k rounds is the exact mean (Ying et al. 2021, arXiv 2110.13363).
    """
    if num_nodes == 1:
        return Round(1.0, (), ())
    hop = 2 ** (index % (num_nodes - 1).bit_length())
    return Round(0.5, ((node + hop) % num_nodes,), (((node - hop) % num_nodes, 0.5),))


def random_pairs(seed: int) -> Topology:
    """A fresh random matching each round, agreed by the seed; with odd n one node sits out."""

    def topology(index: int, node: int, num_nodes: int) -> Round:
        order = list(range(num_nodes))
        random.Random(f"pairs/{seed}/{index}").shuffle(order)
        place = order.index(node)
        partner_place = place ^ 1
        if partner_place >= num_nodes:
            return Round(1.0, (), ())
        peer = order[partner_place]
        return Round(0.5, (peer,), ((peer, 0.5),))

    return topology


STATIC = frozenset({"complete", "ring"})
"""Topologies whose W is the same each round, which methods with public copies (CHOCO) need."""

MIN_NODES = {"complete": 1, "ring": 2, "one_peer_exponential": 2, "random_pairs": 2}


def in_degree(name: str, num_nodes: int) -> int:
    """The most peers that a node hears in one round."""
    return {"complete": num_nodes - 1, "ring": min(2, num_nodes - 1)}.get(name, min(1, num_nodes - 1))


def by_name(name: str, seed: int) -> Topology:
    table: dict[str, Topology] = {
        "complete": complete,
        "ring": ring,
        "one_peer_exponential": one_peer_exponential,
        "random_pairs": random_pairs(seed),
    }
    return table[name]

"""Which edges of a graph meet, if each has a clock that rings at random? Poisson clocks of one rate, and one meeting a round.

Each round begins all clocks anew, and an edge meets if it rings before all other edges of its two ends: with probability
1 / (deg_a + deg_b - 1), whatever happened in rounds before, so the rounds between two meetings of an edge, and of a node, are
geometric. The clocks are drawn from the seed, so both ends know."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache, lru_cache

from dtrain.topology.graphs import Graph
from dtrain.topology.row import ALONE, Round, Topology, pair

Chances = Callable[[int], "dict[tuple[int, int], float]"]


def first_of_both(graph: Graph, seed: int) -> Topology:
    edges = cache(lambda num_nodes: sorted((min(edge), max(edge)) for edge in graph(num_nodes).edges))

    @lru_cache(maxsize=8)
    def peers(index: int, num_nodes: int) -> dict[int, int]:
        draw = random.Random(f"edges/{seed}/{index}")
        met: dict[int, int] = {}
        rung: set[int] = set()
        for _, a, b in sorted((draw.random(), a, b) for a, b in edges(num_nodes)):
            if a not in rung and b not in rung:
                met |= {a: b, b: a}
            rung |= {a, b}
        return met

    def topology(index: int, node: int, num_nodes: int) -> Round:
        peer = peers(index, num_nodes).get(node)
        return ALONE if peer is None else pair(peer)

    return topology


def chances(graph: Graph) -> Chances:
    """How likely the ends of each edge are to meet in a round."""

    @cache
    def of(num_nodes: int) -> dict[tuple[int, int], float]:
        made = graph(num_nodes)
        degrees = dict(made.degree())
        return {(a, b): 1 / (degrees[a] + degrees[b] - 1) for a, b in sorted((min(e), max(e)) for e in made.edges)}

    return of

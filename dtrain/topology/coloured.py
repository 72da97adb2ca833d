"""In which order can a graph's edges talk, so that no island's uplink carries two at once? By the colours of its edges.

A colour is a matching; a round lets the edges of one colour average, with weight 1/2. Vizing: deg + 1 colours are enough for any
graph, and the rounds of a period reach every edge once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise

import networkx as nx

from dtrain.topology.graphs import Graph
from dtrain.topology.row import ALONE, Round, Topology, pair

Matchings = Callable[[int], "list[Mapping[int, int]]"]
"""Number of nodes -> the rounds of a period, in each a node -> its peer."""


def matchings(graph: Graph) -> Matchings:
    """The colours of a graph's edges, reckoned once."""

    @cache
    def of(num_nodes: int) -> list[Mapping[int, int]]:
        colours = edge_colours(graph(num_nodes))
        turns: list[dict[int, int]] = [{} for _ in range(max(colours.values(), default=-1) + 1)]
        for (a, b), colour in colours.items():
            turns[colour] |= {a: b, b: a}
        return [turn for turn in turns if turn]

    return of


def in_turns(of: Matchings) -> Topology:
    def topology(index: int, node: int, num_nodes: int) -> Round:
        turns = of(num_nodes)
        if not turns:  # a graph without edges, whose islands only a server brings together
            return ALONE
        peer = turns[index % len(turns)].get(node)
        return ALONE if peer is None else pair(peer)

    return topology


def edge_colours(graph: nx.Graph[int]) -> dict[tuple[int, int], int]:
    """(a, b) with a < b -> a colour, no two edges of a node alike: by Misra and Gries (1992), who need deg + 1 at most."""
    at: dict[int, dict[int, int]] = {node: {} for node in graph}
    """node -> colour -> the neighbour at the other end."""
    most = max((degree for _, degree in graph.degree()), default=0) + 1

    def free(node: int) -> int:
        return next(colour for colour in range(most) if colour not in at[node])

    def colour_of(a: int, b: int) -> int | None:
        return next((colour for colour, peer in at[a].items() if peer == b), None)

    def paint(a: int, b: int, colour: int) -> None:
        at[a][colour], at[b][colour] = b, a

    def unpaint(a: int, b: int) -> None:
        colour = colour_of(a, b)
        if colour is not None:
            del at[a][colour], at[b][colour]

    for u, v in sorted((min(edge), max(edge)) for edge in graph.edges):
        both = next((colour for colour in range(most) if colour not in at[u] and colour not in at[v]), None)
        if both is not None:  # most edges, and all of a path or an even ring with two colours
            paint(u, v, both)
            continue
        fan = _fan(at, u, v)
        c, d = free(u), free(fan[-1])
        _swap_path(at, u, c, d)
        # After the swap d is free at u. The first start of the fan that is still one, and whose last node has d free too, turns.
        end = next(i for i in range(len(fan)) if d not in at[fan[i]] and _is_fan(at, u, fan[: i + 1]))
        turning = [colour_of(u, fan[i + 1]) for i in range(end)]
        for i in range(end):
            unpaint(u, fan[i + 1])
        for i, colour in enumerate(turning):
            assert colour is not None
            paint(u, fan[i], colour)
        paint(u, fan[end], d)
    return {(a, b): colour for a in at for colour, b in at[a].items() if a < b}


def _fan(at: dict[int, dict[int, int]], u: int, v: int) -> list[int]:
    """The longest list of u's neighbours from v on in which the edge to each is coloured with what is free at the one before."""
    fan = [v]
    while True:
        more = next((w for colour, w in sorted(at[u].items()) if w not in fan and colour not in at[fan[-1]]), None)
        if more is None:
            return fan
        fan.append(more)


def _is_fan(at: dict[int, dict[int, int]], u: int, fan: list[int]) -> bool:
    to = {peer: colour for colour, peer in at[u].items()}
    return all(to[b] not in at[a] for a, b in pairwise(fan))


def _swap_path(at: dict[int, dict[int, int]], u: int, c: int, d: int) -> None:
    """Exchange the colours c and d on the path from u on whose edges have them in turns; c is free at u, so it begins with d."""
    nodes, colour = [u], d
    while colour in at[nodes[-1]]:
        nodes.append(at[nodes[-1]][colour])
        colour = c if colour == d else d
    edges = list(pairwise(nodes))
    for i, (a, b) in enumerate(edges):
        old = d if i % 2 == 0 else c
        del at[a][old], at[b][old]
    for i, (a, b) in enumerate(edges):
        new = c if i % 2 == 0 else d
        at[a][new], at[b][new] = b, a

"""Which W has a graph whose links go one way? Columns that sum to one; rows need not, so means need push-sum's weights.

Each node splits what it has evenly over itself and those it sends to: W_ij = 1 / (1 + outdeg_j) (Nedic and Olshevsky 2014, arXiv
1406.2075)."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import networkx as nx

from dtrain.topology.graphs import read_edges
from dtrain.topology.row import Round, Topology

Arcs = Callable[[int], "nx.DiGraph[int]"]
"""Number of nodes -> a directed graph of the nodes 0 to n - 1, without loops; an arc leads from who sends to who hears."""


def cycle(num_nodes: int) -> nx.DiGraph[int]:
    made: nx.DiGraph[int] = nx.DiGraph()
    made.add_edges_from((node, (node + 1) % num_nodes) for node in range(num_nodes))
    return made


def random_out(degree: int, seed: int) -> Arcs:
    """The cycle, which connects all, and ``degree`` - 1 arcs from each node to others at random; raises ValueError where a node
    has not so many others."""

    def arcs(num_nodes: int) -> nx.DiGraph[int]:
        if degree < 1:
            raise ValueError("random_out:0 has no arcs; use random_out:K with K of 1 or more")
        if degree >= num_nodes:
            raise ValueError(f"random_out:{degree} needs {degree + 1} islands or more, got {num_nodes}; use fewer arcs")
        made = cycle(num_nodes)
        draw = random.Random(f"arcs/{seed}")
        for node in range(num_nodes):
            # Counted past the two that are left out, as a list of the others for each node is a million steps of 1,000.
            first, second = sorted((node, (node + 1) % num_nodes))
            places = draw.sample(range(num_nodes - 2), degree - 1)
            peers = (place + (place >= first) + (place >= second - 1) for place in places)
            made.add_edges_from((node, peer) for peer in peers)
        return made

    return arcs


def of_file(file: Path) -> Arcs:
    """The arcs of a file, as ``from to``; see ``read_edges``."""

    def arcs(num_nodes: int) -> nx.DiGraph[int]:
        made: nx.DiGraph[int] = nx.DiGraph()
        made.add_nodes_from(range(num_nodes))
        made.add_edges_from(read_edges(file, num_nodes))
        return made

    return arcs


def check_strongly_connected(name: str, arcs: nx.DiGraph[int]) -> None:
    """Raises ValueError where some island could never hear of another."""
    parts = sorted((sorted(part) for part in nx.strongly_connected_components(arcs)), key=len)
    if len(parts) > 1:
        raise ValueError(
            f"the directed graph {name} has {len(parts)} parts that do not hear each other both ways, as islands "
            f"{', '.join(map(str, parts[0]))}; add arcs until each island can reach every other"
        )


def split_evenly(arcs: Arcs) -> Topology:
    """All arcs each round, with column-stochastic weights."""
    made = cache(arcs)

    def topology(index: int, node: int, num_nodes: int) -> Round:
        graph = made(num_nodes)
        heard = sorted(graph.predecessors(node))
        return Round(
            1 / (1 + graph.out_degree(node)),
            tuple(sorted(graph.successors(node))),
            tuple((peer, 1 / (1 + graph.out_degree(peer))) for peer in heard),
        )

    return topology

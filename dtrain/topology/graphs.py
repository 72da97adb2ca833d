"""Which W does any graph have? Metropolis-Hastings weights on a graph of networkx: of a named family, or of a file of edges.

W_ij = 1 / (1 + max(deg_i, deg_j)) on each edge and the rest on the diagonal is symmetric and doubly stochastic whatever the
degrees (Xiao, Boyd and Lall 2005)."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path

import networkx as nx

from dtrain.topology import static
from dtrain.topology.row import Round, Topology, symmetric

Graph = Callable[[int], "nx.Graph[int]"]
"""Number of nodes -> an undirected graph of the nodes 0 to n - 1, without loops."""


def of_static(topology: Topology) -> Graph:
    """The edges of a topology that is the same each round."""

    def graph(num_nodes: int) -> nx.Graph[int]:
        made: nx.Graph[int] = nx.Graph()
        made.add_nodes_from(range(num_nodes))
        made.add_edges_from((node, peer) for node in range(num_nodes) for peer in topology(0, node, num_nodes).sends)
        return made

    return graph


def path(num_nodes: int) -> nx.Graph[int]:
    return nx.path_graph(num_nodes)


def rings(parts: int) -> Graph:
    """So many rings that no edge joins, of neighbouring islands and near-equal sizes; raises ValueError for fewer islands."""

    def graph(num_nodes: int) -> nx.Graph[int]:
        if parts < 1:
            raise ValueError("rings:0 is no graph; use rings:C with C of 1 or more")
        if parts > num_nodes:
            raise ValueError(f"rings:{parts} needs {parts} islands or more, got {num_nodes}; use fewer rings")
        made: nx.Graph[int] = nx.Graph()
        made.add_nodes_from(range(num_nodes))
        cuts = [num_nodes * k // parts for k in range(parts + 1)]
        for first, stop in pairwise(cuts):
            ends = [(node, first + (node + 1 - first) % (stop - first)) for node in range(first, stop)]
            made.add_edges_from((a, b) for a, b in ends if a != b)
        return made

    return graph


def random_regular(degree: int, seed: int) -> Graph:
    """Each node has ``degree`` neighbours; raises ValueError where no such graph is connected."""

    def graph(num_nodes: int) -> nx.Graph[int]:
        if not 2 <= degree < num_nodes or degree * num_nodes % 2:
            raise ValueError(
                f"random_regular:{degree} has no connected graph of {num_nodes} islands; use a degree from 2 to "
                f"{num_nodes - 1}, an even one where the islands are odd"
            )
        # networkx pairs stubs at random and begins anew where it gets stuck, without end for dense graphs: those are complements.
        dense = degree > (num_nodes - 1) // 2
        drawn = num_nodes - 1 - degree if dense else degree
        draw = random.Random(f"regular/{seed}")
        while True:  # with three neighbours almost every draw is connected, with two about 1.6 / sqrt(n): 39 % of 16 nodes'
            made = nx.random_regular_graph(drawn, num_nodes, seed=draw.getrandbits(32))
            made = nx.complement(made) if dense else made
            if nx.is_connected(made):
                return made

    return graph


def barabasi_albert(edges: int, seed: int) -> Graph:
    """Scale-free: each node that comes brings so many edges, to those that have many; raises ValueError for too few nodes."""

    def graph(num_nodes: int) -> nx.Graph[int]:
        if edges < 1:
            raise ValueError("barabasi_albert:0 has no edges; use barabasi_albert:M with M of 1 or more")
        if edges >= num_nodes:
            raise ValueError(f"barabasi_albert:{edges} needs {edges + 1} islands or more, got {num_nodes}; use fewer edges")
        return nx.barabasi_albert_graph(num_nodes, edges, seed=seed)

    return graph


def of_file(file: Path) -> Graph:
    """The edges of a file; see ``read_edges``."""

    def graph(num_nodes: int) -> nx.Graph[int]:
        made: nx.Graph[int] = nx.Graph()
        made.add_nodes_from(range(num_nodes))
        made.add_edges_from(read_edges(file, num_nodes))
        return made

    return graph


def read_edges(file: Path, num_nodes: int) -> list[tuple[int, int]]:
    """A line an edge, two island numbers; ``#`` starts a comment. Raises ValueError where the file says anything else."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"the edges of {file} cannot be read: {e}; name a text file with two island numbers a line") from e
    edges = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        ends = [int(word) if word.isdecimal() else -1 for word in words]
        if words and (len(ends) != 2 or ends[0] == ends[1] or not all(0 <= end < num_nodes for end in ends)):
            raise ValueError(
                f"{file}, line {number}: {line.strip()!r} is no edge; write two different islands from 0 to {num_nodes - 1}"
            )
        if words:
            edges.append((ends[0], ends[1]))
    return edges


def check_connected(name: str, graph: nx.Graph[int]) -> None:
    """Raises ValueError where some islands could never hear of others."""
    parts = sorted((sorted(part) for part in nx.connected_components(graph)), key=len)
    if len(parts) > 1:
        raise ValueError(
            f"the graph {name} falls into {len(parts)} parts, and islands {', '.join(map(str, parts[0]))} would never hear of "
            "the others; add an edge between the parts, or rounds with a server (sync.server)"
        )


def metropolis_hastings(graph: Graph) -> Topology:
    """All edges each round, with Metropolis-Hastings weights."""
    rows = cache(lambda num_nodes: _rows(graph(num_nodes)))

    def topology(index: int, node: int, num_nodes: int) -> Round:
        return rows(num_nodes)[node]

    return topology


def _rows(graph: nx.Graph[int]) -> Mapping[int, Round]:
    degrees = dict(graph.degree())
    return {
        node: symmetric({peer: 1 / (1 + max(degrees[node], degrees[peer])) for peer in graph.neighbors(node)}) for node in graph
    }


def digest(graph: nx.Graph[int]) -> int:
    """63 bits of the edges, of a directed graph the arcs."""
    ends = sorted(graph.edges if graph.is_directed() else ((min(edge), max(edge)) for edge in graph.edges))
    return int.from_bytes(hashlib.sha256(repr((len(graph), ends)).encode()).digest()[:8], "big") >> 1


FAMILIES: Mapping[str, Graph] = {
    **{name: of_static(getattr(static, name)) for name in ("complete", "ring", "torus", "hypercube", "star")},
    "path": path,
}
"""Graphs without a parameter."""

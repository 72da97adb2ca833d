"""Which topology does a job file name? ``sync.topology``, and ``sync.graph`` for those that are made of any graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.topology import one_peer, static
from dtrain.topology import server as servers
from dtrain.topology.row import Topology

if TYPE_CHECKING:
    from dtrain.topology.directed import Arcs
    from dtrain.topology.graphs import Graph

# networkx takes a quarter of a second to import, and is needed where a graph is: the functions below import what does.

STATIC = ("complete", "ring", "torus", "hypercube", "star", "graph")
"""W is the same each round, and symmetric: what methods with public copies need."""
CHANGING = ("one_peer_ring", "one_peer_exponential", "random_pairs", "alternating_exp_ring", "coloured", "random_edges")
PAIRS = ("one_peer_ring", "random_pairs", "coloured", "random_edges")
"""Each round is a matching, whose pairs average."""
DIRECTED = ("directed",)
"""W is the same each round, and only its columns sum to one: what push-sum is for."""
NAMES = (*STATIC, *CHANGING, *DIRECTED)
OF_GRAPHS = ("graph", "coloured", "random_edges", "directed")
"""Those that ``sync.graph`` says the edges of."""

GRAPHS = "ring, path, torus, hypercube, star, complete, random_regular:K, barabasi_albert:M, rings:C, or a file of edges"
ARCS = "cycle, random_out:K, or a file of arcs"


@dataclass(frozen=True, slots=True)
class Mixing:
    """A topology with what methods ask of it."""

    rows: Topology
    period: Callable[[int], int]
    """Number of nodes -> rounds after which it repeats."""
    static: bool = False
    doubly_stochastic: bool = True
    heard: Callable[[int, int], int] | None = None
    """Of a topology that is drawn anew each round, and has no period: (node, number of nodes) -> the most peers heard in one."""
    chances: Callable[[int], Mapping[tuple[int, int], float]] | None = None
    """Where pairs are drawn: number of nodes -> how likely two, the smaller first, are to meet in a round."""
    turn: int = 1
    """Rounds of which the last is a server's, and those before it its neighbours'; 1 without a server."""

    @property
    def one_way(self) -> bool:
        """Whether it is one of those that push-sum is for."""
        return self.static and not self.doubly_stochastic

    @property
    def drawn(self) -> bool:
        return self.heard is not None

    def in_degree(self, node: int, num_nodes: int) -> int:
        """The most peers that a node hears in one round."""
        if self.heard is not None:
            return self.heard(node, num_nodes)
        return max(len(self.rows(index, node, num_nodes).recvs) for index in range(self.period(num_nodes)))


def mixing(topology: str, graph: str | None, seed: int, server: str | None = None) -> Mixing:
    """The topology of a name that ``check`` has let pass: the same object each time, unless a file, which may change, says its
    edges."""
    base = (_mixing if graph is not None and is_file(graph) else _kept)(topology, graph, seed)
    return base if server is None else served(base, server, seed)


def served(base: Mixing, name: str, seed: int) -> Mixing:
    """``base`` with the rounds of a server in between."""
    server = servers.read(name)

    def heard(node: int, num_nodes: int) -> int:
        most = server.sample - (server.to == "sampled")
        return max(base.in_degree(node, num_nodes), min(most, num_nodes - 1))

    rows = servers.with_server(base.rows, server, seed)
    stochastic = server.to == "sampled" and base.doubly_stochastic
    return Mixing(rows, _once, doubly_stochastic=stochastic, heard=heard, turn=server.every + 1)


def _mixing(topology: str, graph: str | None, seed: int) -> Mixing:
    name, ranks = parameter(topology)
    if name in OF_GRAPHS:
        return _of_graph(name, graph, seed)
    if name in STATIC:
        rows: Topology = getattr(static, name)
        return Mixing(rows, _once, static=True)
    if name == "random_pairs":
        return Mixing(one_peer.random_pairs(seed), _once, heard=_one_peer, chances=one_peer.pair_chances)
    changing: dict[str, tuple[Topology, Callable[[int], int]]] = {
        "one_peer_ring": (one_peer.one_peer_ring, lambda n: 2 if n % 2 == 0 else n),
        "one_peer_exponential": (one_peer.one_peer_exponential, _log2),
        "alternating_exp_ring": (one_peer.alternating_exp_ring(ranks), lambda n: 2 * _log2(n // ranks)),
    }
    rows, period = changing[name]
    return Mixing(rows, period)


@lru_cache(maxsize=32)
def _kept(topology: str, graph: str | None, seed: int) -> Mixing:
    """What was made of it, a graph or its eigenvalues, is not made again for each recipe that is looked at."""
    return _mixing(topology, graph, seed)


def _of_graph(name: str, graph: str | None, seed: int) -> Mixing:
    from dtrain.topology import coloured, directed, graphs

    if name == "directed":
        return Mixing(directed.split_evenly(_arcs(graph, seed)), _once, static=True, doubly_stochastic=False)
    if name == "graph":
        return Mixing(graphs.metropolis_hastings(_graph(graph, seed)), _once, static=True)
    if name == "random_edges":
        from dtrain.topology import random_edges

        ofs = _graph(graph, seed)
        return Mixing(random_edges.first_of_both(ofs, seed), _once, heard=_one_peer, chances=random_edges.chances(ofs))
    matchings = coloured.matchings(_graph(graph, seed))
    return Mixing(coloured.in_turns(matchings), lambda n: max(1, len(matchings(n))))


def fingerprint(topology: str, graph: str | None, num_nodes: int, seed: int) -> int:
    """A number of the edges where ``sync.graph`` says them, the same on every host, else 0."""
    if graph is None:
        return 0
    from dtrain.topology.graphs import digest

    return digest((_arcs if topology in DIRECTED else _graph)(graph, seed)(num_nodes))


def check(topology: str, graph: str | None, num_nodes: int, seed: int = 0, server: str | None = None) -> None:
    """Raises ValueError where there is no such topology, or none for so many islands; a graph that falls apart needs a server."""
    name, ranks = parameter(topology)
    if server is not None and servers.parse(server).sample > num_nodes:
        raise ValueError(f'sync.server = "{server}" draws {servers.parse(server).sample} of {num_nodes} islands; draw fewer')
    if (graph is None) == (name in OF_GRAPHS):
        raise ValueError(
            f'sync.topology = "{topology}" is made of the edges of a graph; name it in sync.graph: '
            f"{ARCS if name in DIRECTED else GRAPHS}"
            if graph is None
            else f'sync.graph = "{graph}" has no effect with sync.topology = "{topology}"; use topology = "graph", all its edges '
            'each round, or "coloured", one edge an island a round'
        )
    if num_nodes < 2 and name != "complete":
        said = f'sync.topology = "{topology}" needs at least 2 islands, got {num_nodes}'
        raise ValueError(f'{said}; use more, or sync.recipe = "local"')
    if name == "hypercube" or graph == "hypercube":
        _need_power_of_two("hypercube", num_nodes)
    if name == "alternating_exp_ring":
        if num_nodes % ranks or not _is_power_of_two(num_nodes // ranks):
            raise ValueError(
                f'sync.topology = "{topology}" pairs hosts of {ranks} islands, and needs 1, 2, 4, 8 ... hosts, not {num_nodes} '
                f"islands; use {ranks} x 1, 2, 4, 8 ..."
            )
    elif name == "directed":
        from dtrain.topology import directed

        directed.check_strongly_connected(str(graph), _arcs(graph, seed)(num_nodes))
    elif name in OF_GRAPHS:
        from dtrain.topology import graphs

        made = _graph(graph, seed)(num_nodes)
        if server is None:
            graphs.check_connected(str(graph), made)


def parameter(topology: str) -> tuple[str, int]:
    """``alternating_exp_ring:4`` -> (alternating_exp_ring, 4), 1 where there is none; raises ValueError for any other name."""
    name, colon, text = topology.partition(":")
    if name not in NAMES or (colon and (name != "alternating_exp_ring" or not text.isdecimal() or int(text) < 1)):
        raise ValueError(
            f"topology = {topology!r} is not known; use one of {', '.join(NAMES)}; alternating_exp_ring:L has L islands a host"
        )
    return name, int(text) if colon else 1


def _graph(graph: str | None, seed: int) -> Graph:
    from dtrain.topology import graphs

    assert graph is not None
    name, _, text = graph.partition(":")
    if graph in graphs.FAMILIES:
        return graphs.FAMILIES[graph]
    if name == "rings" and text.isdecimal():
        return graphs.rings(int(text))
    if name in ("random_regular", "barabasi_albert") and text.isdecimal():
        return {"random_regular": graphs.random_regular, "barabasi_albert": graphs.barabasi_albert}[name](int(text), seed)
    if is_file(graph):
        return graphs.of_file(Path(graph))
    raise ValueError(f"sync.graph = {graph!r} is no graph; use {GRAPHS}, with a / or a . in its name")


def _arcs(graph: str | None, seed: int) -> Arcs:
    from dtrain.topology import directed

    assert graph is not None
    name, _, text = graph.partition(":")
    if graph == "cycle":
        return directed.cycle
    if name == "random_out" and text.isdecimal():
        return directed.random_out(int(text), seed)
    if is_file(graph):
        return directed.of_file(Path(graph))
    raise ValueError(f"sync.graph = {graph!r} is no directed graph; use {ARCS}, with a / or a . in its name")


def is_file(graph: str) -> bool:
    """Whether ``sync.graph`` names a file, and no family."""
    return "/" in graph or "." in graph


def _need_power_of_two(name: str, num_nodes: int) -> None:
    if not _is_power_of_two(num_nodes):
        below, above = 1 << int(math.log2(num_nodes)), 1 << num_nodes.bit_length()
        raise ValueError(f"a {name} has 2, 4, 8 ... islands, got {num_nodes}; use {below} or {above}, or another topology")


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _once(_: int) -> int:
    return 1


def _one_peer(_: int, num_nodes: int) -> int:
    return min(1, num_nodes - 1)


def _log2(n: int) -> int:
    """Hops of a doubling walk around n nodes."""
    return max(1, (n - 1).bit_length())

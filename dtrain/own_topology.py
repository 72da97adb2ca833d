"""How does a researcher's own topology get in? As a function in a file of theirs: ``sync.topology = "mine.py:rows"``.

    def rows(index: int, node: int, num_nodes: int) -> dtrain.topology.Round

is that node's row of round ``index``'s matrix W: pure, the same on every island and whenever it is asked. W is doubly stochastic,
and who is sent to hears. That is checked of all islands for the first LOOK rounds, before anything starts, and at each round of
every island's own row and column, which together are the whole of W."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import cast

from dtrain import topology as topologies
from dtrain.own import load_named
from dtrain.own_name import is_own
from dtrain.topology import Mixing, Round, Topology

LOOK = 64
"""Rounds. Within them each island must hear, if only by others, of all; and no later round may need more room than they do."""
_OFF = 1e-9
"""By which weights may miss 1 in sum: float64 rounds 1024 of them to 1e-13, and somebody's 0.333 are no third."""


def mixing_of(topology: str, graph: str | None, seed: int, server: str | None) -> Mixing:
    """The topology of a name that ``check_topology`` has let pass."""
    if not is_own(topology):
        return topologies.mixing(topology, graph, seed, server)
    rows = _rows(topology)

    @lru_cache(maxsize=64)
    def heard(node: int, num_nodes: int) -> int:
        return max(len(rows(index, node, num_nodes).recvs) for index in range(LOOK))

    @lru_cache(maxsize=8)
    def checked(index: int, node: int, num_nodes: int) -> Round:
        row = _checked(topology, [rows(index, other, num_nodes) for other in range(num_nodes)], index, [node])[node]
        if len(row.recvs) > heard(node, num_nodes):
            raise ValueError(
                f"{_where(topology, index)} lets island {node} hear {len(row.recvs)} others, and none of the first {LOOK} rounds "
                f"more than {heard(node, num_nodes)}; let one of those be as large"
            )
        return row

    base = Mixing(checked, lambda _: 1, heard=heard)
    return base if server is None else topologies.served(base, server, seed)


def check_topology(topology: str, graph: str | None, num_nodes: int, seed: int = 0, server: str | None = None) -> None:
    """Raises ValueError where there is no such topology, none for so many islands, or one's own is none."""
    if not is_own(topology):
        topologies.check(topology, graph, num_nodes, seed, server)
        return
    if graph is not None:
        raise ValueError(f'sync.graph = "{graph}" has no effect with sync.topology = "{topology}" of your own; leave it out')
    if server is not None:
        topologies.check("complete", None, num_nodes, server=server)
    rows = _rows(topology)
    reached = {node: {node} for node in range(num_nodes)}
    for index in range(LOOK):
        each = [rows(index, node, num_nodes) for node in range(num_nodes)]
        if each != [rows(index, node, num_nodes) for node in range(num_nodes)]:
            raise ValueError(f"{_where(topology, index)} is another when it is asked again; draw by random.Random(index)")
        for node, row in enumerate(_checked(topology, each, index, range(num_nodes))):
            for peer, _ in row.recvs:
                joined = reached[node] | reached[peer]
                for other in joined:
                    reached[other] = joined
    apart = sorted(set(range(num_nodes)) - reached[0])
    if apart and server is None:
        raise ValueError(
            f"sync.topology = {topology!r}: in its first {LOOK} rounds islands {', '.join(map(str, apart))} never hear of "
            "island 0; add edges, or rounds with a server (sync.server)"
        )


def _rows(name: str) -> Topology:
    path, word, found = load_named(name, "topology")
    if not callable(found) or isinstance(found, type):
        raise ValueError(
            f"sync.topology = {name!r}: {path.name} has no function {word}; define def {word}(index, node, num_nodes) there, "
            "that returns a dtrain.topology.Round"
        )
    return cast(Topology, found)


def _where(name: str, index: int) -> str:
    return f"sync.topology = {name!r}: round {index}"


def _checked(name: str, each: Sequence[Round], index: int, nodes: Sequence[int]) -> Sequence[Round]:
    """All rows of a round, where those of ``nodes`` and their columns are what they must be."""
    where = _where(name, index)
    for node, row in enumerate(each):
        if not isinstance(row, Round):
            raise ValueError(f"{where} gives island {node} {row!r}; return a dtrain.topology.Round")
    for node in nodes:
        _check_peers(where, each, node)
    for node in nodes:
        _check_pairs(where, each, node)
    for node in nodes:
        _check_sums(where, each, node)
    return each


def _heard(row: Round) -> list[int]:
    return [peer for peer, _ in row.recvs]


def _check_peers(where: str, each: Sequence[Round], node: int) -> None:
    for word, peers in (("sends to", list(each[node].sends)), ("hears", _heard(each[node]))):
        others = all(isinstance(p, int) and 0 <= p < len(each) and p != node for p in peers)
        if len(set(peers)) < len(peers) or not others:
            raise ValueError(f"{where}: island {node} {word} {peers}; name others, from 0 to {len(each) - 1}, once each")


def _check_pairs(where: str, each: Sequence[Round], node: int) -> None:
    for peer in each[node].sends:
        if node not in _heard(each[peer]):
            raise ValueError(f"{where}: island {node} sends to island {peer}, which does not hear it; add it to recvs there")
    for peer in _heard(each[node]):
        if node not in each[peer].sends:
            raise ValueError(f"{where}: island {node} waits for island {peer}, which sends nothing; add it to sends there")


def _check_sums(where: str, each: Sequence[Round], node: int) -> None:
    row = each[node]
    weights = [row.self_weight, *(weight for _, weight in row.recvs)]
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ValueError(f"{where}: island {node} has weights {weights}; use numbers of 0 or more")
    given = [row.self_weight, *(weight for peer in row.sends for other, weight in each[peer].recvs if other == node)]
    for word, values in (("row", weights), ("column", given)):
        if abs(math.fsum(values) - 1) > _OFF:
            raise ValueError(
                f"{where}: the {word} of island {node} sums to {math.fsum(values):.12g}, and rows and columns of a mixing "
                "matrix sum to 1; else the islands would lose their mean"
            )

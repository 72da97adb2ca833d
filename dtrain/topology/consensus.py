"""How quickly does a topology bring the islands together? Its matrices, in float64.

After t rounds disagreement has shrunk, from whatever start, to ||W_t ... W_1 - J|| of what it was, J = 11'/n (for push-sum: its
ratios follow the same product, scaled by positive weights). A static symmetric W shrinks it by lambda2 a round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dtrain.topology.names import Mixing

if TYPE_CHECKING:
    import networkx as nx

Matrix = npt.NDArray[np.float64]

TARGET = 1e-3
_LOOK_AT = 8_000
"""Rounds x nodes up to which the round is found, not only the period in which it lies."""
DRAWN = 4096
"""Rounds after which a topology that is drawn anew each time is given up."""
_LOOK_EVERY = 16
"""Rounds of it between two looks, as each takes a singular value decomposition: 64 nodes' in 1 ms, 1,024 nodes' in 400."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """What ``dtrain topology`` prints. ``lambda2`` is a round's factor: of W where it stays, else the root of a period's."""

    lambda2: float
    rounds: int | None
    """Until disagreement is TARGET of what it was, whatever it was; None where it never is, and beyond DRAWN of drawn rounds."""
    mean_sends: float
    most_sends: int
    """Wires that an island sends in a round."""
    weights: tuple[float, float]
    """The smallest and the largest of push-sum's w once it has settled, n times P's own vector; 1 and 1 where W is doubly
    stochastic. An optimizer's step is divided by w."""
    articulation: tuple[int, ...]
    """Islands without which the others would fall apart."""


def matrix(mixing: Mixing, index: int, num_nodes: int) -> Matrix:
    """W of round ``index``, shape (num_nodes, num_nodes)."""
    w = np.zeros((num_nodes, num_nodes))
    for node in range(num_nodes):
        row = mixing.rows(index, node, num_nodes)
        w[node, node] = row.self_weight
        for peer, weight in row.recvs:
            w[node, peer] = weight
    return w


def spectrum(mixing: Mixing, num_nodes: int) -> tuple[float, float]:
    """The least and the largest eigenvalue, but for the 1 of the mean, of a W that stays the same and is symmetric."""
    if num_nodes == 1:
        return 0.0, 0.0
    values = eigenvalues(mixing, num_nodes)
    return float(values[0]), float(values[-2])


@lru_cache(maxsize=32)
def eigenvalues(mixing: Mixing, num_nodes: int) -> Matrix:
    """All of a W that stays the same and is symmetric, shape (num_nodes,), rising. Kept: 1,000 islands' take 90 ms, and a planner
    asks a dozen times."""
    values = np.asarray(np.linalg.eigvalsh(matrix(mixing, 0, num_nodes)), np.float64)
    values.setflags(write=False)
    return values


def consensus(mixing: Mixing, num_nodes: int) -> Consensus:
    """Where rounds are drawn, lambda2 is the mean factor of a round on the way to TARGET."""
    rounds, lambda2 = _drawn(mixing, num_nodes) if mixing.drawn else _periodic(mixing, num_nodes)
    sends = [len(mixing.rows(i, node, num_nodes).sends) for i in _rounds(mixing, num_nodes) for node in range(num_nodes)]
    articulation = _articulation(edges(mixing, num_nodes))
    return Consensus(lambda2, rounds, sum(sends) / len(sends), max(sends), _weights(mixing, num_nodes), articulation)


def _articulation(graph: nx.DiGraph[int]) -> tuple[int, ...]:
    import networkx as nx

    return tuple(sorted(nx.articulation_points(graph.to_undirected())))


def _weights(mixing: Mixing, num_nodes: int) -> tuple[float, float]:
    if not mixing.one_way:
        return 1.0, 1.0
    values, vectors = np.linalg.eig(matrix(mixing, 0, num_nodes))
    own = np.abs(vectors[:, np.argmax(np.real(values))])
    own *= num_nodes / own.sum()
    return float(own.min()), float(own.max())


def _rounds(mixing: Mixing, num_nodes: int) -> range:
    """Those of a period; of drawn ones enough for a mean, whole turns where a server has rounds."""
    return range(mixing.turn * -(-_enough(num_nodes) // mixing.turn) if mixing.drawn else mixing.period(num_nodes))


def _enough(num_nodes: int) -> int:
    return 8 * num_nodes.bit_length()


def _distance(product: Matrix, mixing: Mixing) -> float:
    """From J; where only columns or rows sum to one, from the matrix of rank one that it goes to, by the spread of its rows."""
    if mixing.doubly_stochastic:
        return float(np.linalg.norm(product - 1 / len(product), 2))
    scaled = product / product.sum(axis=1, keepdims=True)
    return float(np.abs(scaled - scaled.mean(axis=0)).sum(axis=1).max())


def _periodic(mixing: Mixing, num_nodes: int) -> tuple[int | None, float]:
    if mixing.static and mixing.doubly_stochastic:
        return _symmetric(matrix(mixing, 0, num_nodes))
    period = mixing.period(num_nodes)
    whole = np.eye(num_nodes)
    for index in range(period):
        whole = matrix(mixing, index, num_nodes) @ whole
    values = np.sort(np.abs(np.linalg.eigvals(whole)))[::-1]
    lambda2 = float(values[1]) ** (1 / period) if values[1] > 1e-12 else 0.0
    by_periods = _by_squaring(whole, period, mixing)
    if by_periods is None or by_periods * num_nodes > _LOOK_AT:
        return by_periods, lambda2
    product = np.eye(num_nodes)
    for index in range(by_periods):
        product = matrix(mixing, index, num_nodes) @ product
        if _distance(product, mixing) <= TARGET:
            return index + 1, lambda2
    return by_periods, lambda2


def _symmetric(w: Matrix) -> tuple[int | None, float]:
    """||W^t - J|| is lambda2^t."""
    values = np.sort(np.abs(np.linalg.eigvalsh(w)))[::-1]
    lambda2 = float(values[1]) if len(values) > 1 and values[1] > 1e-12 else 0.0
    if lambda2 >= 1 - 1e-12:
        return None, lambda2
    return (max(1, math.ceil(math.log(TARGET) / math.log(lambda2))) if lambda2 else 1), lambda2


def _by_squaring(whole: Matrix, period: int, mixing: Mixing) -> int | None:
    """The fewest whole periods, in rounds: powers of two of them until it is too many, then bit by bit."""
    powers = [whole]
    while _distance(powers[-1], mixing) > TARGET:
        if len(powers) > 60:
            return None
        powers.append(powers[-1] @ powers[-1])
    done, product = 0, np.eye(len(whole))
    for bit in range(len(powers) - 2, -1, -1):
        more = powers[bit] @ product
        if _distance(more, mixing) > TARGET:
            done, product = done + (1 << bit), more
    return (done + 1) * period


def _drawn(mixing: Mixing, num_nodes: int) -> tuple[int | None, float]:
    product = np.eye(num_nodes)
    for start in range(0, DRAWN, _LOOK_EVERY):
        before = product
        each = [matrix(mixing, index, num_nodes) for index in range(start, start + _LOOK_EVERY)]
        for w in each:
            product = w @ product
        if _distance(product, mixing) > TARGET:
            continue
        for index, w in enumerate(each, start + 1):  # no round adds to the distance, so the first is one of these
            before = w @ before
            if (distance := _distance(before, mixing)) <= TARGET:
                return index, distance ** (1 / index)
    return None, _distance(product, mixing) ** (1 / DRAWN)


def edges(mixing: Mixing, num_nodes: int) -> nx.DiGraph[int]:
    """Everyone whom each node sends to, in any round of a period, or in any that may be drawn."""
    import networkx as nx  # which nothing else here needs, and methods use this file

    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(num_nodes))
    if mixing.chances is not None:
        graph.add_edges_from(arc for a, b in mixing.chances(num_nodes) for arc in ((a, b), (b, a)))
        return graph
    # A server's rounds may be one in many, and each has other islands: as many of them as of drawn rounds.
    of_server = range(mixing.turn - 1, mixing.turn * _enough(num_nodes), mixing.turn) if mixing.turn > 1 else ()
    for index in {*_rounds(mixing, num_nodes), *of_server}:
        for node in range(num_nodes):
            graph.add_edges_from((node, peer) for peer in mixing.rows(index, node, num_nodes).sends)
    return graph

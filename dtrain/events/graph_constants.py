"""How well do a graph's meetings mix? Two numbers of the Laplacian of its rates.

Lambda = sum_ij lambda_ij (e_i - e_j)(e_i - e_j)', with lambda_ij meetings of i and j a unit of time. chi1 = 1 / lambda2(Lambda)
says how slowly plain gossip mixes; chi2 = max over edges of 1/2 (e_i - e_j)' Lambda^+ (e_i - e_j) is half of the largest
resistance between two that meet. Always chi2 <= chi1; where it is much smaller momentum helps, and sqrt(chi1 chi2) takes the
place of chi1."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dtrain.events.algorithm import Array, Ints
from dtrain.topology import Mixing
from dtrain.topology.consensus import edges, matrix


class Chi(NamedTuple):
    chi1: float
    chi2: float


def laplacian(edge_list: Ints, rates: Array, num_nodes: int) -> Array:
    """(n, n) of edges (m, 2) and their rates (m,)."""
    out = np.zeros((num_nodes, num_nodes))
    a, b = edge_list.T
    np.add.at(out, (a, b), -rates)
    np.add.at(out, (b, a), -rates)
    out[np.diag_indices(num_nodes)] = -out.sum(axis=1)
    return out


def chi(edge_list: Ints, rates: Array, num_nodes: int) -> Chi:
    """Raises ValueError where some nodes never hear of others."""
    of_rates = laplacian(edge_list, rates, num_nodes)
    lambda2 = float(np.linalg.eigvalsh(of_rates)[1])
    if lambda2 <= 1e-12 * float(np.trace(of_rates)):
        raise ValueError("some nodes would never hear of the others: the meetings must connect all of them")
    # Lambda and 11'/n have orthogonal ranges, so this inverse is Lambda^+ + 11'/n, and the last term cancels in differences.
    inverse = np.linalg.inv(of_rates + 1 / num_nodes)
    a, b = edge_list.T
    resistance = inverse[a, a] + inverse[b, b] - 2 * inverse[a, b]
    return Chi(1 / lambda2, float(resistance.max()) / 2)


def edge_list(mixing: Mixing, num_nodes: int) -> Ints:
    """Everyone who talks to whom in any round of a period, a row an edge."""
    graph = edges(mixing, num_nodes).to_undirected()
    return np.array(sorted((min(edge), max(edge)) for edge in graph.edges), dtype=np.int64).reshape(-1, 2)


def uniform(edge_list: Ints, num_nodes: int, meetings_per_node: float) -> Array:
    """The same rate on every edge; a node has so many meetings a unit of time, on average over all."""
    return np.full(len(edge_list), meetings_per_node * num_nodes / (2 * len(edge_list)))


def rates_of_rounds(mixing: Mixing, num_nodes: int, every: int) -> tuple[Ints, Array]:
    """Edges and rates a step of rounds in which pairs average, one in every so many steps."""
    if mixing.chances is not None:
        chances = mixing.chances(num_nodes)
        return np.array(list(chances), dtype=np.int64).reshape(-1, 2), np.array(list(chances.values())) / every
    period = mixing.period(num_nodes)  # of one's own topology, as many rounds as were looked at
    met = np.mean([matrix(mixing, index, num_nodes) for index in range(period)], axis=0)
    pairs = np.argwhere(np.triu(met, 1) > 0)
    return pairs, 2 * met[pairs[:, 0], pairs[:, 1]] / every

"""Which topologies have the same W each round? Those that methods with public copies (CHOCO, BEER) need.

lambda2 is the second largest magnitude of W's eigenvalues: a round leaves at most that part of the islands' disagreement."""

from __future__ import annotations

from collections.abc import Iterable

from dtrain.topology.row import Round, symmetric


def complete(index: int, node: int, num_nodes: int) -> Round:
    """Everyone hears everyone with weight 1/n; one round is the exact mean: lambda2 = 0."""
    others = tuple(peer for peer in range(num_nodes) if peer != node)
    return Round(1 / num_nodes, others, tuple((peer, 1 / num_nodes) for peer in others))


def ring(index: int, node: int, num_nodes: int) -> Round:
    """Both neighbours and oneself with weight 1/3; two nodes share one edge with weight 1/2. From four nodes on
    lambda2 = (1 + 2 cos(2 pi / n)) / 3."""
    return _even(node, ((node - 1) % num_nodes, (node + 1) % num_nodes))


def torus(index: int, node: int, num_nodes: int) -> Round:
    """The four neighbours on a grid of ``sides`` that closes in both directions, weight 1/5 each. For sides of three and more, b
    the longer, lambda2 = (3 + 2 cos(2 pi / b)) / 5."""
    rows, columns = sides(num_nodes)
    row, column = divmod(node, columns)
    vertical = (((row + step) % rows) * columns + column for step in (-1, 1))
    horizontal = (row * columns + (column + step) % columns for step in (-1, 1))
    return _even(node, (*vertical, *horizontal))


def hypercube(index: int, node: int, num_nodes: int) -> Round:
    """n = 2^k: the k nodes whose numbers differ in one bit, weight 1 / (k + 1): lambda2 = (k - 1) / (k + 1)."""
    return _even(node, (node ^ (1 << bit) for bit in range((num_nodes - 1).bit_length())))


def star(index: int, node: int, num_nodes: int) -> Round:
    """Node 0 hears all others with weight 1/n, and they hear it: lambda2 = 1 - 1/n from three on."""
    return symmetric(dict.fromkeys(range(1, num_nodes) if node == 0 else (0,), 1 / num_nodes))


def sides(num_nodes: int) -> tuple[int, int]:
    """The two sides of the torus, the shorter first: the most square ones. A prime n has 1 for one of them, and is a ring."""
    short = next(a for a in range(int(num_nodes**0.5), 0, -1) if num_nodes % a == 0)
    return short, num_nodes // short


def _even(node: int, peers: Iterable[int]) -> Round:
    """The same weight for oneself and each neighbour: doubly stochastic where every node has as many."""
    others = sorted(set(peers) - {node})
    weight = 1 / (len(others) + 1)
    return Round(weight, tuple(others), tuple((peer, weight) for peer in others))

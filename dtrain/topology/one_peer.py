"""Which topologies talk to one peer a round? Their W changes by round, and an island's uplink carries one wire at a time."""

from __future__ import annotations

import random
from functools import lru_cache

from dtrain.topology.row import ALONE, Round, Topology, pair


def one_peer_ring(index: int, node: int, num_nodes: int) -> Round:
    """Even rounds pair (0, 1), (2, 3) ..., odd ones (1, 2), (3, 4) ... around the ring. With odd n the node that sits out moves
    on by one each round, which alternates the pairs just so."""
    if num_nodes == 2:
        return pair(1 - node)
    first = index % (2 if num_nodes % 2 == 0 else num_nodes)
    if num_nodes % 2:
        place = (node - first) % num_nodes  # 0 sits out; (1, 2), (3, 4) ... are pairs
        if place == 0:
            return ALONE
        return pair((node + (1 if place % 2 else -1)) % num_nodes)
    return pair((node + (1 if (node - first) % 2 == 0 else -1)) % num_nodes)


def one_peer_exponential(index: int, node: int, num_nodes: int) -> Round:
    """Round r: send to node + 2^(r mod ceil(log2 n)), hear from node - 2^r, weight 1/2 each.

    For n = 2^k the product of k rounds is the exact mean (Ying et al. 2021, arXiv 2110.13363)."""
    if num_nodes == 1:
        return ALONE
    hop = 2 ** (index % (num_nodes - 1).bit_length())
    return Round(0.5, ((node + hop) % num_nodes,), (((node - hop) % num_nodes, 0.5),))


def random_pairs(seed: int) -> Topology:
    """A fresh random matching each round, agreed by the seed; with odd n one node sits out."""

    @lru_cache(maxsize=8)
    def peers(index: int, num_nodes: int) -> dict[int, int]:
        order = list(range(num_nodes))
        random.Random(f"pairs/{seed}/{index}").shuffle(order)
        return {a: b for one, two in zip(order[::2], order[1::2], strict=False) for a, b in ((one, two), (two, one))}

    def topology(index: int, node: int, num_nodes: int) -> Round:
        peer = peers(index, num_nodes).get(node)
        return ALONE if peer is None else pair(peer)

    return topology


def pair_chances(num_nodes: int) -> dict[tuple[int, int], float]:
    """Of ``random_pairs``: every two are as likely to meet in a round."""
    each = 1 / (num_nodes - 1 + num_nodes % 2)
    return {(a, b): each for a in range(num_nodes) for b in range(a + 1, num_nodes)}


def alternating_exp_ring(ranks: int) -> Topology:
    """Nodes that share a host talk over its fast network, and hosts over the slow one in turns (arXiv 2410.11998, code).

    ``ranks`` neighbours a host, N = n / ranks hosts, a power of two. Each of log2 N hops takes two rounds. In one a pair of hosts
    (j, j + 2^r) takes the mean of its 2 ranks members (weight 1 / (2 ranks)), in the other each host takes the mean of its own
    (weight 1 / ranks). Every second pair goes inside first, so that only half of them use the slow network at any time.
    After 2 log2 N rounds all nodes hold the exact mean."""

    def topology(index: int, node: int, num_nodes: int) -> Round:
        hosts = num_nodes // ranks
        host = node // ranks
        hops = max(1, (hosts - 1).bit_length())
        slot = index % (2 * hops)
        hop = slot // 2
        partner = host ^ (1 << hop)
        number = (host >> (hop + 1) << hop) | (host & ((1 << hop) - 1))
        inside = hosts == 1 or (slot % 2 == 0) == (number % 2 == 0)
        group = (host,) if inside else (host, partner)
        members = [h * ranks + i for h in sorted(group) for i in range(ranks)]
        peers = tuple(m for m in members if m != node)
        return Round(1 / len(members), peers, tuple((peer, 1 / len(members)) for peer in peers))

    return topology

"""What does a server add to neighbours that may not all reach each other? After every H of their rounds, one with a drawn few.

Semi-decentralized rounds (arXiv 2511.11560): K of the n islands, S, are drawn by the seed, and W of that round is
    sampled (S2S):  W_ij = 1 / K for i and j in S; the others keep what they have. Doubly stochastic: the mean of all stays. In
                    expectation (n - K) / (n - 1) of the squared disagreement is left.
    all (S2A):      W_ij = 1 / K for j in S and every i. Rows only: no disagreement is left, and the mean of all moves, in
                    expectation by (n - K) / (K (n - 1)) of the mean squared disagreement.
No process is the server: those in S send to each other, and under "all" to everyone. So the neighbours' graph may fall apart, as
into islands that a near network joins."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from dtrain.topology.row import ALONE, Round, Topology


class Server(NamedTuple):
    to: str
    """Who gets the mean: "sampled" or "all"."""
    sample: int
    """K."""
    every: int
    """H."""


def of_every_round(sample: int) -> str:
    """A server for all islands that has no rounds of neighbours between its own: ``read`` knows it, and ``parse`` does not."""
    return f"all:{sample}:0"


def read(text: str) -> Server:
    """Of a name that ``parse`` has let pass, or that ``of_every_round`` gave."""
    to, sample, every = text.split(":")
    return Server(to, int(sample), int(every))


def parse(text: str) -> Server:
    """``"sampled:K:H"``, ``"all:K:H"``; raises ValueError for anything else."""
    to, *numbers = text.split(":")
    sizes = [int(number) if number.isdecimal() else 0 for number in numbers]
    if to not in ("sampled", "all") or len(sizes) != 2 or min(sizes) < 1 or (to == "sampled" and sizes[0] < 2):
        raise ValueError(
            f"server = {text!r} is not known; use \"sampled:K:H\" (K of 2 or more) or \"all:K:H\": after every H rounds K "
            "islands that are drawn take their mean, for themselves or for all"
        )
    return Server(to, *sizes)


def row(server: Server, sampled: Sequence[int], node: int, num_nodes: int) -> Round:
    """Of a round with a server that drew ``sampled``, in order."""
    inside = node in sampled
    if not inside and server.to == "sampled":
        return ALONE
    share = 1 / len(sampled)
    heard = tuple((peer, share) for peer in sampled if peer != node)
    told = sampled if server.to == "sampled" else range(num_nodes)
    sends = tuple(peer for peer in told if peer != node) if inside else ()
    return Round(share if inside else 0.0, sends, heard)


def with_server(base: Topology, server: Server, seed: int) -> Topology:
    """H rounds of ``base``, as if there were no others, then one with the server."""

    @lru_cache(maxsize=8)
    def drawn(turn: int, num_nodes: int) -> tuple[int, ...]:
        return tuple(sorted(random.Random(f"server/{seed}/{turn}").sample(range(num_nodes), server.sample)))

    def topology(index: int, node: int, num_nodes: int) -> Round:
        turn, place = divmod(index, server.every + 1)
        if place < server.every:
            return base(turn * server.every + place, node, num_nodes)
        return row(server, drawn(turn, num_nodes), node, num_nodes)

    return topology

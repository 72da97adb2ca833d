"""What is a topology in rows and lines? How quickly it brings islands together, what that costs them, and its picture."""

from __future__ import annotations

from dtrain.topology import Mixing
from dtrain.topology.consensus import DRAWN, TARGET, consensus
from dtrain.topology.names import ARCS, CHANGING, DIRECTED, GRAPHS, OF_GRAPHS, STATIC

MOST_ISLANDS = 1024
"""The eigenvalues of matrices of so many rows take about 20 s on a core."""
_MOST_SHOWN = 16
"""Rounds, and islands, that are written out."""


def listed() -> list[list[str]]:
    """(name, what it is) of every topology."""
    kinds = (
        (STATIC, "the same each round; what choco needs"),
        (CHANGING, "changes by round"),
        (DIRECTED, "the same each round, one way; what push_sum needs"),
    )
    ranks = {"alternating_exp_ring": "alternating_exp_ring:L"}
    rows = [[ranks.get(name, name), text] for names, text in kinds for name in names]
    graphs = {name: ARCS if name in DIRECTED else GRAPHS for name in OF_GRAPHS}
    return [[name, f"{text}; --graph is {graphs[name]}" if name in graphs else text] for name, text in rows]


def rows(mixing: Mixing, num_islands: int, *, wire_bytes: int, wire: str) -> list[list[str]]:
    """(what, number, what it means)."""
    found = consensus(mixing, num_islands)
    factor = "mean factor of a round" if mixing.drawn else "the part of the disagreement that a round leaves, at worst"
    beyond = f"more than {DRAWN:,}" if mixing.drawn else "never"
    rounds = beyond if found.rounds is None else str(found.rounds)
    cut = ", ".join(map(str, found.articulation)) or "none"
    low, high = found.weights
    one_way = f"push-sum's; an island's steps count up to {1 / low:.3g} times as much where it is small"
    weights = [] if not mixing.one_way else [["weights", f"{low:.3g} to {high:.3g}", one_way]]
    return [
        ["lambda2", f"{found.lambda2:.4f}", factor],
        ["spectral gap", f"{1 - found.lambda2:.4f}", "1 - lambda2"],
        ["rounds", rounds, f"until the disagreement is {TARGET:g} of what it was, wherever it began"],
        ["wires a round", f"{found.mean_sends:g}", f"that an island sends; at most {found.most_sends}"],
        ["bytes a round", f"{round(found.mean_sends * wire_bytes):,}", f"that an island sends of {wire}"],
        *weights,
        ["articulation points", cut, "islands without which the others fall apart"],
    ]


def drawing(mixing: Mixing, num_islands: int) -> list[str]:
    """Who sends to whom: a line a round of pairs, or a line an island where that is the same each round."""
    if mixing.static:
        shown = range(min(num_islands, _MOST_SHOWN))
        lines = [f"{node}: {' '.join(map(str, mixing.rows(0, node, num_islands).sends))}" for node in shown]
        return [*lines, *(["..."] if num_islands > _MOST_SHOWN else [])]
    period = _MOST_SHOWN if mixing.drawn else mixing.period(num_islands)
    lines = []
    for index in range(min(period, _MOST_SHOWN)):
        sent = [(node, peer) for node in range(num_islands) for peer in mixing.rows(index, node, num_islands).sends]
        both = {(a, b) for a, b in sent if (b, a) in sent}
        texts = [f"{a}-{b}" for a, b in sent if (a, b) in both and a < b] + [f"{a}>{b}" for a, b in sent if (a, b) not in both]
        more = " ..." if len(texts) > _MOST_SHOWN else ""
        lines.append(f"round {index}: {'  '.join(texts[:_MOST_SHOWN])}{more}")
    return [*lines, "..." if mixing.drawn or period > _MOST_SHOWN else "and again from round 0"]

"""Who meets whom next, where pairs meet as soon as both are ready? A pure rule over one desk that all islands know.

An island that is ready asks. It is paired at once with a ready neighbour where both accept each other: of these the one that it
met least recently, and of equals the one that has waited longest. At first an island is patient: it accepts the older half of its
neighbours alone, by when it last met them. Islands that compute equally fast would else meet the same one for ever, and a graph
would fall apart into pairs. After one more step it accepts any. Who ended meets nobody, and who has no other neighbours meets
nobody again. No island starves: who is not chosen grows older for each of its neighbours, until it is the one that they accept.

The desk follows from the islands' words, which all hear in one order (``words.py``): each keeps it for itself, and all have the
same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

Graph = Mapping[int, tuple[int, ...]]
"""Each island's neighbours; who is one of whom is mutual."""


class Ask(NamedTuple):
    order: int
    """Of all asks; a smaller one has waited longer."""
    patient: bool


class Meeting(NamedTuple):
    number: int
    """From 1; both of a pair have the same."""
    peer: int


@dataclass(frozen=True, slots=True)
class Desk:
    """What all islands know together."""

    meetings: int = 0
    asks: int = 0
    ready: Mapping[int, Ask] = field(default_factory=dict)
    met: Mapping[int, Meeting] = field(default_factory=dict)
    """Each island's newest meeting."""
    ended: frozenset[int] = frozenset()
    last: Mapping[tuple[int, int], int] = field(default_factory=dict)
    """The newest meeting of two, the smaller first; those that never met are left out."""


def ask(desk: Desk, node: int, graph: Graph) -> Desk:
    """``node`` is ready, and patient."""
    asked = Ask(desk.asks + 1, patient=True)
    return _paired(replace(desk, asks=asked.order, ready={**desk.ready, node: asked}), node, graph)


def hurry(desk: Desk, node: int, graph: Graph) -> Desk:
    """``node`` waits no longer for some of its neighbours alone; one that waits no more is left as it is."""
    if node not in desk.ready:
        return desk
    asked = desk.ready[node]._replace(patient=False)
    return _paired(replace(desk, ready={**desk.ready, node: asked}), node, graph)


def withdraw(desk: Desk, node: int) -> Desk:
    """``node`` is not ready any more; a meeting that it has been given stays one."""
    return replace(desk, ready=_without(desk.ready, node))


def end(desk: Desk, node: int) -> Desk:
    """``node`` meets nobody any more."""
    return replace(desk, ready=_without(desk.ready, node), ended=desk.ended | {node})


def is_alone(desk: Desk, node: int, graph: Graph) -> bool:
    """Whether ``node`` has no neighbour left."""
    return not _living(desk, node, graph)


def accepted(desk: Desk, node: int, graph: Graph) -> tuple[int, ...]:
    """The neighbours whom a ready ``node`` would meet."""
    living = _living(desk, node, graph)
    if not desk.ready[node].patient or len(living) < 2:
        return living
    newest = sorted(_last(desk, node, peer) for peer in living)[len(living) // 2 - 1]
    return tuple(peer for peer in living if _last(desk, node, peer) <= newest)


def _paired(desk: Desk, node: int, graph: Graph) -> Desk:
    possible = [
        peer for peer in accepted(desk, node, graph) if peer in desk.ready and node in accepted(desk, peer, graph)
    ]
    if not possible:
        return desk
    peer = min(possible, key=lambda other: (_last(desk, node, other), desk.ready[other].order))
    number = desk.meetings + 1
    return replace(
        desk,
        meetings=number,
        ready=_without(desk.ready, node, peer),
        met={**desk.met, node: Meeting(number, peer), peer: Meeting(number, node)},
        last={**desk.last, _edge(node, peer): number},
    )


def _living(desk: Desk, node: int, graph: Graph) -> tuple[int, ...]:
    return tuple(peer for peer in graph[node] if peer not in desk.ended)


def _last(desk: Desk, node: int, peer: int) -> int:
    return desk.last.get(_edge(node, peer), 0)


def _edge(a: int, b: int) -> tuple[int, int]:
    return min(a, b), max(a, b)


def _without(ready: Mapping[int, Ask], *nodes: int) -> dict[int, Ask]:
    return {node: asked for node, asked in ready.items() if node not in nodes}


def graph_of(edges: Sequence[tuple[int, int]], num_nodes: int) -> Graph:
    out: dict[int, list[int]] = {node: [] for node in range(num_nodes)}
    for a, b in edges:
        out[a].append(b)
        out[b].append(a)
    return {node: tuple(sorted(peers)) for node, peers in out.items()}


# ---- words


def word(node: int, said: str) -> str:
    """What ``node`` tells all islands: ask, hurry, withdraw or end."""
    return f"{node} {said}"


def heard(desk: Desk, told: str, graph: Graph) -> Desk:
    """The desk after a ``word``."""
    node, said = told.split()
    match said:
        case "ask":
            return ask(desk, int(node), graph)
        case "hurry":
            return hurry(desk, int(node), graph)
        case "withdraw":
            return withdraw(desk, int(node))
        case _:
            return end(desk, int(node))

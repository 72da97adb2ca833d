"""How does a researcher's own topology get in? As a function in a file of theirs: ``sync.topology = "mine.py:rows"``.

    def rows(index: int, node: int, num_nodes: int) -> dtrain.topology.Round

is that node's row of round ``index``'s matrix W: pure, the same on every island and whenever it is asked. W is doubly stochastic,
and who is sent to hears. That is checked of all islands for the first LOOK rounds, before anything starts, and of each later
round when it is first asked for. So is, for methods that need it, whether W stays the same or its rounds are meetings."""

from __future__ import annotations

import hashlib
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from functools import lru_cache
from numbers import Real
from typing import Literal, NamedTuple, SupportsIndex, cast

from dtrain import topology as topologies
from dtrain.own import digest, load_named
from dtrain.own_name import is_own
from dtrain.topology import Mixing, Round, Topology

LOOK = 64
"""Rounds. Within them each island must hear, if only by others, of all; and no later round may need more room than they do."""
Kind = Literal["any", "same", "pairs"]
"""What a method needs of its rounds: nothing more, the same symmetric W in all of them, or two that average in each."""
_OFF = 1e-9
"""By which weights may miss 1 in sum: float64 rounds 1024 of them to 1e-13, and somebody's 0.333 are no third."""


_KEPT = 16
"""Rounds that are kept whole; one of 1024 islands that all hear of all is 100 MB."""


class _Own(NamedTuple):
    """A function of somebody's own, with what was found out about it."""

    rounds: Callable[[int, int], tuple[Round, ...]]
    """(index, number of nodes) -> all rows of the round, checked."""
    looked: Callable[[int], _Looked]
    """Of so many nodes."""


class _Looked(NamedTuple):
    """Of the first LOOK rounds."""

    heard: tuple[int, ...]
    """The most peers that each island hears in one."""
    apart: tuple[int, ...]
    """Islands that never hear of island 0."""
    digest: bytes


def mixing_of(topology: str, graph: str | None, seed: int, server: str | None, kind: Kind = "any") -> Mixing:
    """The topology of a name that ``check_topology``, and ``check_kind`` of one's own, have let pass."""
    if not is_own(topology):
        return topologies.mixing(topology, graph, seed, server)
    own = _own_of(topology)

    @lru_cache(maxsize=_KEPT)
    def checked(index: int, num_nodes: int) -> tuple[Round, ...]:
        each, heard = own.rounds(index, num_nodes), own.looked(num_nodes).heard
        for node, (row, most) in enumerate(zip(each, heard, strict=True)):
            if len(row.recvs) > most:
                raise ValueError(
                    f"{_where(topology, index)} lets island {node} hear {len(row.recvs)} others, and none of the first {LOOK} "
                    f"rounds more than {most}; let one of those be as large"
                )
        misfit = None if kind == "any" else _misfit(kind, each, own.rounds(0, num_nodes))
        if misfit is not None:
            raise ValueError(f"{_where(topology, index)} {misfit}, as none of the first {LOOK} did; let it be like them")
        return each

    base = Mixing(
        lambda index, node, num_nodes: checked(index, num_nodes)[node],
        lambda _: LOOK,
        heard=lambda node, num_nodes: own.looked(num_nodes).heard[node],
    )
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
    apart = _own_of(topology).looked(num_nodes).apart
    if apart and server is None:
        raise ValueError(
            f"sync.topology = {topology!r}: in its first {LOOK} rounds islands {', '.join(map(str, apart))} never hear of "
            "island 0; add edges, or rounds with a server (sync.server)"
        )


def check_kind(algorithm: str, needs: str, topology: str, num_nodes: int, kind: Kind) -> None:
    """Raises ValueError where the first LOOK rounds of one's own topology are not of the kind that a method needs."""
    rounds = _own_of(topology).rounds
    first = rounds(0, num_nodes)
    for index in range(LOOK):
        misfit = _misfit(kind, rounds(index, num_nodes), first)
        if misfit is not None:
            raise ValueError(
                f"{algorithm} {needs}, and {_where(topology, index)}, of {LOOK} that were looked at, {misfit}; use another "
                'topology, or sync.recipe = "dpsgd"'
            )


def _misfit(kind: Kind, each: tuple[Round, ...], first: tuple[Round, ...]) -> str | None:
    """What a round does that one of its kind does not; ``first`` is round 0."""
    weights = [dict(row.recvs) for row in each]
    if kind == "same":
        if each != first:
            return "is another than round 0"
        lopsided = ((a, b) for a, row in enumerate(weights) for b, w in row.items() if abs(w - weights[b].get(a, 0.0)) > _OFF)
        found = next(lopsided, None)
        return None if found is None else f"lets island {found[0]} hear island {found[1]} with another weight than the other way"
    for node, row in enumerate(weights):
        if len(row) > 1 or any(abs(w - 0.5) > _OFF or node not in weights[peer] for peer, w in row.items()):
            return f"is no meeting of two, of weight 1/2, for island {node}"
    return None


def digest_of_rows(topology: str, num_nodes: int) -> bytes:
    """Of W's first LOOK rounds, of one's own topology."""
    return _own_of(topology).looked(num_nodes).digest


def _own_of(name: str) -> _Own:
    path, word, found = load_named(name, "topology")
    if not callable(found) or isinstance(found, type) or not _takes_three(found):
        raise ValueError(
            f"sync.topology = {name!r}: {path.name} has no function {word}; define def {word}(index, node, num_nodes) there, "
            "that returns a dtrain.topology.Round"
        )
    return _looked_at(name, f"{path}:{word}", digest(name))


def _takes_three(found: Callable[..., object]) -> bool:
    try:
        inspect.signature(found).bind(0, 0, 2)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=16)
def _looked_at(name: str, place: str, file: str) -> _Own:
    """What is found out once a process, of a name, where it is, and its file's digest."""
    rows = cast(Topology, load_named(place, "topology")[2])

    def asked(index: int, num_nodes: int) -> list[Round]:
        where = _where(name, index)
        return [_row(where, node, rows(index, node, num_nodes)) for node in range(num_nodes)]

    @lru_cache(maxsize=_KEPT)
    def rounds(index: int, num_nodes: int) -> tuple[Round, ...]:
        each = asked(index, num_nodes)
        _check(_where(name, index), each)
        return tuple(each)

    @lru_cache(maxsize=16)
    def looked(num_nodes: int) -> _Looked:
        heard, summed = [0] * num_nodes, hashlib.sha256()
        reached = {node: {node} for node in range(num_nodes)}
        for index in range(LOOK):
            each = asked(index, num_nodes)
            if each != asked(index, num_nodes):
                raise ValueError(f"{_where(name, index)} is another when it is asked again; draw by random.Random(index)")
            _check(_where(name, index), each)
            summed.update(repr([tuple(row) for row in each]).encode())
            for node, row in enumerate(each):
                heard[node] = max(heard[node], len(row.recvs))
                for peer, _ in row.recvs:
                    _join(reached, node, peer)
        return _Looked(tuple(heard), tuple(sorted(set(range(num_nodes)) - reached[0])), summed.digest())

    return _Own(rounds, looked)


def _join(reached: dict[int, set[int]], one: int, two: int) -> None:
    """The smaller of two parts becomes one of the larger."""
    large, small = sorted((reached[one], reached[two]), key=len, reverse=True)
    if large is not small:
        large |= small
        for node in small:
            reached[node] = large


def _where(name: str, index: int) -> str:
    return f"sync.topology = {name!r}: round {index}"


def _row(where: str, node: int, row: object) -> Round:
    """What was returned, in whole numbers and floats of Python's own."""
    if not isinstance(row, Round):
        raise ValueError(f"{where} gives island {node} {row!r}; return a dtrain.topology.Round")
    try:
        sends = tuple(map(operator.index, row.sends))
    except TypeError:
        raise ValueError(f"{where}: island {node} sends to {row.sends!r}; name islands by whole numbers, as (1, 2)") from None
    recvs = tuple(_recv(where, node, pair) for pair in _items(where, node, row))
    return Round(_weight(where, node, row.self_weight), sends, recvs)


def _items(where: str, node: int, row: Round) -> Iterable[object]:
    if isinstance(row.recvs, str) or not isinstance(row.recvs, Iterable):
        raise ValueError(f"{where}: island {node} hears {row.recvs!r}; write (peer, weight) for each, as ((1, 0.5),)")
    return row.recvs


def _recv(where: str, node: int, pair: object) -> tuple[int, float]:
    try:
        peer, weight = cast(tuple[SupportsIndex, object], pair)
        whole = operator.index(peer)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: island {node} hears {pair!r}; write (peer, weight) for each, as ((1, 0.5),)") from None
    return whole, _weight(where, node, weight)


def _weight(where: str, node: int, weight: object) -> float:
    if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"{where}: island {node} has a weight of {weight!r}; use numbers of 0 or more")
    return float(weight)


def _check(where: str, each: list[Round]) -> None:
    """Of all rows of a round: whether who is sent to hears, and rows and columns sum to 1."""
    for node, row in enumerate(each):
        for word, peers in (("sends to", list(row.sends)), ("hears", [peer for peer, _ in row.recvs])):
            if len(set(peers)) < len(peers) or not all(0 <= p < len(each) and p != node for p in peers):
                raise ValueError(f"{where}: island {node} {word} {peers}; name others, from 0 to {len(each) - 1}, once each")
    sent = {(node, peer) for node, row in enumerate(each) for peer in row.sends}
    heard = {(peer, node) for node, row in enumerate(each) for peer, _ in row.recvs}
    for node, peer in sorted(sent - heard):
        raise ValueError(f"{where}: island {node} sends to island {peer}, which does not hear it; add it to recvs there")
    for peer, node in sorted(heard - sent):
        raise ValueError(f"{where}: island {node} waits for island {peer}, which sends nothing; add it to sends there")
    columns = [[row.self_weight] for row in each]
    for row in each:
        for peer, weight in row.recvs:
            columns[peer].append(weight)
    for node, row in enumerate(each):
        for word, values in (("row", [row.self_weight, *(weight for _, weight in row.recvs)]), ("column", columns[node])):
            if abs(math.fsum(values) - 1) > _OFF:
                raise ValueError(
                    f"{where}: the {word} of island {node} sums to {math.fsum(values):.12g}, and rows and columns of a mixing "
                    "matrix sum to 1; else the islands would lose their mean"
                )

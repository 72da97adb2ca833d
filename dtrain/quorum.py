"""Who takes part in a round that does not wait for all islands? A pure rule over words that all islands hear in one order.

A word names a round, by the step after which it started, and its members. The first word of a round counts and all later ones do
not, so all islands land the same members, whoever said it and whatever got lost on the way to whom. An island may say one where
it holds the wires of all whom it names, its own among them, and they are a quorum:
    at once, where whoever may still send is among them;
    else as soon as it needs the round and the grace is over.
Nobody is left out of more than ``MOST_MISSED`` rounds in a row: then it is waited for, so that what it learned comes in, and
nobody has to keep more than so many rounds' wires for it. Who is gone, and will not come back, is never waited for.

It is the scheme of Decoupled DiLoCo (arXiv 2604.21428), of a quorum and a grace, without its server: the paper waits for as long
as a round can fly unnoticed, and so does an island that says nothing before it needs the round."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

MOST_MISSED = 4
_KEPT = 256
"""Rounds whose members are remembered: many more than an island can be behind, of all fragments together."""


@dataclass(frozen=True, slots=True)
class Roll:
    """What all islands know together."""

    num_islands: int
    quorum: int
    """The fewest members of a round."""
    members: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """Of the rounds that are decided, by their steps; of the newest of them."""
    missed: Mapping[int, int] = field(default_factory=dict)
    """How many decided rounds in a row an island is no member of."""


def check(said: object) -> None:
    """Raises ValueError for what is no ``sync.quorum``."""
    share = re.fullmatch(r"([0-9]+)%", said) if isinstance(said, str) else None
    some = isinstance(said, int) and not isinstance(said, bool) and said >= 1
    if said is not None and not some and not (share and 1 <= int(share[1]) <= 100):
        raise ValueError(f'quorum = {said!r} is not allowed; use a number of islands, 1 or more, or a share of them, "60%"')


def size(said: int | str | None, num_islands: int) -> int:
    """The fewest members of a round: 3, or "60%" of all islands, rounded up; None: all. Raises ValueError for more than there
    are."""
    check(said)
    if isinstance(said, str):
        return -(-int(said.removesuffix("%")) * num_islands // 100)
    if said is not None and said > num_islands:
        raise ValueError(
            f"sync.quorum = {said} is more than islands.count = {num_islands}; use {num_islands} at most, or a share, \"60%\""
        )
    return num_islands if said is None else said


def check_grace(grace_s: float, timeout_s: float) -> None:
    """Raises ValueError where who is late would be taken for lost before its grace is over. Half of the limit, as that begins
    with the wait, and the grace when a quorum's wires are here, which others may see later."""
    if grace_s > timeout_s / 2:
        raise ValueError(
            f"sync.grace = {grace_s:g} s of link.timeout_s = {timeout_s:g}: an island that is late would be taken for lost "
            f"before its grace is over; use a grace of {timeout_s / 2:g} s at most, or a longer timeout"
        )


def may_say(roll: Roll, here: Set[int], gone: Set[int], *, hurry: bool) -> bool:
    """Whether the islands whose wires are ``here`` may be named as a round's members. ``gone``: those that send no wire of it any
    more. ``hurry``: the round is needed, and the grace is over."""
    absent = set(range(roll.num_islands)) - here - gone
    return len(here) >= roll.quorum and (
        not absent or (hurry and all(roll.missed.get(node, 0) < MOST_MISSED for node in absent))
    )


def can_do_without(roll: Roll, gone: Set[int]) -> bool:
    """Whether a quorum is left."""
    return roll.num_islands - len(gone) >= roll.quorum


def word(step: int, members: Set[int]) -> str:
    """That the round which started after ``step`` has these members."""
    return f"{step} {','.join(map(str, sorted(members)))}"


def heard(roll: Roll, told: str) -> Roll:
    """The roll after a ``word``; as it was where the round has members, or the word names no quorum."""
    text, _, names = told.partition(" ")
    step, named = int(text), frozenset(map(int, names.split(",")))
    if step in roll.members or len(named) < roll.quorum:
        return roll
    members = {**roll.members, step: named}
    for old in list(members)[:-_KEPT]:
        del members[old]
    missed = {node: 0 if node in named else roll.missed.get(node, 0) + 1 for node in range(roll.num_islands)}
    return Roll(roll.num_islands, roll.quorum, members, missed)

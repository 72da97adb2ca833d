"""Which time do two lists of intervals share, and which of nested spans is the innermost?

An interval is (begun, ended) in nanoseconds; a list of them that ``union`` made is sorted and disjoint."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

Interval = tuple[int, int]


class _Timed(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def begun_ns(self) -> int: ...
    @property
    def ended_ns(self) -> int: ...


Timed = TypeVar("Timed", bound=_Timed)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begun, ended in sorted(i for i in intervals if i[1] > i[0]):
        if merged and begun <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], ended))
        else:
            merged.append((begun, ended))
    return merged


def intersection(a: Iterable[Interval], b: Iterable[Interval]) -> list[Interval]:
    left, right, common = union(a), union(b), list[Interval]()
    i = j = 0
    while i < len(left) and j < len(right):
        begun, ended = max(left[i][0], right[j][0]), min(left[i][1], right[j][1])
        if ended > begun:
            common.append((begun, ended))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(a: Iterable[Interval], b: Iterable[Interval]) -> list[Interval]:
    """What lies in a and not in b."""
    taken, rest, j = union(b), list[Interval](), 0
    for begun, ended in union(a):
        while j < len(taken) and taken[j][1] <= begun:
            j += 1
        k = j
        while k < len(taken) and taken[k][0] < ended:
            if taken[k][0] > begun:
                rest.append((begun, taken[k][0]))
            begun = max(begun, taken[k][1])
            k += 1
        if begun < ended:
            rest.append((begun, ended))
    return rest


def length(intervals: Iterable[Interval]) -> int:
    return sum(ended - begun for begun, ended in union(intervals))


def innermost(spans: Iterable[Timed]) -> dict[str, list[Interval]]:
    """When each name was the innermost one open. The spans are of one thread, so they nest; disjoint over all names."""
    found: dict[str, list[Interval]] = {}
    stack: list[tuple[str, int]] = []  # name, end
    at = 0

    def advance(to: int) -> None:
        nonlocal at
        while stack:
            name, ended = stack[-1]
            stop = min(ended, to)
            if stop > at:
                found.setdefault(name, []).append((at, stop))
                at = stop
            if ended > to:
                break
            stack.pop()
        at = max(at, to)

    for span in sorted(spans, key=lambda s: (s.begun_ns, -s.ended_ns)):
        advance(span.begun_ns)
        # Clocks are read one after the other: a child may seem to end a little after its parent.
        stack.append((span.name, min(span.ended_ns, stack[-1][1]) if stack else span.ended_ns))
    advance(max((ended for _, ended in stack), default=at))
    return found


def without_parts(spans: Iterable[Timed], whole: AbstractSet[str]) -> list[Timed]:
    """The spans of one thread, but for those that lie within one whose name is in ``whole``."""
    kept: list[Timed] = []
    until = 0
    for span in sorted(spans, key=lambda s: (s.begun_ns, -s.ended_ns)):
        if span.begun_ns >= until:
            kept.append(span)
            if span.name in whole:
                until = span.ended_ns
    return kept

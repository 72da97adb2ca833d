"""Who of an island's ranks gives which elements of a bucket to its owner, and who gets them back? Plain arithmetic.

Elements are numbered through the whole model, as a bucket's layout does (``Span.global_offset``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dtrain.bucket import Layout


class Held(NamedTuple):
    """A part of one parameter on one rank: elements start:stop of the model."""

    start: int
    stop: int


class Piece(NamedTuple):
    """Elements that lie together in a bucket and in what a rank holds."""

    held: int
    """Which of the rank's parts."""
    inside: slice
    """Of that part."""
    here: slice
    """Of the bucket."""


def pieces(layout: Layout, parts: Sequence[Held]) -> list[Piece]:
    """Where a rank's parts, in any order, meet a bucket."""
    return list(_meeting(layout, parts))


def first_holders(layout: Layout, ranks: Sequence[Sequence[Held]]) -> list[list[Piece]]:
    """``pieces`` of each rank, each element of the bucket once: of the first rank that holds it. Raises ValueError where none
    does."""
    free = [(s.start, s.stop) for s in layout.spans]
    out: list[list[Piece]] = []
    for parts in ranks:
        kept: list[Piece] = []
        for piece in _meeting(layout, parts):
            for a, b in _common(free, piece.here):
                shift = piece.inside.start - piece.here.start
                kept.append(Piece(piece.held, slice(a + shift, b + shift), slice(a, b)))
        for piece in kept:
            free = _without(free, piece.here)
        out.append(kept)
    if free:
        a, b = free[0]
        name = next(s.name for s in layout.spans if s.start <= a < s.stop)
        raise ValueError(f"no rank of the island holds {b - a} elements of parameter {name}")
    return out


def _meeting(layout: Layout, parts: Sequence[Held]) -> Iterator[Piece]:
    for k, part in enumerate(parts):
        for s in layout.spans:
            a, b = max(part.start, s.global_offset), min(part.stop, s.global_offset + s.numel)
            if a < b:
                at = s.start - s.global_offset
                yield Piece(k, slice(a - part.start, b - part.start), slice(a + at, b + at))


def _common(free: Sequence[tuple[int, int]], here: slice) -> list[tuple[int, int]]:
    return [(max(a, here.start), min(b, here.stop)) for a, b in free if max(a, here.start) < min(b, here.stop)]


def _without(free: Sequence[tuple[int, int]], here: slice) -> list[tuple[int, int]]:
    left = [(a, min(b, here.start)) for a, b in free] + [(max(a, here.stop), b) for a, b in free]
    return sorted({(a, b) for a, b in left if a < b})

"""Which parameters are sent as the product of two thin matrices? Pure.

A matrix M (m x k) goes as P (m x r) and Q (k x r), M ~ P Q^T: r (m + k) numbers in place of m k. Embeddings and heads, of which
a round moves few rows much, and what is no matrix go as they are (arXiv 2506.21263, 1905.13727)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Rank = int | str
"""r, or ``"adaptive:R"``: as many columns as the last rounds needed, R at first and at most."""
_ADAPTIVE = "adaptive:"
_TABLES = ("embed", "wte", "wpe")
"""Within a part of a parameter's dotted name: a table of vectors, one of which belongs to a token or a position."""
_HEADS = ("head", "lm_head", "output_layer")
"""A part of a parameter's dotted name: what turns features into a number for each token."""


def check_word(rank: str) -> None:
    """Raises ValueError for a text that is no rank."""
    if not adapts(rank) or not rank.removeprefix(_ADAPTIVE).isdecimal() or int(rank.removeprefix(_ADAPTIVE)) < 1:
        raise ValueError(f'rank = {rank!r} is not known; use 1 or more, or "adaptive:32": 32 at first, then as few as do')


def adapts(rank: Rank) -> bool:
    return isinstance(rank, str) and rank.startswith(_ADAPTIVE)


def highest(rank: Rank) -> int:
    """The largest that it may be."""
    return int(rank.removeprefix(_ADAPTIVE)) if isinstance(rank, str) else rank


def rank_of(name: str, shape: Sequence[int], rank: int) -> int:
    """``rank`` where the parameter is sent by so many columns of P and Q; 0 where it goes as it is."""
    if len(shape) != 2 or _is_left_out(name):
        return 0
    m, k = shape
    return rank if min(m, k) > rank and rank * (m + k) < m * k else 0


def check_rank(shapes: Mapping[str, Sequence[int]], rank: Rank) -> None:
    """Raises ValueError where no parameter would be sent so."""
    if any(rank_of(name, shape, highest(rank)) for name, shape in shapes.items()):
        return
    most = max((_most(name, shape) for name, shape in shapes.items()), default=0)
    instead = 'sync.reduce = "all_to_all"'
    if most < 1:
        raise ValueError(
            f"sync.rank = {rank!r}: the model has no matrix but embeddings and heads, which are sent whole; use {instead}"
        )
    raise ValueError(
        f"sync.rank = {rank!r}: no matrix of the model has a product of so many columns that is smaller than itself; use "
        f"sync.rank = {most} or less, or {instead}"
    )


def _most(name: str, shape: Sequence[int]) -> int:
    """The largest rank by which a parameter is sent; 0 where there is none."""
    if len(shape) != 2 or min(shape) < 1:
        return 0
    m, k = shape
    most = min(min(m, k) - 1, -(-m * k // (m + k)) - 1)
    return most if rank_of(name, shape, most) else 0


def _is_left_out(name: str) -> bool:
    parts = name.lower().split(".")
    return any(part in _HEADS or any(word in part for word in _TABLES) for part in parts)

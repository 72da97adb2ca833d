"""Which parameters are sent as the product of two thin matrices? Pure.

A matrix M (m x k) goes as P (m x r) and Q (k x r), M ~ P Q^T: r (m + k) numbers in place of m k. Embeddings and heads, of which
a round moves few rows much, and what is no matrix go as they are (arXiv 2506.21263, 1905.13727)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_TABLES = ("embed", "wte", "wpe")
"""Within a part of a parameter's dotted name: a table of vectors, one of which belongs to a token or a position."""
_HEADS = ("head", "lm_head", "output_layer")
"""A part of a parameter's dotted name: what turns features into a number for each token."""


def rank_of(name: str, shape: Sequence[int], rank: int) -> int:
    """``rank`` where the parameter is sent by so many columns of P and Q; 0 where it goes as it is."""
    if len(shape) != 2 or _is_left_out(name):
        return 0
    m, k = shape
    return rank if min(m, k) > rank and rank * (m + k) < m * k else 0


def check_rank(shapes: Mapping[str, Sequence[int]], rank: int) -> None:
    """Raises ValueError where no parameter would be sent so."""
    if any(rank_of(name, shape, rank) for name, shape in shapes.items()):
        return
    highest = max((_highest(name, shape) for name, shape in shapes.items()), default=0)
    instead = 'sync.reduce = "all_to_all"'
    if highest < 1:
        raise ValueError(
            f"sync.rank = {rank}: the model has no matrix but embeddings and heads, which are sent whole; use {instead}"
        )
    raise ValueError(
        f"sync.rank = {rank}: no matrix of the model has a product of so many columns that is smaller than itself; use "
        f"sync.rank = {highest} or less, or {instead}"
    )


def _highest(name: str, shape: Sequence[int]) -> int:
    """The largest rank by which a parameter is sent; 0 where there is none."""
    if len(shape) != 2 or min(shape) < 1:
        return 0
    m, k = shape
    most = min(min(m, k) - 1, -(-m * k // (m + k)) - 1)
    return most if rank_of(name, shape, most) else 0


def _is_left_out(name: str) -> bool:
    parts = name.lower().split(".")
    return any(part in _HEADS or any(word in part for word in _TABLES) for part in parts)

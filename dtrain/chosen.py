"""Which parameters do the islands share, and which stay an island's own? Patterns of their names say.

What stays an island's own (a head, adapters) takes part in nothing that islands exchange: it is not made equal at the start, and
is in no round and no average, the last one included. It follows the island's own gradient, and a merged model is evaluated with
each island's own. Gradients are clipped by the norm of all; frozen parameters are shared whatever their names. Pure: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

_SHOWN = 4
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""


def shared(names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> frozenset[str]:
    """Of the trained parameters' ``names`` those that a pattern of ``include`` matches, or all, without those that one of
    ``exclude`` does. Raises ValueError for a pattern that matches nothing, and where nothing is left."""
    kept = list(names)
    if include is not None:
        _check(include, "include", kept, "matches none of the trained parameters")
        kept = [name for name in kept if _matches(name, include)]
    if exclude is not None:
        among = "those that sync.include matches" if include is not None else "the trained parameters"
        _check(exclude, "exclude", kept, f"matches none of {among}")
        kept = [name for name in kept if not _matches(name, exclude)]
    if not kept:
        raise ValueError(
            f'sync.exclude = {_said(exclude)} leaves nothing for the islands to share of {_few(names)}; exclude less, or use '
            'sync.recipe = "local"'
        )
    return frozenset(kept)


def _check(patterns: Sequence[str], axis: str, names: Sequence[str], trouble: str) -> None:
    for pattern in patterns:
        if not any(_matches(name, (pattern,)) for name in names):
            raise ValueError(
                f'sync.{axis}: the pattern "{pattern}" {trouble}, which are {_few(names)}; write one that does, "head.*" say, or '
                "leave it out"
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """By its full name, or as it is called in the model that is wrapped."""
    bare = name
    while bare.startswith(_WRAPPERS):
        bare = bare.partition(".")[2]
    return any(fnmatchcase(candidate, pattern) for candidate in (name, bare) for pattern in patterns)


def _few(names: Sequence[str]) -> str:
    """The first and the last ones."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    half = _SHOWN // 2
    return f"{', '.join(names[:half])} ... {', '.join(names[-half:])} ({len(names)})"


def _said(patterns: Sequence[str] | None) -> str:
    return "[" + ", ".join(f'"{pattern}"' for pattern in patterns or ()) + "]"

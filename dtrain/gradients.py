"""How do gradients get into the buckets and back? For methods that rewrite them before the update; ``island/parts.py`` does it
where ranks hold parts of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from dtrain.bucket import Bucket, Flat
from dtrain.island.parts import Parts
from dtrain.island.replicas import Island


class Gradients(Protocol):
    def read(self) -> None:
        """Fill the ``g`` of this rank's buckets; a missing gradient counts as zero."""
        ...

    def write(self) -> None:
        """Give the owners' ``g`` to all ranks of the island, as gradients."""
        ...


def gradients_of(buckets: Sequence[Bucket], flat: Flat, ranks: Island) -> Gradients:
    return Shared(buckets, ranks) if isinstance(ranks, Parts) else Copied(buckets, flat, ranks)


class Shared:
    """Where ranks hold parts of the parameters."""

    def __init__(self, buckets: Sequence[Bucket], ranks: Parts) -> None:
        self._buckets, self._ranks = buckets, ranks

    def read(self) -> None:
        self._ranks.read_gradients(self._buckets)

    def write(self) -> None:
        self._ranks.share_gradients(self._buckets)


class Copied:
    """Where each has all of those in its buckets."""

    def __init__(self, buckets: Sequence[Bucket], flat: Flat, ranks: Island) -> None:
        self._buckets, self._ranks = buckets, ranks
        by_name = dict(zip(flat.names, flat.parameters, strict=True))
        begins: dict[str, int] = {}
        self._parts: list[list[tuple[nn.Parameter, slice, slice]]] = []
        for b in buckets:
            parts = []
            for s in b.layout.spans:
                inside = s.global_offset - begins.setdefault(s.name, s.global_offset)
                parts.append((by_name[s.name], slice(inside, inside + s.numel), slice(s.start, s.stop)))
            self._parts.append(parts)

    def read(self) -> None:
        for b, parts in zip(self._buckets, self._parts, strict=True):
            assert b.g is not None
            for parameter, inside, here in parts:
                if parameter.grad is None:
                    b.g[here].zero_()
                else:
                    b.g[here].copy_(parameter.grad.view(-1)[inside])

    def write(self) -> None:
        self._ranks.share_gradients(self._buckets)
        for b, parts in zip(self._buckets, self._parts, strict=True):
            assert b.g is not None
            for parameter, inside, here in parts:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.view(-1)[inside].copy_(b.g[here])

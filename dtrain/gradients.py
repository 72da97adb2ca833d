"""How do gradients get into the buckets and back? For methods that rewrite them before the update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dtrain.bucket import Bucket, Flat


class Gradients:
    """Copies between ``parameter.grad`` and each bucket's ``g``; a missing gradient counts as zero."""

    def __init__(self, buckets: Sequence[Bucket], flat: Flat) -> None:
        self._buckets = buckets
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
        for b, parts in zip(self._buckets, self._parts, strict=True):
            assert b.g is not None
            for parameter, inside, here in parts:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad.view(-1)[inside].copy_(b.g[here])

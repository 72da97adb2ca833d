"""Which parts of a model belong to what islands share beside the trained parameters, and how do they travel?

Frozen parameters and persistent buffers are made equal at the start, byte for byte: of parameters a few at a time, so that no
rank of an island that shards them has more than these. Of the buffers those that hold
numbers (batch-norm statistics, counters) are averaged with the model, as one fp32 tensor; the others (masks with -inf,
flags, integers that fp32 would round) stay each island's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtrain.bucket_bytes import MAX_BUCKET_BYTES
from dtrain.shards import first_element, is_part, local, named_buffers, whole

LARGEST_INTEGER = 2**24
"""Up to here fp32 holds every integer."""


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that are saved with the model, in the model's order."""
    kept = set(model.state_dict().keys())
    return [b for name, b in named_buffers(model) if name in kept]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A parameter that no gradient is asked of."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """All of it: in place, or of one that is sharded a copy, for which all ranks call this."""
    write: Callable[[Tensor], None]
    """Make what was read its value; all ranks call it, with the same."""

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


def frozen_parameters(model: nn.Module) -> list[Frozen]:
    return [_frozen(p.detach()) for p in model.parameters() if not p.requires_grad]


def together(frozen: Sequence[Frozen]) -> Iterator[list[Frozen]]:
    """A bucket's bytes of neighbours at a time, or one that has more; on all islands the same."""
    few, numel_bytes = list[Frozen](), 0
    for p in frozen:
        own_bytes = p.numel * p.dtype.itemsize
        if few and numel_bytes + own_bytes > MAX_BUCKET_BYTES:
            yield few
            few, numel_bytes = [], 0
        few.append(p)
        numel_bytes += own_bytes
    if few:
        yield few


def _frozen(x: Tensor) -> Frozen:
    def put(value: Tensor) -> None:
        part, first = local(x), first_element(x)
        part.copy_(value.reshape(-1)[first : first + part.numel()].view(part.shape))

    if is_part(x):
        return Frozen(x.dtype, tuple(x.shape), lambda: whole(x), put)
    return Frozen(x.dtype, tuple(x.shape), lambda: x, lambda _: None)


def averaged_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers that a merge averages; chosen when islands are equal, so that all choose the same."""
    return [b for b in persistent_buffers(model) if _is_number(b)]


def pack(buffers: Sequence[Tensor]) -> Tensor | None:
    """All of them in one flat fp32 tensor, or None where there are none."""
    return torch.cat([b.reshape(-1).to(torch.float32) for b in buffers]) if buffers else None


def unpack(buffers: Sequence[Tensor], packed: Tensor) -> None:
    offset = 0
    for b in buffers:
        values = packed[offset : offset + b.numel()].view(b.shape)
        b.copy_(values if b.is_floating_point() else values.round())
        offset += b.numel()


def _is_number(b: Tensor) -> bool:
    if b.is_floating_point():
        return bool(torch.isfinite(b).all())
    if b.dtype == torch.bool or b.is_complex():
        return False
    return b.numel() == 0 or int(b.abs().max()) < LARGEST_INTEGER

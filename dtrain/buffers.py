"""Which parts of a model belong to what islands share beside the trained parameters, and how do they travel?

Frozen parameters and persistent buffers are made equal at the start, byte for byte. Of the buffers those that hold
numbers (batch-norm statistics, counters) are averaged with the model, as one fp32 tensor; the others (masks with -inf,
flags, integers that fp32 would round) stay each island's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGEST_INTEGER = 2**24
"""Up to here fp32 holds every integer."""


def persistent_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that are saved with the model, in the model's order."""
    kept = set(model.state_dict().keys())
    return [b for name, b in model.named_buffers() if name in kept]


def frozen_parameters(model: nn.Module) -> list[Tensor]:
    return [p.data for p in model.parameters() if not p.requires_grad]


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

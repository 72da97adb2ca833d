"""Which buffers belong to the state that islands share, and how do they travel? As one fp32 tensor, counters as
numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def state_buffers(model: nn.Module) -> list[Tensor]:
    """Buffers that are saved with the model (batch-norm statistics and the like), in the model's order."""
    kept = set(model.state_dict().keys())
    return [b for name, b in model.named_buffers() if name in kept]


def pack_buffers(model: nn.Module) -> Tensor | None:
    """All of them in one flat fp32 tensor, or None where there are none. Counters are exact up to 2^24."""
    buffers = state_buffers(model)
    return torch.cat([b.reshape(-1).to(torch.float32) for b in buffers]) if buffers else None


def unpack_buffers(model: nn.Module, packed: Tensor) -> None:
    offset = 0
    for b in state_buffers(model):
        values = packed[offset : offset + b.numel()].view(b.shape)
        b.copy_(values if b.is_floating_point() else values.round())
        offset += b.numel()

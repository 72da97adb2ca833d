"""What does an island put on the wire? Each payload fills an fp32 buffer from a bucket."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dtrain.bucket import Bucket
from dtrain.codec import State

Payload = Callable[[Bucket, State, Tensor], None]
"""(bucket, state, out fp32): fills out."""


def parameters(b: Bucket, state: State, out: Tensor) -> None:
    out.copy_(b.x)


def pseudo_gradients(b: Bucket, state: State, out: Tensor) -> None:
    """anchor - x: how far the island has come since the last round, with a gradient's sign."""
    torch.sub(state["anchor"], b.x, out=out)

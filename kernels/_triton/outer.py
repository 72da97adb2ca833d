"""How does the outer optimizer land a delta? One pass over five tensors."""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.check import same_length
from dtrain.kernels._triton.launch import TILE, aligned, kernel, launch
from dtrain.kernels._triton.memory import load_float, store_float


@kernel
def outer_kernel(
    x, sent, anchor, momentum, delta, numel: tl.int64, descent: tl.float32, mu: tl.float32, whole: tl.int64, TILE: tl.constexpr
):
    """descent: -lr."""
    start = tl.program_id(0).to(tl.int64) * TILE
    left = tl.minimum(numel - start, TILE).to(tl.int32)
    at = tl.arange(0, TILE)
    inside = at < left
    whole = (whole != 0) & (left == TILE)
    step = load_float(delta + start, at, inside, whole)
    u = load_float(momentum + start, at, inside, whole) * mu + step
    landed = tl.fma(
        tl.zeros_like(u) + descent, tl.fma(tl.zeros_like(u) + mu, u, step), load_float(anchor + start, at, inside, whole)
    )
    moved = load_float(x + start, at, inside, whole) - load_float(sent + start, at, inside, whole)
    store_float(momentum + start, at, u, inside, whole)
    store_float(anchor + start, at, landed, inside, whole)
    store_float(x + start, at, moved + landed, inside, whole)


def outer_step(x: Tensor, sent: Tensor, anchor: Tensor, momentum: Tensor, delta: Tensor, lr: float, mu: float) -> None:
    same_length(x, sent, anchor, momentum, delta)
    launch(
        outer_kernel, -(-x.numel() // TILE), 4, x, sent, anchor, momentum, delta, x.numel(), -float(lr), float(mu),
        int(aligned(x, sent, anchor, momentum, delta)), TILE=TILE,
    )  # fmt: skip

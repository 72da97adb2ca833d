"""What does an island of several ranks run? DDP inside, dtrain outside; and the same loop with one rank."""

from __future__ import annotations

from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.contract import steppers
from dtrain.optim import SAM
from dtrain.recipes import RECIPES
from tests.dist import least_squares
from tests.dist.child import model_digest

STEPS, EVERY = 20, 5
BUCKET_BYTES = 8
"""So small that every parameter is a bucket, and each rank carries some."""


def ddp_loop(
    *,
    wrap: Literal["before", "after"],
    recipe: str,
    codec: str,
    delay: int,
    every: int = EVERY,
    rho: float = 0.0,
    corrects: bool = False,
    **axes: Any,
) -> dict[str, Any]:
    """The island's batch is split over its ranks; the model is wrapped before or after the join."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = trained = least_squares.make_model()
    if ranks > 1 and wrap == "before":
        trained = DistributedDataParallel(model)
    optimizers = steppers(model, RECIPES[recipe], least_squares.LR)
    inside = True
    sam = SAM(optimizers, rho=rho) if rho else None
    before: list[float] = []
    with dtrain.join(
        trained, sam or optimizers, recipe=recipe, every=every, codec=codec, delay=delay, bucket_bytes=BUCKET_BYTES, **axes
    ) as sync:
        if ranks > 1 and wrap == "after":
            trained = DistributedDataParallel(model)
        for step in range(STEPS):
            x, y = least_squares.batch(sync.island, step)

            part = x.chunk(ranks)[rank], y.chunk(ranks)[rank]

            def gradient(part: tuple[Tensor, Tensor] = part) -> None:
                model.zero_grad()
                least_squares.loss_of(trained, *part).backward()

            if sam is None:
                gradient()
            else:
                sam.gradient(gradient)
            for optimizer in optimizers:
                optimizer.step()
            if step == STEPS - 2:
                before = [x for p in model.parameters() for x in p.detach().reshape(-1).tolist()]
            inside = inside and least_squares.within_bounds(model)
        own = [x for p in model.parameters() for x in p.detach().reshape(-1).tolist()]
        if corrects:
            sync.merge_corrected()
        else:
            sync.merge()
        stats = sync.stats()
    return {
        "sent": stats.wire_bytes_sent,
        "received": stats.wire_bytes_received,
        "buckets": sorted({b.owner for b in sync.buckets}),
        "own": own,
        "before": before,
        "model": model_digest(model),
        "inside": inside,
    }

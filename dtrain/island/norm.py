"""How long is an island's gradient, and how is it cut to length? Its norm is over all that the island's ranks hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtrain.island.replicas import Island
from dtrain.shards import local
from dtrain.spans import span


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], norm: float, island: Island) -> None:
    """torch's ``clip_grad_norm_`` over the island's whole model, of which this rank holds ``parameters``: the norm of the norms
    of all tensors, in the model's order, so that the ranks find one norm and the bits of one rank that holds everything."""
    with span("clip"):
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        if island.whole and island.num_replicas == island.num_ranks:  # every rank has all of them
            total = nn.utils.get_total_norm(gradients)
        else:
            norms = [torch.linalg.vector_norm(g) for g in gradients]
            total = torch.linalg.vector_norm(island.joined(torch.stack(norms) if norms else torch.zeros(0)))
        scale = torch.clamp(norm / (total + 1e-6), max=1.0)
        for g in gradients:
            g.mul_(scale.to(g.device))

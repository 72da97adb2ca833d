"""Where is an island's gradient taken? SAM: where the loss is highest nearby, so that islands settle where it is flat.

Foret et al. 2021, arXiv 2010.01412; the local steps of DFedSAM (Shi et al. 2023, arXiv 2302.04083) are, on one batch xi,
    g = grad F(z; xi);   z <- z - lr U(grad F(z + rho g / |g|; xi)),
|g| over all parameters of the island, U any optimizer. K such steps, then gossip with the neighbours: once (dfedsam), or Q times
in a row (dfedsam_mgs)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.shards import local

T = TypeVar("T")

_LEAST_NORM = 1e-12
"""A gradient of zero leads nowhere: nothing is divided by it."""


class SAM:
    """Steps ``optimizers`` with gradients of SAM; ``join`` takes it in their place.

        sam = SAM(optimizer, rho=0.05)
        with dtrain.join(model, sam, ...):
            for batch in loader:
                sam.step(closure)    # closure: zero the gradients, model(batch).loss, backward, return the loss

    A step calls ``closure`` twice. On an island of several ranks the gradients that it leaves must be the island's (DDP's are).
    Learning rates, state and checkpoints stay the optimizers' own. Beside them it holds one copy of the parameters during a step.
    What a forward pass writes (batch-norm statistics) is written twice. Raises ValueError for a rho that is not above 0."""

    def __init__(
        self, optimizers: Optimizer | Sequence[Optimizer], *, rho: float, joined: Callable[[Tensor], Tensor] = lambda norms: norms
    ) -> None:
        """``joined``: the norms of this rank's gradients become those of the whole model's, where a rank holds a part of it."""
        if not 0 < rho < math.inf:
            raise ValueError(f"rho = {rho!r} is not allowed; use a number above 0, or the optimizer without SAM")
        self.optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        self.rho = rho
        self.joined = joined

    def step(self, closure: Callable[[], T]) -> T:
        """``gradient``, then the optimizers' steps; returns the loss at the parameters themselves."""
        loss = self.gradient(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def gradient(self, closure: Callable[[], T]) -> T:
        """Leave SAM's gradient in every ``grad`` and the parameters as they were, bit for bit; returns what ``closure`` said of
        these. For a loop that steps its optimizers itself, as with a GradScaler (a scale does not change g / |g|). Gradients that
        overflowed stay as they are, without a second pass: the scaler skips the step."""
        with torch.enable_grad():
            loss = closure()
        parameters = [p for p in self._parameters() if p.grad is not None]
        norm = self._norm([local(p.grad) for p in parameters if p.grad is not None])
        if not norm.isfinite():
            return loss
        moved = [(p, p.detach().clone()) for p in parameters]
        try:
            self._climb(parameters, norm)
            with torch.enable_grad():
                closure()
        finally:
            with torch.no_grad():
                for p, value in moved:
                    p.copy_(value)
        return loss

    @torch.no_grad()
    def _climb(self, parameters: Sequence[Tensor], norm: Tensor) -> None:
        """z <- z + rho g / |g|."""
        scale = self.rho / norm.clamp_min(_LEAST_NORM)
        for p in parameters:
            assert p.grad is not None
            local(p).add_(local(p.grad).to(scale.dtype) * scale.to(p.device))

    def _parameters(self) -> list[Tensor]:
        each = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in each}.values())

    @torch.no_grad()
    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """|g| over all, in fp32 at least: fp16 knows no norm above 65504, which gradients that a GradScaler scaled have, and no
        _LEAST_NORM."""
        if not gradients:
            return torch.zeros(())
        norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        return torch.linalg.vector_norm(self.joined(torch.stack([norm.to(norms[0].device) for norm in norms])))

"""How does an island train by itself with Muon? It steps the matrices inside the blocks, and AdamW all else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) as torch.optim.Muon has it, of a matrix W of A rows and B columns:
    M <- mu M + (1 - mu) G;   O = N((1 - mu) G + mu M);   W <- (1 - lr decay) W - 0.2 sqrt(max(A, B)) lr O
N, five Newton-Schulz steps in bf16, brings all singular values near 1: |O|_F^2 is about min(A, B), and an element of W moves by
about 0.2 lr in root mean square, whatever A and B. So far AdamW moves it (Liu et al. 2025, arXiv 2502.16982), where gradients are
noise sqrt((1 - b1) / (1 + b1)) lr: one lr serves both. On a CPU N runs in fp32 (``MuonFP32``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.optim.adam import decay_groups

_COEFFICIENTS, _TIMES, _LEAST = (3.4445, -4.7750, 2.0315), 5, 1e-7
"""N(X) = a X + (b X X^T + c (X X^T)^2) X, so often, from G / max(|G|_F, least): torch.optim.Muon's own."""


class MuonFP32(torch.optim.Muon):
    """torch.optim.Muon with Nesterov's momentum, whose N runs in fp32. torch's is in bf16, which most CPUs have to emulate: a
    product of 144 x 576 matrices takes 13.5 ms in place of 1.7 on an AMD EPYC without it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            mu, lr = group["momentum"], float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                m = state["momentum_buffer"].lerp_(p.grad, 1 - mu)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(_near_one(p.grad.lerp(m, mu)), alpha=-0.2 * max(p.shape) ** 0.5 * lr)
        return loss


def _near_one(g: Tensor) -> Tensor:
    """(A, B) -> (A, B): N."""
    a, b, c = _COEFFICIENTS
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm().clamp_min(_LEAST)
    for _ in range(_TIMES):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if g.shape[0] > g.shape[1] else x


def muon_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.95
) -> list[Optimizer]:
    """Muon, torch's or on a CPU ``MuonFP32``, over ``hidden_matrices``, and torch's AdamW (``betas``) over what ``decay_groups``
    has besides, with the same ``lr``, which a schedule sets in both, and decay. State of a matrix:
    ``momentum_buffer``, a number an element. Raises ValueError for a model that has no such matrix."""
    matrices = hidden_matrices(model)
    if not matrices:
        raise ValueError(
            "Muon is for the matrices of blocks in an nn.ModuleList, and the model has none; give torch.optim.Muon those that "
            "you choose, or use AdamW"
        )
    hidden = {id(p) for p in matrices}
    rest = [g | {"params": [p for p in g["params"] if id(p) not in hidden]} for g in decay_groups(model, weight_decay)]
    muon = MuonFP32 if matrices[0].device.type == "cpu" else torch.optim.Muon
    return [
        muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True),
    ]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained 2-D parameters inside an nn.ModuleList, each once; no embedding, nor what is tied to one. A head is outside."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()} - embeddings
    return [p for p in model.parameters() if id(p) in inside and p.requires_grad and p.ndim == 2]


def check_muon(recipe: str, algorithm: str, optimizers: Sequence[Optimizer]) -> None:
    """Raises ValueError where a recipe that is defined with Muon meets none; another's than torch's is known by its name."""
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    if kinds and not any("muon" in kind.lower() for kind in kinds):
        raise ValueError(
            f"recipe {recipe!r} is defined with Muon, and {' and '.join(kinds)} is another optimizer; give join "
            f'dtrain.optim.muon_adamw(model, lr=..., weight_decay=...), or use recipe = "{algorithm}"'
        )

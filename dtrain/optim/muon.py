"""How does an island train by itself with Muon? It steps the matrices inside the blocks, and AdamW all else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) as torch.optim.Muon has it, of a matrix W of A rows and B columns:
    M <- mu M + (1 - mu) G;   O = N((1 - mu) G + mu M);   W <- (1 - lr decay) W - 0.2 sqrt(max(A, B)) lr O
N, five Newton-Schulz steps in bf16, brings all singular values near 1: |O|_F^2 is about min(A, B), and an element of W moves by
about 0.2 lr in root mean square, whatever A and B. So far AdamW moves it (Liu et al. 2025, arXiv 2502.16982), where gradients are
noise sqrt((1 - b1) / (1 + b1)) lr: one lr serves both. A CPU that has no bf16 of its own takes many times longer for N."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.optim.adam import decay_groups


def muon_adamw(
    model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.95
) -> list[Optimizer]:
    """torch's Muon over ``hidden_matrices`` and torch's AdamW (``betas``) over what ``decay_groups`` has besides, with the same
    ``lr``, which a schedule sets in both, and decay. State of a matrix: ``momentum_buffer``, one number an element. Raises
    ValueError for a model that has no such matrix."""
    matrices = hidden_matrices(model)
    if not matrices:
        raise ValueError(
            "Muon is for the matrices of blocks in an nn.ModuleList, and the model has none; give torch.optim.Muon those that "
            "you choose, or use AdamW"
        )
    hidden = {id(p) for p in matrices}
    rest = [g | {"params": [p for p in g["params"] if id(p) not in hidden]} for g in decay_groups(model, weight_decay)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"),
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

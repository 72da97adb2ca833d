"""What is lost where models that were never in sync are averaged, and how does it come back? Their variance, tensor by tensor.

The mean of N uncorrelated tensors has 1 / N of their variance, and a model of such tensors is none. Variance-corrected averaging
(arXiv 2404.04616), for each tensor l of two or more dimensions, with its mean over islands lbar:
    s = sqrt((mean_i Var l_i + eps) / (Var lbar + eps));    l <- mean lbar + s (lbar - mean lbar),    eps = 1e-6.
Biases and gains stay at lbar. eps stands above the line too, so that equal models stay as they are (s = 1), however small their
weights; for correlated ones s is close to 1. It is for un-synced starts and partitions that heal, and not for rounds: there it
would bring back the noise that averaging takes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6


def moments(parameters: Sequence[Tensor]) -> Tensor:
    """(tensors that are corrected, 2) in float64 on the CPU: the variance and the mean of each."""
    found = [torch.stack(torch.var_mean(p.detach().double(), correction=0)) for p in _matrices(parameters)]
    return torch.stack(found).cpu() if found else torch.zeros(0, 2, dtype=torch.float64)


@torch.no_grad()
def correct(parameters: Sequence[Tensor], variances: Tensor, averaged: Tensor) -> None:
    """Give averaged parameters back their variance. ``variances``: the islands' mean of each tensor's; ``averaged``: the
    average's own ``moments``; the same bits on every island."""
    for p, variance, (left, center) in zip(_matrices(parameters), variances.tolist(), averaged.tolist(), strict=True):
        scale = ((variance + EPS) / (left + EPS)) ** 0.5
        p.copy_((p - center) * scale + center)


def _matrices(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.ndim >= 2]

"""How sure may one be of a prediction? What islands disagree about says so for nothing: their models are samples around the mean.

Decentralized SGD acts as a descent on the loss averaged over N(mean, Xi), Xi = 1/m sum_j (theta_j - mean)(theta_j - mean)' (Zhu
et al. 2023, arXiv 2306.02913), so its islands are an ensemble that was trained anyway:
    p = 1/m sum_j softmax_j;    spread = 1/m sum_j |softmax_j - p|^2, summed over the vocabulary;
    calibration error = sum_b |B_b| / N | share right in B_b - mean confidence in B_b |, bins of the confidence max p (Guo et al.
    2017, arXiv 1706.04599, equation 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

BINS = 15
TOKENS = 1024
"""Whose probabilities of all models are held at once."""


class Predicted(NamedTuple):
    """One model's or ensemble's predictions of all held-out tokens."""

    loss: float
    """Nats a token."""
    calibration_error: float
    """Between 0 and 1."""
    accuracy: float
    """Share of tokens whose most probable prediction was right."""
    spread: float
    """Predictive variance between the models, a token; 0 for one."""


class _Counts:
    """Sums over tokens, in float64."""

    def __init__(self) -> None:
        self.nats = self.spread = self.tokens = 0.0
        self.bins = torch.zeros(2, BINS, dtype=torch.float64)
        """Tokens that were right, and confidence, by bin."""

    def add(self, p: Tensor, target: Tensor, nats: float, spread: float) -> None:
        confidence, best = p.max(dim=-1)
        # The bins are (0, 1/15], (1/15, 2/15] ... as in the paper.
        index = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        right = (best == target).double()
        for row, values in enumerate((right, confidence.double())):
            self.bins[row].index_add_(0, index, values)
        self.nats += nats
        self.spread += spread
        self.tokens += len(target)

    def result(self) -> Predicted:
        right, confidence = self.bins
        gaps = (right - confidence).abs()  # |B_b| times the gap of the means
        n = self.tokens
        return Predicted(self.nats / n, gaps.sum().item() / n, right.sum().item() / n, self.spread / n)


@torch.no_grad()
def predict(models: Sequence[nn.Module], sequences: tuple[Tensor, Tensor], *, batch: int = 16) -> list[Predicted]:
    """Each model alone, and last the ensemble of all, over (inputs, targets), int64 (N, T) each. Leaves models in eval mode."""
    inputs, targets = sequences
    counts = [_Counts() for _ in range(len(models) + 1)]
    for model in models:
        model.eval()
    for x, y in zip(inputs.split(batch), targets.split(batch), strict=True):
        logits = [model(x.to(next(model.parameters()).device)).flatten(0, 1) for model in models]
        for start in range(0, y.numel(), TOKENS):
            part = slice(start, start + TOKENS)
            target = y.flatten()[part]
            # Logarithms throughout: fp32 has no probability below 1e-45, and 120 nats are a number.
            logs = torch.stack([of_one[part].float().log_softmax(dim=-1).cpu() for of_one in logits])  # (m, tokens, V)
            of_target = logs[:, torch.arange(len(target)), target].double()  # (m, tokens)
            each = logs.exp()
            for count, p, log in zip(counts, each, of_target, strict=False):
                count.add(p, target, -log.sum().item(), 0.0)
            mean = each.mean(dim=0)
            nats = len(target) * math.log(len(models)) - of_target.logsumexp(dim=0).sum().item()
            counts[-1].add(mean, target, nats, (each - mean).square().sum(dim=-1).mean(dim=0).sum().item())
    return [count.result() for count in counts]


def covariance_diagonal(sums: Tensor, squares: Tensor, num_models: int) -> Tensor:
    """diag Xi from sum_j theta_j and sum_j theta_j^2 (two reductions), float64."""
    mean = sums / num_models
    return (squares / num_models - mean.square()).clamp(min=0.0)

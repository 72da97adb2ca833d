"""How good is a model? Its mean loss over fixed held-out sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_TOKENS = 8192
"""In one forward pass: their logits and these' logarithms take 8 bytes each and a word of the vocabulary, 3.3 GB with 50,257."""


@torch.no_grad()
def evaluate(model: nn.Module, sequences: tuple[Tensor, Tensor], *, batch: int = 64) -> float:
    """Mean loss in nats a token over (inputs, targets), (N, T) each; every module's train/eval mode is as it was
    afterwards."""
    device = next(model.parameters()).device
    inputs, targets = (x.to(device) for x in sequences)
    return nats_of_share(model, (inputs, targets), rank=0, num_ranks=1, batch=batch) / targets.numel()


@torch.no_grad()
def nats_of_share(model: nn.Module, sequences: tuple[Tensor, Tensor], *, rank: int, num_ranks: int, batch: int = 64) -> float:
    """A rank's part of the sum of all losses, of a model that its ranks have alike, or gather together: batch k is computed by
    rank k mod num_ranks, and where some have none left, they compute one that does not count."""
    parts = list(batches_of(sequences, batch))
    total_nats = 0.0  # a Python float: fp32 would lose the small differences between runs
    with _evaluating(model):
        for first in range(0, len(parts), num_ranks):
            at = first + rank
            inputs, targets = parts[min(at, len(parts) - 1)]
            found = nats(model(inputs), targets)
            total_nats += found if at < len(parts) else 0.0
    return total_nats


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module's train/eval mode is as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batches_of(sequences: tuple[Tensor, Tensor], batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """(batch, T) each, or fewer of sequences so long that ``MOST_TOKENS`` are in fewer; the last may be smaller. Raises
    ValueError where there are none."""
    inputs, targets = sequences
    if inputs.shape[0] < 1 or batch < 1:
        raise ValueError(f"cannot evaluate {inputs.shape[0]} sequences in batches of {batch}; use 1 or more of each")
    batch = min(batch, max(1, MOST_TOKENS // inputs.shape[1]))
    yield from zip(inputs.split(batch), targets.split(batch), strict=True)


def nats(logits: Tensor, targets: Tensor) -> float:
    """The sum of the losses of (batch, T) targets, given (batch, T, V) logits."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()

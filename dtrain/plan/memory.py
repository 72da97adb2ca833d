"""How much memory does a rank need? Weights, gradients, moments and what the recipe keeps are counted, activations estimated."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.plan.accelerators import Work
from dtrain.plan.sent import Sent

_KEPT_PER_LAYER = 17
"""Activations of width C that a layer keeps for its backward pass, where attention keeps no matrix (Korthikanti et al. 2022,
arXiv 2205.05198: 34 C bytes of two-byte numbers)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank, on what computes; on a CPU host memory is the same memory."""

    model: int
    """fp32 weights, gradients and, of AdamW, moments, or Muon's one; AccumAdamW's sum where moments accumulate, SAM's copy of the
    weights; of frozen parameters the weights alone. Of ZeRO: what is computed with, its gradients, and moments with master
    weights where these are apart."""
    kept: int
    """What the recipe holds between two steps, beside the model: State, of which a checkpoint has the same, buffers that are made
    once, the buckets' gradients. All but these are the island's: its ranks share them."""
    wires: int
    """Buffers for wires under way, shared too; where ranks share the model all that a round needs beside State, of the buckets
    that fly at once (``waves.py``), or that an exact average does."""
    activations: int
    host: int = 0
    """What the recipe holds in the host's memory instead, wires under way among it, and what ZeRO offloads."""

    @property
    def sync(self) -> int:
        return self.kept + self.wires

    @property
    def total(self) -> int:
        return self.model + self.sync + self.activations


@dataclass(frozen=True, slots=True)
class Shards:
    """Over how many of its ranks an island spreads each of these; 1: each rank has all of it."""

    weights: int = 1
    """Those that are computed with."""
    gradients: int = 1
    state: int = 1
    """The optimizer's: moments, and master weights where they are apart."""
    number_bytes: int = 4
    """Of a weight that is computed with, and of its gradient."""
    masters: bool = False
    """Whether fp32 weights are kept beside those."""
    weights_on_host: bool = False
    state_on_host: bool = False

    @property
    def in_parts(self) -> bool:
        """Whether the recipe's buckets are put together of parts."""
        return self.state > 1


WHOLE = Shards()


def memory(
    sent: Sent, work: Work, *, vocab: int, number_bytes: int, moments: bool, accumulates: bool, sam: bool, num_ranks: int,
    micro_batches: int, by_muon: int = 0, averages: bool = False, on_host: bool = False,
    shards: Shards = WHOLE, recomputes: bool = False, model_parameters: int | None = None, in_flight: int = 1,
) -> Memory:
    """``number_bytes`` of an activation: 2 where the forward pass is autocast to bf16, else 4; ``by_muon``: parameters that Muon
    steps; ``averages``: whether a third number is kept beside AdamW's two moments, as Schedule-Free's average is; ``on_host``:
    whether the recipe's state lies there; ``shards``: a rank has besides what is gathered of weights that are sharded, and the
    buckets that it owns while they are at hand; ``recomputes``: whether of a layer its input alone is kept;
    ``model_parameters``: of the whole model, where ``work``'s are those of a pipeline's stage: ranks that share one have
    all of it gathered, and its gradients, until the last micro-batch; ``in_flight``: of the ``micro_batches`` that ``work``'s
    tokens are, those whose activations are held at once."""
    tokens = work.tokens * in_flight // micro_batches
    layers = tokens * work.layers * work.width * (1 if recomputes else _KEPT_PER_LAYER) * number_bytes
    layers += tokens * work.width * _KEPT_PER_LAYER * number_bytes if recomputes else 0  # of the one that is computed again
    logits = tokens * vocab * 2 * 4  # and their gradient, in fp32
    sharded = shards.in_parts
    gradients = sent.gradient_bytes // (num_ranks if sharded else 1)
    stays, flies = (0, sent.room_bytes) if sharded else (sent.room_bytes, 0)  # such ranks make it for each round
    kept = (sent.state_bytes + stays) // num_ranks + gradients
    # Of a bucket that is averaged: itself, the mean, fp32 wires, and those that come or are made of these.
    averages_in = int(4.5 * 4 * (model_parameters or work.trained) // num_ranks * sent.averaged) if sharded else 0
    wires = int((sent.wire_bytes + flies) // num_ranks * (sent.under_way if sharded else 1))
    # Of two layers, one computed and one on its way, with their gradients; and of what is in no layer.
    gathered = (4 * 12 * work.width**2 + 2 * 2 * vocab * work.width) * number_bytes if shards.weights > 1 else 0
    if shards.weights > 1 and model_parameters is not None:
        gathered = work.parameters * (number_bytes + 4)
    at_hand = int(4 * (model_parameters or work.trained) // num_ranks * sent.at_hand) if sharded else 0
    weights = work.parameters * shards.number_bytes
    gradient = work.trained * shards.number_bytes
    state = work.trained * (8 * moments + 4 * (accumulates + sam + averages + shards.masters)) - 4 * by_muon
    held = (
        (weights // shards.weights, shards.weights_on_host), (gradient // shards.gradients, False),
        (state // shards.state, shards.state_on_host),
    )  # fmt: skip
    return Memory(
        model=sum(number for number, away in held if not away),
        kept=0 if on_host else kept,
        wires=max(averages_in, at_hand if on_host else wires + at_hand),
        activations=layers + logits + gathered,
        host=(kept + wires if on_host else 0) + sum(number for number, away in held if away),
    )

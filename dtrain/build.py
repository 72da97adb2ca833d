"""What does an island of a job train, by which rounds, and with which optimizer?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Muon, Optimizer

from dtrain.config import Job
from dtrain.data.corpus import Corpus
from dtrain.methods import RULES
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.optim import AccumAdamW, adamw, decay_groups, muon_adamw
from dtrain.recipes import Recipe, moments_of, of_section, optimizer_of, with_start

_SEEDS = 2**31
"""A job's seed is below it, and islands' own lie from it to 2^32, beyond which torch's generator for the CPU looks at no bit."""
_ADAM_BYTES, _MUON_BYTES = 28, 20
"""A parameter of fp32 and its two moments, or Muon's one, are read and written, its gradient is read."""


def build_recipe(job: Job) -> Recipe:
    """The recipe of a job's run, with what it must know of it."""
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count, job.train.steps)
    return with_start(recipe, job.islands.start)


def build_model(job: Job, corpus: Corpus, island: int = 0) -> GPT:
    """The job's model with its seeded initial weights, the same on every island unless each has its own."""
    m = job.model
    model = GPT(GPTConfig(vocab=corpus.vocab, layers=m.layers, width=m.width, heads=m.heads, context=m.context))
    model.init_weights(job.job.seed if job.islands.start == "same" else _SEEDS + (1024 * job.job.seed + island) % _SEEDS)
    return model


def shapes_of(job: Job) -> dict[str, torch.Size]:
    """The job's model's parameters; how many words it knows is a guess."""
    m = job.model
    with torch.device("meta"):
        model = GPT(GPTConfig(layers=m.layers, width=m.width, heads=m.heads, context=m.context))
    return {name: p.shape for name, p in model.named_parameters()}


def build_optimizers(job: Job, recipe: Recipe, model: nn.Module) -> list[Optimizer]:
    """AdamW: torch's, or dtrain's where gossip can share its pass over the parameters, or where its moments accumulate. Or Muon
    and AdamW."""
    t = job.train
    if optimizer_of(recipe, t.optimizer, t.moments_every) == "muon":
        return muon_adamw(model, lr=t.lr, weight_decay=t.weight_decay)
    every = moments_of(recipe, t.moments_every) or 1
    if every > 1 or recipe.moments_every is not None or RULES[recipe.algorithm].fuses:
        return [AccumAdamW(decay_groups(model, t.weight_decay), lr=t.lr, every=every)]
    return [adamw(model, lr=t.lr, weight_decay=t.weight_decay)]


def moved_bytes(optimizers: Sequence[Optimizer]) -> int:
    """What their steps move through memory, at least; 0 of dtrain's own, which says it of each of its kernels."""
    return sum(
        (_MUON_BYTES if isinstance(optimizer, Muon) else _ADAM_BYTES) * p.numel()
        for optimizer in optimizers
        if not isinstance(optimizer, AccumAdamW)
        for group in optimizer.param_groups
        for p in group["params"]
    )

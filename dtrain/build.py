"""What does an island of a job train, by which rounds, and with which optimizer?"""

from __future__ import annotations

import torch
from torch import nn

from dtrain.config import Job
from dtrain.data.corpus import Corpus
from dtrain.methods import RULES
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.optim import AccumAdamW, adamw, decay_groups
from dtrain.recipes import Recipe, moments_of, of_section, with_start

_SEEDS = 2**31
"""A job's seed is below it, and islands' own lie from it to 2^32, beyond which torch's generator for the CPU looks at no bit."""


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


def build_optimizer(job: Job, recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW: torch's, or dtrain's where gossip can share its pass over the parameters, or where its moments accumulate. SGD where
    the recipe makes signs of gradients: without momentum its weight decay is decoupled, as AdamW's is."""
    t = job.train
    if RULES[recipe.algorithm].signs:
        return torch.optim.SGD(decay_groups(model, t.weight_decay), lr=t.lr)
    every = moments_of(recipe, t.moments_every) or 1
    if every > 1 or recipe.moments_every is not None or RULES[recipe.algorithm].fuses:
        return AccumAdamW(decay_groups(model, t.weight_decay), lr=t.lr, every=every)
    return adamw(model, lr=t.lr, weight_decay=t.weight_decay)

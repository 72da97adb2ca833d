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
from dtrain.optim import AccumAdamW, ScheduleFreeAdamW, adamw, decay_groups, muon_adamw
from dtrain.optim.muon import MuonFP32
from dtrain.own_model import build_own, own_shapes
from dtrain.recipes import Recipe, moments_of, of_section, optimizer_of, with_speeds, with_start

_SEEDS = 2**31
"""A job's seed is below it, and islands' own lie from it to 2^32, beyond which torch's generator for the CPU looks at no bit."""
_STEP_BYTES = {AccumAdamW: 0, torch.optim.AdamW: 28, ScheduleFreeAdamW: 36, Muon: 20, MuonFP32: 20, torch.optim.SGD: 12}
"""A parameter of fp32 and its two moments, Schedule-Free's three numbers, Muon's one, or SGD's none, are read and written, its
gradient is read; dtrain's own says it of each of its kernels."""


def build_recipe(job: Job) -> Recipe:
    """The recipe of a job's run, with what it must know of it."""
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count, job.train.steps)
    return with_speeds(with_start(recipe, job.islands.start), job.islands.speeds, job.islands.count)


def build_model(job: Job, corpus: Corpus, island: int = 0) -> nn.Module:
    """The job's model with its seeded initial weights, the same on every island unless each has its own. Raises ValueError where
    it is somebody's own, and none."""
    seed = job.job.seed if job.islands.start == "same" else _SEEDS + (1024 * job.job.seed + island) % _SEEDS
    if job.model.theirs:
        return build_own(job.model, corpus.vocab, seed)
    return _gpt(job, corpus.vocab, seed)


def model_of_shapes(job: Job, vocab: int) -> nn.Module:
    """The job's model on torch's meta device. Raises ValueError for one of somebody's own that cannot be made there."""
    try:
        with torch.device("meta"):
            return own_shapes(job.model, vocab) if job.model.theirs else _gpt(job, vocab, job.job.seed)
    except (NotImplementedError, RuntimeError) as e:
        raise ValueError(
            f"model.{job.model.theirs} cannot be made on torch's meta device, where tensors have shapes and no values: "
            f"{str(e).splitlines()[0]}; let it read no tensor's values while it is made"
        ) from e


def _gpt(job: Job, vocab: int, seed: int) -> GPT:
    m = job.model
    model = GPT(GPTConfig(vocab=vocab, layers=m.layers, width=m.width, heads=m.heads, context=m.context))
    model.init_weights(seed)
    return model


def build_optimizers(job: Job, recipe: Recipe, model: nn.Module) -> list[Optimizer]:
    """AdamW: torch's, or dtrain's where gossip can share its pass over the parameters, or where its moments accumulate. Or Muon
    and AdamW, or Schedule-Free AdamW. Or SGD where the recipe makes signs of gradients: without momentum its weight decay is
    decoupled, as AdamW's is."""
    t = job.train
    match optimizer_of(recipe, t.optimizer, t.moments_every):
        case "muon":
            return muon_adamw(model, lr=t.lr, weight_decay=t.weight_decay)
        case "schedule_free":
            return [ScheduleFreeAdamW(decay_groups(model, t.weight_decay), lr=t.lr)]
        case "sgd":
            return [torch.optim.SGD(decay_groups(model, t.weight_decay), lr=t.lr)]
        case "adamw":
            pass
    every = moments_of(recipe, t.moments_every) or 1
    if every > 1 or recipe.moments_every is not None or any(RULES[level.algorithm].fuses for level in recipe.levels):
        return [AccumAdamW(decay_groups(model, t.weight_decay), lr=t.lr, every=every)]
    return [adamw(model, lr=t.lr, weight_decay=t.weight_decay)]


def moved_bytes(optimizers: Sequence[Optimizer]) -> int:
    """What their steps move through memory, at least; 0 of dtrain's own."""
    return sum(
        _STEP_BYTES[type(optimizer)] * p.numel()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )

"""What does a job train, said again as a plain loop? And how is a tiny run made and read?"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain import metrics
from dtrain.build import build_model
from dtrain.config import Job, parse_job
from dtrain.data.corpus import Corpus
from dtrain.data.sampler import heldout_sequences, sample_batch
from dtrain.evaluate import evaluate
from dtrain.metrics import Part, read_part
from dtrain.models.gpt import GPT
from dtrain.optim.adam import adamw, cosine_lr, set_lr
from dtrain.optim.muon import MuonFP32
from dtrain.sim import simulate

DIGEST_BYTES, PROMISE_BYTES, NOTE_BYTES = 32, 4 * 8, 2 * 8  # sha256; recipe, model, ranks, seed; distance and step


def write_texts(folder: Path) -> Path:
    """Nine files, each over letters of its own, so that an island's files can be told from another's; the ninth is held out."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for k in range(9):
        letters = generator.integers(20 * k, 20 * k + 30, 600).astype(np.uint8)
        (folder / f"{k}.txt").write_bytes(letters.tobytes())
    return folder


def job_of(source: Path, *changes: str) -> Job:
    """Six steps of a model of 11 thousand parameters on two islands that never talk."""
    base = (
        "islands.threads=1 model.layers=1 model.width=16 model.heads=2 model.context=16 train.steps=6 train.batch=4 "
        'train.lr=0.01 train.warmup=2 train.eval_every=0 train.checkpoint_every=0 sync.recipe="local"'
    )
    last = {change.partition("=")[0]: change for change in (*base.split(), f'data.source="{source}"', *changes)}
    return parse_job({}, tuple(last.values()))


def train(job: Job, run: Path, *, resume_step: int = 0) -> Path:
    for island in range(job.islands.count):
        (run / "logs" / f"island{island}").mkdir(parents=True)
    simulate(job, run, resume_step=resume_step)
    return run


def lines_of(run: Path, island: int) -> list[dict[str, Any]]:
    return [line for line in metrics.read(run / "metrics.jsonl") if line["island"] == island]


def part_of(run: Path, island: int) -> Part:
    return read_part(run / "logs" / f"island{island}")


def weights_of(run: Path, island: int) -> dict[str, Tensor]:
    """An island's own model at the end, before the merge."""
    return load_file(run / "islands" / f"island{island}.safetensors")


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@dataclass(frozen=True)
class ByHand:
    losses: list[float]
    norms: list[float]
    """Of the gradients, before they are clipped."""
    evals: list[float]
    """On the held-out text, after each step."""
    weights: dict[str, Tensor]


def by_hand(job: Job, corpus: Corpus, island: int, *, evaluated: bool = False) -> ByHand:
    """The run of one island on its own: gradients of each micro-batch apart, their mean, clipped, an update."""
    model = build_model(job, corpus, island)
    parameters = list(model.parameters())
    optimizers: list[torch.optim.Optimizer] = [adamw(model, lr=job.train.lr, weight_decay=job.train.weight_decay)]
    if job.train.optimizer == "muon":
        assert isinstance(model, GPT)
        optimizers = muon(model, job)
    heldout = heldout_sequences(corpus, job.model.context)
    losses, norms, evals = [], [], []
    for step in range(job.train.steps):
        loss, gradients = mean_gradient(job, model, corpus, island, step)
        losses.append(loss)
        if job.train.sam_rho:  # the same batch again, so far up the gradient that it has here
            of = dict(zip(parameters, gradients, strict=True))  # a sum in the optimizer's order, for the same bits
            norm = torch.nn.utils.get_total_norm([of[p] for o in optimizers for group in o.param_groups for p in group["params"]])
            there = copy.deepcopy(model)
            with torch.no_grad():
                for parameter, gradient in zip(there.parameters(), gradients, strict=True):
                    parameter.copy_(parameter + gradient * (job.train.sam_rho / norm))
            _, gradients = mean_gradient(job, there, corpus, island, step)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, job.train.clip or math.inf)))
        for optimizer in optimizers:
            set_lr(optimizer, cosine_lr(step, steps=job.train.steps, warmup=job.train.warmup, peak=job.train.lr))
            optimizer.step()
        evals += [evaluate(model, heldout)] if evaluated else []
    return ByHand(losses, norms, evals, {name: value.clone() for name, value in model.state_dict().items()})


def muon(model: GPT, job: Job) -> list[torch.optim.Optimizer]:
    """Blocks by Muon; embedding and head by AdamW, which decays the head alone."""
    lr, decay = job.train.lr, job.train.weight_decay
    blocks = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
    rest = [{"params": [model.head.weight], "weight_decay": decay}, {"params": [model.embedding.weight], "weight_decay": 0.0}]
    return [
        MuonFP32(blocks, lr=lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), fused=True),
    ]


def mean_gradient(job: Job, model: nn.Module, corpus: Corpus, island: int, step: int) -> tuple[float, list[Tensor]]:
    """Of a step's micro-batches, with their mean loss."""
    parts = [micro_loss(job, model, corpus, island, step, micro) for micro in range(job.train.accumulate)]
    each = [torch.autograd.grad(part, list(model.parameters())) for part in parts]
    means = [torch.as_tensor(sum(gradients) / len(gradients)) for gradients in zip(*each, strict=True)]
    return sum(float(part.detach()) for part in parts) / len(parts), means


def micro_loss(job: Job, model: nn.Module, corpus: Corpus, island: int, step: int, micro: int) -> Tensor:
    inputs, targets = micro_batch(job, corpus, island, step, micro)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.train.precision == "bf16"):
        logits = model(inputs)
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def micro_batch(job: Job, corpus: Corpus, island: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
    return sample_batch(
        corpus,
        seed=job.job.seed,
        island=island,
        num_islands=job.islands.count,
        step=step,
        first=micro * (job.train.batch // job.train.accumulate),
        batch=job.train.batch // job.train.accumulate,
        context=job.model.context,
        shard=job.islands.shard,
    )


def first_loss(job: Job, corpus: Corpus, island: int, micro: int = 0) -> float:
    return micro_loss(job, build_model(job, corpus), corpus, island, 0, micro).item()

"""What does a rank of an island on a mesh of stages and shards run in tests? One gradient and an evaluation of the engine's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain import engines
from dtrain.build import build_model
from dtrain.config import Job
from dtrain.connect import connect, settings_of
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.inside import Batches
from dtrain.island.pipelined import gather
from dtrain.shards import named_parameters
from tests.unit.by_hand import job_of

Heldout = tuple[Tensor, Tensor]
_Exact = tuple[float, Mapping[str, Tensor], float]
"""The loss, the gradient, the evaluation."""


def beside_the_whole(*, source: str, changes: list[str]) -> dict[str, float]:
    """Of the island and of the whole model on rank 0: the loss, the gradient's largest difference as a part of its largest number
    (of the tensor for which that is most), and the evaluation. Elsewhere nothing."""
    torch.set_num_threads(1)
    job = job_of(Path(source), 'islands.engine="fsdp+pipeline"', "islands.ranks=4", "islands.count=1", *changes)
    cpu = torch.device("cpu")
    connection = connect(settings=settings_of(job.link), inside=engines.ranks_of(job.islands.engine, uneven=False))
    corpus = load_corpus(job.data.source)
    whole, cut = (_perturbed(build_model(job, corpus, 0)) for _ in range(2))
    like = {name: x.to("meta") for name, x in whole.state_dict().items()}
    batches, heldout = Batches(job, corpus, connection, cpu), heldout_sequences(corpus, job.model.context)
    model = engines.trained(job, cut, connection.ranks, cpu)
    inside = engines.inside_of(job, model, like, batches, heldout, connection, nullcontext())
    loss = connection.ranks.total([inside.gradient(0)])[0]
    found = gather({name: p.grad for name, p in named_parameters(model) if p.grad is not None}, like, cpu)
    evaluated, weights = inside.evaluate(), inside.weights()
    if connection.ranks.rank:
        return {}
    exact, wanted, exact_evaluated = (_in_bf16 if job.train.precision == "bf16" else _at_once)(job, whole, batches, heldout)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(weights[name], x) for name, x in whole.state_dict().items())
    return {
        "loss": loss, "exact_loss": exact, "evaluated": evaluated, "exact_evaluated": exact_evaluated,
        "furthest": max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in wanted.items()),
    }  # fmt: skip


def _at_once(job: Job, whole: nn.Module, batches: Batches, heldout: Heldout) -> _Exact:
    """The whole batch."""
    inputs, targets = batches.part(0, 0, size=job.train.batch)
    loss = cross_entropy(whole(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}, evaluate(whole, heldout)


def _in_bf16(job: Job, whole: nn.Module, batches: Batches, heldout: Heldout) -> _Exact:
    """Each micro-batch by a copy in bf16, tables too, which FSDP casts as a block's inputs; gradients are added up in fp32."""
    half, parts = copy.deepcopy(whole).bfloat16(), 2 * job.train.accumulate
    loss, gradients = 0.0, {name: torch.zeros(p.shape) for name, p in whole.named_parameters()}
    for part in range(parts):
        half.zero_grad()
        inputs, targets = batches.part(0, part, size=job.train.batch // parts)
        # As large as a rank's loss, of which the mean over two shards is taken in fp32.
        own = cross_entropy(half(inputs).flatten(0, 1), targets.flatten()) / job.train.accumulate
        own.backward()
        loss += float(own.detach()) / 2
        for name, p in half.named_parameters():
            assert p.grad is not None
            gradients[name] += p.grad.float() / 2
    return loss, gradients, evaluate(half, heldout)


@torch.no_grad()
def _perturbed(model: nn.Module) -> nn.Module:
    """A model whose every gradient is there, as at its start they are not."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    return model

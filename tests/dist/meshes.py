"""What does a rank of an island on a mesh of stages and shards run in tests? One gradient and an evaluation of the engine's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain import engines
from dtrain.build import build_model
from dtrain.connect import connect, settings_of
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.inside import Batches
from dtrain.island.pipelined import gather
from dtrain.shards import named_parameters
from tests.unit.by_hand import job_of


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
    inputs, targets = batches.part(0, 0, size=job.train.batch)
    exact = cross_entropy(whole(inputs).flatten(0, 1), targets.flatten())
    exact.backward()
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(weights[name], x) for name, x in whole.state_dict().items())
    return {
        "loss": loss, "exact_loss": float(exact.detach()), "evaluated": evaluated, "exact_evaluated": evaluate(whole, heldout),
        "furthest": max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in wanted.items()),
    }  # fmt: skip


@torch.no_grad()
def _perturbed(model: nn.Module) -> nn.Module:
    """A model whose every gradient is there, as at its start they are not."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    return model

"""What runs inside an island, and makes a gradient of its batch? One model, or DDP's replicas of it; ``inside_stages.py`` has
stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dtrain.config import Job
from dtrain.connect import Connection
from dtrain.data.corpus import Corpus
from dtrain.data.sampler import inputs_and_targets, noise_seed, sample_batch
from dtrain.data.stream import Dealt
from dtrain.evaluate import nats_of_share
from dtrain.models.gpt import num_parameters
from dtrain.shards import named_buffers
from dtrain.spans import span


class Inside(Protocol):
    """An island's ranks call each method together."""

    @property
    def parameters(self) -> int:
        """Elements of the whole model."""
        ...

    def gradient(self, step: int) -> float:
        """Add the gradient of a step's batch to every ``grad``; returns this rank's part of the island's mean loss, in nats a
        token: the sum over the ranks is it."""
        ...

    def evaluate(self) -> float:
        """The island's own model on the held-out sequences, in nats a token; rank 0 learns it, the others need not."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The whole model's on rank 0; the others need not have it."""
        ...


class Batches:
    """Micro-batches of one island, on a rank's device."""

    def __init__(self, job: Job, corpus: Corpus, connection: Connection, device: torch.device) -> None:
        self._job, self._corpus, self._device = job, corpus, device
        self._node, self._num_nodes = connection.node, connection.num_nodes
        self._dealt = None if corpus.stream is None else Dealt(corpus.stream, self._node, self._num_nodes)

    def part(self, step: int, number: int, *, size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (size, context) each, of the step's parts of this size the one of this number."""
        job = self._job
        with span("data"):
            if self._dealt is not None:
                first = step * job.train.batch
                at = first + number * size
                inputs, targets = inputs_and_targets(self._dealt.windows(at, size, job.model.context, step_first=first))
                return inputs.to(self._device), targets.to(self._device)
            inputs, targets = sample_batch(
                self._corpus,
                seed=job.job.seed,
                island=self._node,
                num_islands=self._num_nodes,
                step=step,
                first=number * size,
                batch=size,
                context=job.model.context,
                shard=job.islands.shard,
            )
            return inputs.to(self._device), targets.to(self._device)

    def noise_seed(self, step: int, micro: int, *, rank: int) -> int:
        return noise_seed(seed=self._job.job.seed, island=self._node, rank=rank, step=step, micro=micro)


class Whole:
    """Every rank has the model and computes its share of the batch; DDP adds the gradients up where there are several."""

    def __init__(
        self, job: Job, model: nn.Module, batches: Batches, heldout: tuple[Tensor, Tensor], connection: Connection,
        computing: AbstractContextManager[object],
    ) -> None:  # fmt: skip
        self._job, self._model, self._batches, self._heldout = job, model, batches, heldout
        self._ranks, self._computing = connection.ranks, computing
        self._trained: nn.Module = DistributedDataParallel(model) if self._ranks.num_ranks > 1 else model
        self._device = heldout[0].device
        self._draws = bool(job.model.theirs)  # gpt has no dropout
        self._buffers = [b for _, b in named_buffers(model)]

    @property
    def parameters(self) -> int:
        return num_parameters(self._model)

    def gradient(self, step: int) -> float:
        train, ranks = self._job.train, self._ranks
        size = train.batch // (ranks.num_ranks * train.accumulate)
        losses = list[Tensor]()
        for micro in range(train.accumulate):
            inputs, targets = self._batches.part(step, ranks.rank * train.accumulate + micro, size=size)
            if isinstance(self._trained, DistributedDataParallel):
                self._trained.require_backward_grad_sync = micro == train.accumulate - 1
            with self._computing, span("forward_backward"):
                if self._draws:
                    torch.manual_seed(self._batches.noise_seed(step, micro, rank=ranks.rank))
                with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16"):
                    loss = mean_loss(self._trained(inputs), targets, train.accumulate)
                loss.backward()
                losses.append(loss.detach())
        return added(losses) / ranks.num_ranks

    def evaluate(self) -> float:
        ranks = self._ranks
        ranks.share(self._buffers)  # rank 0's, as DDP has them, those that no checkpoint keeps too
        with self._computing:
            share = nats_of_share(self._model, self._heldout, rank=ranks.rank, num_ranks=ranks.num_ranks)
        return ranks.total([share])[0] / self._heldout[1].numel()

    def weights(self) -> Mapping[str, Tensor]:
        return self._model.state_dict()


def added(losses: Sequence[Tensor], divided_by: int = 1) -> float:
    """Once all micro-batches are queued: a number that is asked for sooner has a GPU idle until the next is. One by one, in turn:
    ``sum`` rounds in another way since Python 3.12."""
    total = 0.0
    for loss in losses:
        total += float(loss) / divided_by
    return total


def mean_loss(logits: Tensor, targets: Tensor, micro_batches: int) -> Tensor:
    """A micro-batch's share of the batch's mean loss."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / micro_batches

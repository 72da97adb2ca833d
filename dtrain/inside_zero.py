"""What runs inside an island whose ranks share the model as DeepSpeed's ZeRO has it? Each computes its share of the batch;
DeepSpeed averages gradients, clips and steps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain import checkpoint
from dtrain.buffers import persistent_buffers
from dtrain.config import Job
from dtrain.connect import Connection
from dtrain.engine import Sync
from dtrain.errors import NonFinite
from dtrain.evaluate import nats_of_share
from dtrain.inside import Batches, added, mean_loss
from dtrain.island.zero import Zero
from dtrain.optim import set_lr
from dtrain.spans import span


class ZeroInside:
    """An ``Inside``; in stage 3 modules are gathered by all ranks together, so each of them computes as often as the others."""

    def __init__(
        self, job: Job, model: Zero, batches: Batches, heldout: tuple[Tensor, Tensor], connection: Connection
    ) -> None:
        self._job, self._model, self._batches, self._heldout = job, model, batches, heldout
        self._ranks = connection.ranks
        self._draws = bool(job.model.theirs)  # gpt has no dropout
        self._buffers = persistent_buffers(model)
        self.parameters = model.num_elements

    def gradient(self, step: int) -> float:
        train, ranks, model = self._job.train, self._ranks, self._model
        size = train.batch // (ranks.num_ranks * train.accumulate)
        losses = list[Tensor]()
        ranks.share(self._buffers)  # rank 0's, as DDP has them
        for micro in range(train.accumulate):
            inputs, targets = self._batches.part(step, ranks.rank * train.accumulate + micro, size=size)
            with span("forward_backward"):
                if self._draws:
                    torch.manual_seed(self._batches.noise_seed(step, micro, rank=ranks.rank))
                loss = mean_loss(model(inputs), targets, 1)
                model.engine.backward(loss)  # which divides by the number of micro-batches
                if micro < train.accumulate - 1:
                    model.step()
                losses.append(loss.detach())
        return added(losses, train.accumulate) / ranks.num_ranks

    def evaluate(self) -> float:
        self._ranks.share(self._buffers)
        share = nats_of_share(self._model, self._heldout, rank=self._ranks.rank, num_ranks=self._ranks.num_ranks)
        return self._ranks.total([share])[0] / self._heldout[1].numel()

    def weights(self) -> Mapping[str, Tensor]:
        """The master weights, and what has none."""
        return {name: x.cpu() for name, x in self._model.whole() if self._ranks.rank == 0}


class ZeroUpdates:
    """``Updates`` by DeepSpeed's own step. It calls the optimizer in it once a group of parameters, so that no hook would fit."""

    def __init__(self, model: Zero) -> None:
        self._model = model
        self.optimizers: list[Optimizer] = []

    def set_lr(self, lr: float) -> None:
        set_lr(self._model.optimizer, lr)

    def clear(self) -> None:
        """DeepSpeed's step has."""

    def step(self, sync: Sync) -> None:
        sync.before_update()
        if not self._model.step():
            raise NonFinite(f"step {sync.step + 1}: DeepSpeed found a gradient that is not finite; lower train.lr")
        sync.after_update()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        with self._model.grouped() as optimizer:
            return checkpoint.optimizers_tensors([optimizer], prefix)

    def load(self, saved: Mapping[str, Tensor], prefix: str) -> None:
        with self._model.grouped() as optimizer:
            checkpoint.load_optimizers([optimizer], saved, prefix)

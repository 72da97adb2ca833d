"""What runs inside an island whose ranks share one model? A pipeline: all of the batch passes through each rank's stage."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.config import Job
from dtrain.connect import Connection
from dtrain.evaluate import batches_of, nats
from dtrain.inside import Batches, mean_loss
from dtrain.island.pipelined import Pipeline, gather
from dtrain.models.gpt_stage import GPTStage
from dtrain.spans import span


class Staged:
    """An ``Inside``: what the ranks do together is the whole model's."""

    def __init__(
        self, job: Job, part: GPTStage, whole: Mapping[str, Tensor], batches: Batches, heldout: tuple[Tensor, Tensor],
        connection: Connection,
    ) -> None:  # fmt: skip
        """``whole``: the names, shapes and dtypes of the whole model's state."""
        self._part, self._whole, self._batches, self._heldout = part, whole, batches, heldout
        self._ranks, self._device = connection.ranks, heldout[0].device
        self._micro_batches, self._size = job.train.accumulate, job.train.batch // job.train.accumulate
        self._pipeline = Pipeline(
            part,
            self._device,
            loss=lambda logits, targets: mean_loss(logits, targets, job.train.accumulate),
            micro_batches=self._micro_batches,
            inner=(self._size, job.model.context, job.model.width),
            bf16=job.train.precision == "bf16",
        )

    @property
    def parameters(self) -> int:
        return sum(x.numel() for x in self._whole.values())

    def gradient(self, step: int) -> float:
        inputs = targets = None
        if self._part.is_first or self._part.is_last:
            micros = [self._batches.part(step, micro, size=self._size) for micro in range(self._micro_batches)]
            inputs, targets = (torch.cat(parts) for parts in zip(*micros, strict=True))
        total = 0.0
        with span("forward_backward"):
            for loss in self._pipeline.gradient(inputs, targets):
                total += loss  # one by one, as they are added up without stages: sum() rounds in another way
        return total

    def evaluate(self) -> float:
        total_nats = 0.0
        for inputs, targets in batches_of(self._heldout):
            logits = self._pipeline.forward(inputs)
            total_nats += 0.0 if logits is None else nats(logits, targets)
        return self._ranks.total([total_nats])[0] / self._heldout[1].numel()

    def weights(self) -> Mapping[str, Tensor]:
        return gather(self._part.state_dict(), self._whole, self._device)

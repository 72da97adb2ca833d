"""What runs inside an island whose ranks share one model? A pipeline: all of the batch passes through each rank's stages, or, of
ranks that share a stage's parameters, through each the same part of it as through its like on other stages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.config import Job
from dtrain.connect import Connection
from dtrain.evaluate import batches_of, nats
from dtrain.inside import Batches, mean_loss
from dtrain.island.pipelined import Pipeline, gather
from dtrain.island.stages import StagesOfRank
from dtrain.spans import span


class Staged:
    """An ``Inside``: what the ranks do together is the whole model's."""

    def __init__(
        self, job: Job, part: StagesOfRank, whole: Mapping[str, Tensor], batches: Batches, heldout: tuple[Tensor, Tensor],
        connection: Connection,
    ) -> None:  # fmt: skip
        """``whole``: the names, shapes and dtypes of the whole model's state."""
        self._part, self._whole, self._batches, self._heldout = part, whole, batches, heldout
        self._ranks, self._device = connection.ranks, heldout[0].device
        self._shards = job.islands.shards_of_stage
        self._shard = self._ranks.rank % self._shards
        self._micro_batches = job.train.accumulate
        self._size = job.train.batch // (self._shards * self._micro_batches)
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
        if self._pipeline.is_first or self._pipeline.is_last:
            first = self._shard * self._micro_batches
            micros = [self._batches.part(step, first + micro, size=self._size) for micro in range(self._micro_batches)]
            inputs, targets = (torch.cat(parts) for parts in zip(*micros, strict=True))
        total = 0.0
        with span("forward_backward"):
            for loss in self._pipeline.gradient(inputs, targets):
                total += loss  # one by one, as they are added up without stages: sum() rounds in another way
        return total / self._shards

    def evaluate(self) -> float:
        """Of ranks that share a stage each has a batch in turn, and where some have none left, one that does not count."""
        total_nats, parts = 0.0, list(batches_of(self._heldout))
        for at in range(self._shard, self._shard + len(parts), self._shards):
            inputs, targets = parts[min(at, len(parts) - 1)]
            logits = self._pipeline.forward(inputs)
            total_nats += 0.0 if logits is None or at >= len(parts) else nats(logits, targets)
        if self._shards > 1:
            from dtrain.island.sharded import gathered_no_more

            for stage in self._part.stages.values():
                gathered_no_more(stage)
        return self._ranks.total([total_nats])[0] / self._heldout[1].numel()

    def weights(self) -> Mapping[str, Tensor]:
        return gather(self._part.state_dict(), self._whole, self._device)

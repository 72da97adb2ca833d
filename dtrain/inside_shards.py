"""What runs inside an island whose ranks each hold a part of every parameter? FSDP2: each computes its share of the batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtrain.buffers import persistent_buffers
from dtrain.config import Job
from dtrain.connect import Connection
from dtrain.evaluate import nats_of_share
from dtrain.inside import Batches, added, mean_loss
from dtrain.island.sharded import gathered_no_more, groups_add_up
from dtrain.models.gpt import num_parameters
from dtrain.shards import whole
from dtrain.spans import span


class Sharded:
    """An ``Inside``; blocks are gathered by all ranks together, so each of them computes as often as the others."""

    def __init__(
        self, job: Job, model: nn.Module, batches: Batches, heldout: tuple[Tensor, Tensor], connection: Connection
    ) -> None:
        self._job, self._model, self._batches, self._heldout = job, model, batches, heldout
        self._ranks, self._device = connection.ranks, heldout[0].device
        self._draws = bool(job.model.theirs)  # gpt has no dropout
        self._buffers = persistent_buffers(model)

    @property
    def parameters(self) -> int:
        return num_parameters(self._model)

    def gradient(self, step: int) -> float:
        train, ranks, model = self._job.train, self._ranks, self._model
        size = train.batch // (ranks.num_ranks * train.accumulate)
        losses = list[Tensor]()
        ranks.share(self._buffers)  # rank 0's, as DDP has them
        for micro in range(train.accumulate):
            inputs, targets = self._batches.part(step, ranks.rank * train.accumulate + micro, size=size)
            groups_add_up(model, micro == train.accumulate - 1)
            with span("forward_backward"):
                if self._draws:
                    torch.manual_seed(self._batches.noise_seed(step, micro, rank=ranks.rank))
                loss = mean_loss(model(inputs), targets, train.accumulate)
                loss.backward()
                losses.append(loss.detach())
        return added(losses) / ranks.num_ranks

    def evaluate(self) -> float:
        self._ranks.share(self._buffers)
        share = nats_of_share(self._model, self._heldout, rank=self._ranks.rank, num_ranks=self._ranks.num_ranks)
        gathered_no_more(self._model)
        return self._ranks.total([share])[0] / self._heldout[1].numel()

    def weights(self) -> Mapping[str, Tensor]:
        """A tensor at a time is gathered."""
        found = dict[str, Tensor]()
        for name, x in self._model.state_dict().items():
            value = whole(x.detach())
            if self._ranks.rank == 0:
                found[name] = value.cpu()
        return found

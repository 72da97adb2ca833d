"""How do the stages of an island compute one batch? Micro-batches one behind the other: one forward, one backward (1F1B).

torch.distributed.pipelining runs the schedule (PipeDream-Flush, arXiv 2006.09503): with M micro-batches and S stages, a stage
holds activations of S micro-batches at most, beside what came in for each of the M, and idles (S - 1) / (M + S - 1) of a step.
Where each of R ranks has V stages, so that S = R V, it is the interleaved 1F1B schedule (Megatron-LM, arXiv 2104.04473): stages
are shorter, and a rank idles (R - 1) / (V M + R - 1) of a step, for V times as many sends and activations of more micro-batches.
Gradients add up in the order of micro-batches and stages exchange fp32, so that a step has the bits of one process that
accumulates M micro-batches. Stages that FSDP2 shards exchange what they compute with, bf16 or fp32, and average their gradients
over the ranks that share them behind the last micro-batch.
Shapes: B sequences a micro-batch, T tokens, C features between stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B

from dtrain.island.stages import StagesOfRank
from dtrain.shards import is_part, whole

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs of the last stage, targets) -> a scalar."""


class _Cast(nn.Module):
    """Autocast around a forward pass alone, as in a loop whose backward pass lies outside of it."""

    def __init__(self, part: nn.Module, device: torch.device, *, bf16: bool) -> None:
        super().__init__()
        self.part, self._kind, self._bf16 = part, device.type, bf16

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self._kind, dtype=torch.bfloat16, enabled=self._bf16):
            return self.part(x)


class Pipeline:
    """One rank's stages; the ranks of ``part.group``, in whose order stages follow each other, call each method together."""

    def __init__(
        self, part: StagesOfRank, device: torch.device, *, loss: Loss, micro_batches: int, inner: tuple[int, int, int], bf16: bool
    ) -> None:
        """``inner``: (B, T, C). Every micro-batch has this one shape, and its loss is added to the others as it is."""
        self._rank, self._num_ranks = dist.get_rank(part.group), dist.get_world_size(part.group)
        self._num_stages = self._num_ranks * len(part.stages)
        self.is_first, self.is_last = self._rank == 0, self._rank == self._num_ranks - 1
        self._part, self._device, self._inner = part, device, inner
        sharded = any(map(is_part, part.parameters()))  # then FSDP casts, and the schedule has to see that it does
        self._dtype = torch.bfloat16 if sharded and bf16 else torch.float32
        # Between stages lies an activation. What goes in first and comes out last is never sent, but must be named as well, or
        # torch would compute a batch more to learn of it.
        between = torch.empty(inner, dtype=self._dtype, device="meta", requires_grad=True)
        tokens = torch.empty(inner[:2], dtype=torch.int64, device="meta")
        stages = [
            PipelineStage(
                stage if sharded else _Cast(stage, device, bf16=bf16), number, self._num_stages, device,
                input_args=tokens if number == 0 else between, output_args=between, group=part.group,
            )
            for number, stage in part.stages.items()
        ]  # fmt: skip
        if len(stages) == 1:
            self._schedule = Schedule1F1B(stages[0], micro_batches, loss_fn=loss, scale_grads=False)
        else:
            self._schedule = ScheduleInterleaved1F1B([*stages], micro_batches, loss_fn=loss, scale_grads=False)

    def gradient(self, inputs: Tensor | None, targets: Tensor | None) -> list[float]:
        """Add the batch's gradient to every ``grad``. (M x B, T) each: inputs for the first stage, targets for the last, whose
        micro-batches' losses are returned there; elsewhere none are."""
        losses: list[Tensor] = []
        arguments = (inputs,) if self.is_first else ()
        self._schedule.step(*arguments, target=targets if self.is_last else None, losses=losses, return_outputs=False)
        return [float(loss.detach()) for loss in losses]

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor | None:
        """The outputs for some (N, T) tokens, whatever their number, without autocast (FSDP casts as ever); None but where the
        last stage is."""
        out, group = None, self._part.group
        for number, stage in self._part.stages.items():
            x = tokens
            if number:
                x = torch.empty((*tokens.shape, self._inner[2]), dtype=self._dtype, device=self._device)
                dist.recv(x, group=group, group_src=(self._rank - 1) % self._num_ranks)
            out = stage(x)
            if number == self._num_stages - 1:
                return out
            dist.send(out, group=group, group_dst=(self._rank + 1) % self._num_ranks)
        return None


def gather(own: Mapping[str, Tensor], like: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The whole model's tensors on rank 0, on the CPU; the others send theirs one at a time, and are given none.

    Every rank calls this. ``like`` says the names, shapes and dtypes of all tensors, in one order on all ranks; one rank's
    ``own`` has each of them, or several ranks have a part each."""
    rank, found = dist.get_rank(), dict[str, Tensor]()
    holders = _holders(own, list(like), device)
    for (name, shaped), holder in zip(like.items(), holders, strict=True):
        value = whole(own[name].detach()) if name in own else None  # gathered by those that share it
        if rank == holder == 0:
            assert value is not None
            found[name] = value.cpu()
        elif rank == holder:
            assert value is not None
            dist.send(value.contiguous(), dst=0)
        elif rank == 0:
            received = torch.empty(shaped.shape, dtype=shaped.dtype, device=device)
            dist.recv(received, src=holder)
            found[name] = received.cpu()
    return found


def _holders(own: Mapping[str, Tensor], names: list[str], device: torch.device) -> list[int]:
    """The first rank that has each, or a part of it."""
    ranks = torch.tensor([dist.get_rank() if name in own else dist.get_world_size() for name in names], device=device)
    dist.all_reduce(ranks, op=dist.ReduceOp.MIN)
    return ranks.tolist()

"""How do the stages of an island compute one batch? Micro-batches one behind the other: one forward, one backward (1F1B).

torch.distributed.pipelining runs the schedule (PipeDream-Flush, arXiv 2006.09503): with M micro-batches and S stages, a stage
holds activations of S micro-batches at most, beside what came in for each of the M, and idles (S - 1) / (M + S - 1) of a step.
Gradients add up in the order of micro-batches and stages exchange fp32, so that a step has the bits of one process that
accumulates M micro-batches.
Shapes: B sequences a micro-batch, T tokens, C features between stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

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
    """One rank's stage; the island's ranks, which are its stages in order, call each method together."""

    def __init__(
        self, part: nn.Module, device: torch.device, *, loss: Loss, micro_batches: int, inner: tuple[int, int, int], bf16: bool
    ) -> None:
        """``inner``: (B, T, C). Every micro-batch has this one shape, and its loss is added to the others as it is."""
        self.rank, self.num_stages = dist.get_rank(), dist.get_world_size()
        self.is_first, self.is_last = self.rank == 0, self.rank == self.num_stages - 1
        self._part, self._device, self._inner = part, device, inner
        # Between stages lies an activation. What goes in first and comes out last is never sent, but must be named as well, or
        # torch would compute a batch more to learn of it.
        between = torch.empty(inner, device="meta", requires_grad=True)
        tokens = torch.empty(inner[:2], dtype=torch.int64, device="meta")
        stage = PipelineStage(
            _Cast(part, device, bf16=bf16), self.rank, self.num_stages, device,
            input_args=tokens if self.is_first else between, output_args=between,
        )  # fmt: skip
        self._schedule = Schedule1F1B(stage, micro_batches, loss_fn=loss, scale_grads=False)

    def gradient(self, inputs: Tensor | None, targets: Tensor | None) -> list[float]:
        """Add the batch's gradient to every ``grad``. (M x B, T) each: inputs for the first stage, targets for the last, whose
        micro-batches' losses are returned there; elsewhere none are."""
        losses: list[Tensor] = []
        arguments = (inputs,) if self.is_first else ()
        self._schedule.step(*arguments, target=targets if self.is_last else None, losses=losses, return_outputs=False)
        return [float(loss.detach()) for loss in losses]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor | None:
        """The outputs for some (N, T) tokens, whatever their number, without autocast; None but on the last stage."""
        if not self.is_first:
            x = torch.empty((*x.shape, self._inner[2]), device=self._device)
            dist.recv(x, src=self.rank - 1)
        out = self._part(x)
        if self.is_last:
            return out
        dist.send(out, dst=self.rank + 1)
        return None


def gather(own: Mapping[str, Tensor], whole: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The whole model's tensors on rank 0, on the CPU; the others send theirs one at a time, and are given none.

    Every rank calls this. ``whole`` says the names, shapes and dtypes of all tensors, in one order on all ranks; one rank's
    ``own`` has each of them."""
    rank, found = dist.get_rank(), dict[str, Tensor]()
    holders = _holders(own, list(whole), device)
    for (name, like), holder in zip(whole.items(), holders, strict=True):
        if rank == holder == 0:
            found[name] = own[name].detach().cpu()
        elif rank == holder:
            dist.send(own[name].detach().contiguous(), dst=0)
        elif rank == 0:
            received = torch.empty(like.shape, dtype=like.dtype, device=device)
            dist.recv(received, src=holder)
            found[name] = received.cpu()
    return found


def _holders(own: Mapping[str, Tensor], names: Sequence[str], device: torch.device) -> list[int]:
    """The rank that has each."""
    ranks = torch.tensor([dist.get_rank() if name in own else 0 for name in names], device=device)
    dist.all_reduce(ranks)
    return ranks.tolist()

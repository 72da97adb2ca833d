"""How do a round's landing, the optimizer's step and the next round's encoding become one pass over the parameters?

Where a method has a fused form and one AccumAdamW owns all parameters, its step is taken over: buckets between two rounds run
the fused kernel, the others land, step and send by themselves, with the same result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.bucket import Flat
from dtrain.codec import Update
from dtrain.core import Core, Flight
from dtrain.kernels import SUM_TILE, Adam, Piece, operations
from dtrain.optim.accum_adam import AccumAdamW, owned
from dtrain.spans import span


class FusedSteps:
    """The optimizer steps of one rank, a bucket at a time."""

    def __init__(self, core: Core, optimizer: AccumAdamW, flat: Flat) -> None:
        self._core, self._optimizer = core, optimizer
        starts: dict[str, int] = {}
        at = 0
        for members in flat.order:
            for i in members:
                starts[flat.names[i]] = at
                at += flat.parameters[i].numel()
        named = dict(zip(flat.names, flat.parameters, strict=True))
        self._places = [
            [(named[s.name], s.global_offset - starts[s.name], s.numel) for s in lane.bucket.layout.spans] for lane in core.lanes
        ]
        self._parameters = flat.parameters
        self._groups = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
        inside = {id(p) for p in flat.parameters}
        self._beside = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in inside]
        device = core.lanes[0].bucket.x.device
        self._grad_scale = torch.ones(1, device=device)
        num_sums = sum(-(-p.numel() // SUM_TILE) for p in flat.parameters)
        self._sums = torch.zeros(num_sums, dtype=torch.float64, device=device)

    def clip(self, norm: float) -> None:
        """Scale this step's gradients to a global norm of at most ``norm``, in the pass that reads them for the update; the
        arithmetic of ``torch.nn.utils.clip_grad_norm_``."""
        gradients = [p.grad.view(-1) for p in self._parameters if p.grad is not None]
        if gradients:
            num_sums = sum(-(-g.numel() // SUM_TILE) for g in gradients)
            operations(gradients[0].device).sum_of_squares(gradients, self._sums[:num_sums])
            total = self._sums[:num_sums].sum().sqrt()
            self._grad_scale.copy_((norm / (total + 1e-6)).clamp_(max=1.0))

    def step(self, step: int, *, may_start: bool) -> list[Flight]:
        """Do optimizer step number ``step`` on all parameters; returns the flights of the rounds that start after it."""
        adams = self._optimizer.begin()
        flights: list[Flight] = []
        for lane, places in zip(self._core.lanes, self._places, strict=True):
            starts = may_start and self._core.starts(lane, step)
            lands = self._core.lands(lane, step)
            if starts and lane.algorithm.fused is not None and self._fuses(places, adams):
                flights.append(self._core.start_fused(lane, step, self._update(places, adams), landing=lands))
                continue
            if lane.land_step == step:
                with span("land"):
                    self._core.land(lane)
            self._step_alone(places, adams)
            if starts:
                flights.append(self._core.start(lane, step))
        self._step_alone([(p, 0, p.numel()) for p in self._beside], adams)
        return flights

    def _fuses(self, places: Sequence[tuple[nn.Parameter, int, int]], adams: Sequence[Adam]) -> bool:
        """One kernel has one set of numbers (decay apart), and an encoding covers its bucket whole."""
        return all(p.grad is not None for p, _, _ in places) and len({adams[self._groups[id(p)]] for p, _, _ in places}) == 1

    def _update(self, places: Sequence[tuple[nn.Parameter, int, int]], adams: Sequence[Adam]) -> Update:
        return Update([self._piece(*place) for place in places], adams[self._groups[id(places[0][0])]], self._grad_scale)

    def _step_alone(self, places: Sequence[tuple[nn.Parameter, int, int]], adams: Sequence[Adam]) -> None:
        for k, adam in enumerate(adams):
            pieces = [self._piece(*p) for p in places if p[0].grad is not None and self._groups[id(p[0])] == k]
            if pieces:
                with span("optimizer"):
                    operations(pieces[0].x.device).accum_adam(pieces, adam, self._grad_scale)

    def _piece(self, p: nn.Parameter, offset: int, numel: int) -> Piece:
        group: dict[str, Any] = self._optimizer.param_groups[self._groups[id(p)]]
        return self._optimizer.piece(p, group, slice(offset, offset + numel))


def fused_steps(core: Core, optimizers: Sequence[Optimizer], flat: Flat) -> FusedSteps | None:
    """None where the method has no fused form, or another optimizer than one AccumAdamW owns the update."""
    optimizer = owned(optimizers, flat.parameters)
    if optimizer is None or not any(lane.algorithm.fused for lane in core.lanes):
        return None
    return FusedSteps(core, optimizer, flat)

"""How do a round's landing, the optimizer's step and the next round's encoding become one pass over the parameters?

Where a method has a fused form and one AccumAdamW owns all parameters, its step is taken over: buckets between two rounds run
the fused kernel, the others land, step and send by themselves, with the same result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.bucket import Flat
from dtrain.codec import Update, adam_bytes
from dtrain.core import Core, Flight
from dtrain.island.replicas import Island
from dtrain.kernels import SUM_TILE, Adam, Piece, operations
from dtrain.optim.accum_adam import AccumAdamW, owned
from dtrain.spans import span

Place = tuple[Tensor, int, int]
"""A parameter's part that lies in a bucket: its first element and how many."""
Numbers = tuple[dict[str, Any], Adam]
"""A parameter's group, and the numbers of its step."""


class FusedSteps:
    """The optimizer steps of one rank, a bucket at a time."""

    def __init__(self, core: Core, optimizer: AccumAdamW, flat: Flat, ranks: Island) -> None:
        self._core, self._optimizer, self._joined = core, optimizer, ranks.joined
        named = dict(zip(flat.names, flat.parameters, strict=True))
        self._places: list[list[Place]] = [
            [(named[s.name], s.offset, s.numel) for s in lane.bucket.layout.spans] for lane in core.lanes
        ]
        self._trained = flat.trained
        self._inside = {id(p) for p in flat.parameters}
        device = core.lanes[0].bucket.x.device
        self._grad_scale = torch.ones(1, device=device)
        num_sums = sum(-(-p.numel() // SUM_TILE) for p in flat.trained)
        self._sums = torch.zeros(num_sums, dtype=torch.float64, device=device)

    def step(self, step: int, *, clip: float | None, may_start: bool) -> list[Flight]:
        """Do optimizer step number ``step`` on all parameters; returns the flights of the rounds that start after it. With
        ``clip`` gradients are scaled to that global norm at most, in the pass that reads them for the update."""
        self._grad_scale.fill_(1.0)
        if clip:
            with span("clip"):
                self._measure(clip)
        now = self._optimizer.begin()
        flights: list[Flight] = []
        for lane, places in zip(self._core.lanes, self._places, strict=True):
            starts = may_start and self._core.starts(lane, step)
            lands = self._core.lands(lane, step)
            if starts and lane.algorithm.fused is not None and _fuses(places, now):
                update = Update([self._piece(place, now) for place in places], now[places[0][0]][1], self._grad_scale)
                flights.append(self._core.start_fused(lane, step, update, landing=lands))
                continue
            if lane.land_step == step:
                with span("land"):
                    self._core.land(lane)
            self._step_alone(places, now)
            if starts:
                flights.append(self._core.start(lane, step))
        beside = [(p, 0, p.numel()) for p in now if id(p) not in self._inside]
        self._step_alone(beside, now)
        return flights

    def _measure(self, norm: float) -> None:
        """min(1, norm / (|g| + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it, with the sum in fp64."""
        gradients = [p.grad.contiguous().view(-1) for p in self._trained if p.grad is not None]
        if gradients:
            num_sums = sum(-(-g.numel() // SUM_TILE) for g in gradients)
            operations(gradients[0].device).sum_of_squares(gradients, self._sums[:num_sums])
            total = self._joined(self._sums[:num_sums]).sum().sqrt()
            self._grad_scale.copy_((norm / (total + 1e-6)).clamp_(max=1.0))

    def _step_alone(self, places: Sequence[Place], now: Mapping[Tensor, Numbers]) -> None:
        together: dict[tuple[Adam, torch.device], list[Piece]] = {}
        for place in places:
            if place[0] in now:
                together.setdefault((now[place[0]][1], place[0].device), []).append(self._piece(place, now))
        for (adam, device), pieces in together.items():
            with span("optimizer", adam_bytes(pieces)):
                operations(device).accum_adam(pieces, adam, self._grad_scale)

    def _piece(self, place: Place, now: Mapping[Tensor, Numbers]) -> Piece:
        p, offset, numel = place
        return self._optimizer.piece(p, now[p][0], slice(offset, offset + numel))


def _fuses(places: Sequence[Place], now: Mapping[Tensor, Numbers]) -> bool:
    """An encoding covers its bucket whole, and one kernel has one set of numbers (decay apart)."""
    return all(p in now for p, _, _ in places) and len({now[p][1] for p, _, _ in places}) == 1


def fused_steps(core: Core, optimizers: Sequence[Optimizer], flat: Flat, ranks: Island) -> FusedSteps | None:
    """None where the method has no fused form, another optimizer than one AccumAdamW owns the update, or ranks share buckets."""
    if ranks.num_replicas > 1:
        return None
    optimizer = owned(optimizers, flat.parameters)
    if optimizer is None or not any(lane.algorithm.fused for lane in core.lanes):
        return None
    return FusedSteps(core, optimizer, flat, ranks)

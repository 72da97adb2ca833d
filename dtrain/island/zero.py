"""How is a model spread over the ranks of an island by DeepSpeed's ZeRO, and where are its values? In fp32 master weights, of
which each rank has a part; what is computed with are copies of them, whole or sharded, in fp32 or bf16.

Stages 1 and 2 (arXiv 1910.02054) flatten the parameters of a group and give each rank a range of that: a rank has parts of some
parameters. Stage 3 gives rank r elements r * size to (r + 1) * size of every parameter, padded. Buckets are cut from the master
weights; copies that are older than these are made anew before the next forward pass."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.bucket import Flat, Part, embeddings_of, flat_parts


def _refuse(model: nn.Module) -> None:
    """Raises ValueError for a model with what does not come back from ZeRO's parts."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    beside = model.state_dict().keys() - {name for name, _ in model.named_parameters()}
    if frozen or beside:
        what = f"{frozen[0]} is frozen" if frozen else f"{min(beside)} is a buffer, or tied to another parameter"
        raise ValueError(f'islands.engine = "deepspeed": {what}, which is not carried yet; use islands.engine=fsdp, or ddp')


class Zero(nn.Module):
    """A DeepSpeed engine over the island's default process group; all ranks call each method together."""

    def __init__(self, model: nn.Module, device: torch.device, config: Mapping[str, Any], optimizer: Optimizer | None) -> None:
        """``config``: DeepSpeed's; ``optimizer``: None where the config names one. Raises ValueError where master weights are not
        fp32."""
        super().__init__()
        _refuse(model)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self._device, self._stale = device, False
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would take a GPU that there is, also for a model on the CPU
        deepspeed = importlib.import_module("deepspeed")
        # What it may compile for its collectives: nothing. An all-reduce for the CPU takes minutes, and gloo has one.
        importlib.import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}
        stepped = {"model_parameters": model.parameters()} if optimizer is None else {"optimizer": optimizer}
        self.engine: Any = deepspeed.initialize(model=model, config=dict(config), dist_init_required=False, **stepped)[0]
        self._full: Any = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
        self._stage = int(self.engine.zero_optimization_stage())
        wrong = next((part.values.dtype for part in self.parts().values() if part.values.dtype != torch.float32), None)
        if wrong is not None:
            raise ValueError(f"DeepSpeed's master weights are {wrong}; islands share fp32 ones, so leave out what says otherwise")

    @property
    def optimizer(self) -> Optimizer:
        """That which steps the master weights, without ZeRO's around it."""
        return self.engine.basic_optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        if self._stale:
            self._copy()
        return self.engine(inputs)

    def step(self) -> bool:
        """The end of a micro-batch, and after the last of a batch the update. Returns whether the parameters have changed."""
        self.engine.step()
        changed = bool(self.engine.was_step_applied())
        self._stale = self._stale and not changed  # an update ends with new copies
        return changed

    def flat(self, include: Sequence[str] | None, exclude: Sequence[str] | None) -> Flat:
        named = [(name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in self.shapes.items()]
        own, rows = dict(self.engine.module.named_parameters()), embeddings_of(self.engine.module)
        looked_up = {id(p) for name, p in named if id(own[name]) in rows}
        flat = flat_parts(named, self.parts(), include, exclude, embeddings=looked_up)
        # What islands do not share the ranks have alike: they began alike, and ZeRO keeps them so.
        return replace(flat, trained=flat.parameters, changed=self.changed, place=self._device)

    def parts(self) -> dict[str, Part]:
        """This rank's of the master weights."""
        find = self._of_shards if self._stage == 3 else _of_fragments
        return {name: find(p) for name, p in self.engine.module.named_parameters()}

    def changed(self) -> None:
        """The master weights have new values."""
        self._stale = True

    def put(self, name: str, whole: Tensor) -> None:
        """Make ``whole`` a parameter's value."""
        part = self.parts()[name]
        part.values.copy_(whole.reshape(-1)[part.first : part.first + part.values.numel()])
        self._stale = True

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's master weight, gathered on every rank, one after another."""
        for name, p in self.engine.module.named_parameters():
            yield name, self._full(p).detach()

    @contextmanager
    def grouped(self) -> Iterator[Optimizer]:
        """The optimizer while its groups hold the master weights that it steps: stage 3 leaves them empty between steps."""
        if self._stage == 3:
            self.engine.optimizer._set_fp32_optimizer_param_groups()
        yield self.optimizer
        if self._stage == 3:
            self.engine.optimizer._clear_fp32_optimizer_param_groups()

    def _of_shards(self, p: Any) -> Part:
        zero = self.engine.optimizer
        group, at, size = zero.grad_position[zero.get_param_id(p)]
        first = dist.get_rank() * size
        numel = max(0, min(size, p.ds_numel - first))  # the rest is padding
        return Part(zero.fp32_partitioned_groups_flat[group].detach()[at : at + numel], min(first, p.ds_numel))

    @torch.no_grad()
    def _copy(self) -> None:
        zero = self.engine.optimizer
        if self._stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:  # small ones, which every rank has whole
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        else:
            zero.update_lp_params()
        self._stale = False


def _of_fragments(p: Any) -> Part:
    mapping = getattr(p, "_hp_mapping", None)
    if mapping is None:
        return Part(torch.empty(0), 0)
    return Part(mapping.hp_fragment.detach(), mapping.lp_fragment_address.start)

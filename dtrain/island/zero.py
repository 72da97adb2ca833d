"""How is a model spread over the ranks of an island by DeepSpeed's ZeRO, and where are its values? In fp32 master weights, of
which each rank has a part; what is computed with are copies of them, whole or sharded, in fp32 or bf16.

Stages 1 and 2 (arXiv 1910.02054) flatten the parameters of a group and give each rank a range of that: a rank has parts of some
parameters. Stage 3 gives rank r elements r * size to (r + 1) * size of every parameter, padded. Buckets are cut from the master
weights; copies that are older than these are made anew before the next forward pass. Frozen parameters have no master weights:
stage 3 shards them, the others leave them whole, as all do buffers."""

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
from dtrain.buffers import Frozen


class Zero(nn.Module):
    """A DeepSpeed engine over the island's default process group; all ranks call each method together."""

    def __init__(self, model: nn.Module, device: torch.device, config: Mapping[str, Any], optimizer: Optimizer | None) -> None:
        """``config``: DeepSpeed's; ``optimizer``: None where the config names one. Raises ValueError where master weights are not
        fp32, and where what has none and is saved would be rounded. Buffers that are not saved, as tables of positions, are cast
        to bf16 with the rest: a model that wants them exact makes them anew in its forward pass."""
        super().__init__()
        self.like = {name: x.to("meta") for name, x in model.state_dict().items()}
        """Names, shapes and dtypes of what the whole model is saved as: of a parameter that is tied under each of its names."""
        self.num_elements = sum(p.numel() for p in model.parameters())
        self._device, self._stale = device, False
        os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would take a GPU that there is, also for a model on the CPU
        deepspeed = importlib.import_module("deepspeed")
        # What it may compile for its collectives: nothing. An all-reduce for the CPU takes minutes, and gloo has one.
        importlib.import_module("deepspeed.ops").__dict__["__compatible_ops__"] = {}
        trained = [p for p in model.parameters() if p.requires_grad]
        stepped = {"model_parameters": trained} if optimizer is None else {"optimizer": optimizer}
        self.engine: Any = deepspeed.initialize(model=model, config=dict(config), dist_init_required=False, **stepped)[0]
        self._gathered: Any = deepspeed.zero.GatheredParameters
        self._full: Any = importlib.import_module("deepspeed.utils").safe_get_full_fp32_param
        self._stage = int(self.engine.zero_optimization_stage())
        wrong = next((part.values.dtype for part in self.parts().values() if part.values.dtype != torch.float32), None)
        if wrong is not None:
            raise ValueError(f"DeepSpeed's master weights are {wrong}; islands share fp32 ones, so leave out what says otherwise")
        for name, x in self._beside().items():
            if x.dtype != self.like[name].dtype:
                what = "frozen" if isinstance(x, nn.Parameter) else "a buffer"
                raise ValueError(
                    f"{name} is {what}, and DeepSpeed rounds it to {x.dtype} for good; leave bf16 out of its file, or use "
                    "islands.engine=fsdp"
                )

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
        own, rows = self._trained(), embeddings_of(self.engine.module)
        named = [(name, nn.Parameter(torch.empty(self.like[name].shape, device="meta"))) for name in own]
        looked_up = {id(p) for name, p in named if id(own[name]) in rows}
        flat = flat_parts(named, self.parts(), include, exclude, embeddings=looked_up)
        # What islands do not share the ranks have alike: they began alike, and ZeRO keeps them so.
        return replace(flat, trained=flat.parameters, changed=self.changed, place=self._device)

    def parts(self) -> dict[str, Part]:
        """This rank's of the master weights."""
        return {name: self._part(p) for name, p in self._trained().items()}

    def frozen(self) -> list[Frozen]:
        """The other parameters."""

        def of(name: str, p: Any) -> Frozen:
            like = self.like[name]
            return Frozen(like.dtype, tuple(like.shape), lambda: self._read(p), lambda value: self._write(p, value))

        return [of(name, p) for name, p in self.engine.module.named_parameters() if not p.requires_grad]

    def changed(self) -> None:
        """The master weights have new values."""
        self._stale = True

    def put(self, name: str, whole: Tensor) -> None:
        """Make ``whole`` the value of what ``like`` names."""
        beside = self._beside()
        if name in beside:
            self._write(beside[name], whole)
            return
        p = dict(self.engine.module.named_parameters(remove_duplicate=False))[name]
        part = self._part(p)
        part.values.copy_(whole.reshape(-1)[part.first : part.first + part.values.numel()])
        self._stale = True

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """All that ``like`` names, of what is trained the master weights, gathered on every rank, one after another."""
        beside, own = self._beside(), dict(self.engine.module.named_parameters(remove_duplicate=False))
        for name in self.like:
            yield name, self._read(beside[name]) if name in beside else self._full(own[name]).detach()

    @contextmanager
    def grouped(self) -> Iterator[Optimizer]:
        """The optimizer while its groups hold the master weights that it steps: stage 3 leaves them empty between steps."""
        if self._stage == 3:
            self.engine.optimizer._set_fp32_optimizer_param_groups()
        yield self.optimizer
        if self._stage == 3:
            self.engine.optimizer._clear_fp32_optimizer_param_groups()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}

    def _beside(self) -> dict[str, Tensor]:
        """What has no master weights, of that which is saved."""
        module = self.engine.module
        frozen = {name: p for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        return frozen | {name: x for name, x in module.named_buffers(remove_duplicate=False) if name in self.like}

    def _read(self, x: Any) -> Tensor:
        """Of what has no master weights, all."""
        if not hasattr(x, "ds_id"):
            return x.detach()
        with self._gathered([x]):
            return x.detach().clone()

    @torch.no_grad()
    def _write(self, x: Any, value: Tensor) -> None:
        if not hasattr(x, "ds_id"):
            x.copy_(value)
            return
        with self._gathered([x], modifier_rank=0):
            x.copy_(value)
        self._stale = True  # small ones, which every rank has whole, are gathered again

    def _part(self, p: Any) -> Part:
        return self._of_shards(p) if self._stage == 3 else _of_fragments(p)

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

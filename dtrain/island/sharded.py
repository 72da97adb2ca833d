"""How is a model spread over the ranks of an island? By FSDP2: each keeps a part of every parameter, and a block is gathered when
it is computed.

Parameters, gradients and optimizer state are sharded by rows over ``shards`` ranks. With fewer shards than ranks each group of
that many has the whole model, and gradients are averaged over the groups (HSDP). fully_shard: torch.distributed.fsdp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def shard(
    model: nn.Module, device: torch.device, *, shards: int, bf16: bool, recompute: bool
) -> nn.Module:
    """``model`` itself, sharded in place over the island's process group, each of its blocks apart. ``bf16``: blocks are
    computed in it, gradients are averaged in fp32; ``recompute``: of each block only its input is kept for the backward pass."""
    ranks = dist.get_world_size()
    names, sizes = (("shard",), (shards,)) if shards == ranks else (("replicate", "shard"), (ranks // shards, shards))
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    if recompute:
        blocks = {id(block) for block in _blocks(model)}
        apply_activation_checkpointing(model, check_fn=lambda module: id(module) in blocks)
    for module in [*_blocks(model), model]:
        fully_shard(module, mesh=mesh, mp_policy=half)
    return model


def shard_stages(
    stages: Sequence[nn.Module], device: torch.device, *, shards: int, bf16: bool, recompute: bool
) -> dist.ProcessGroup:
    """As ``shard``, the stages of a rank, of ranks that are a mesh of stages x ``shards``: its neighbours of the same stage share
    their parameters. Returns the ranks that pass a batch on. What is gathered of a stage stays so until a step's last backward
    pass: of many micro-batches each would gather it again. So it is with ``engine_fits.MOST_SHARED_STAGES`` a rank."""
    mesh = init_device_mesh(device.type, (dist.get_world_size() // shards, shards), mesh_dim_names=("stage", "shard"))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for stage in stages:
        if recompute:
            blocks = {id(block) for block in _blocks(stage)}
            apply_activation_checkpointing(stage, check_fn=lambda module, blocks=blocks: id(module) in blocks)
        for module in [*_blocks(stage), stage]:
            fully_shard(module, mesh=mesh["shard"], mp_policy=half, reshard_after_forward=False)
    return mesh["stage"].get_group()


def _blocks(module: nn.Module) -> list[nn.Module]:
    """What stands in its lists of modules, the outermost of which are a model's layers, whoever wrote it."""
    found = list[nn.Module]()
    for child in module.children():
        found += list(child) if isinstance(child, nn.ModuleList) else _blocks(child)
    return found


def groups_add_up(model: nn.Module, now: bool) -> None:
    """Whether the backward passes that follow average their gradients over the groups of HSDP, as the last of a step's does.
    Within a group each does: a rank that waited with it would keep the whole gradient until then."""
    assert isinstance(model, FSDPModule)
    model.set_requires_all_reduce(now)


def gathered_no_more(model: nn.Module) -> None:
    """After a forward pass without a backward one the root's parameters lie whole on every rank; shard them again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

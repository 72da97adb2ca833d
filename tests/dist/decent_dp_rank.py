"""What does a rank of the authors' package of arXiv 2410.11998 (decent-dp on PyPI) compute? A process that torchrun starts.

    torchrun ... -m tests.dist.decent_dp_rank FOLDER TOPOLOGY/OPTIMIZER ...

Each run's parameters lie in FOLDER afterwards, flat, one file a rank. Model, data and numbers are here for both sides."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.launch.processes import die_with_parent

STEPS, BATCH, LR, BETAS, EPS, S = 50, 16, 1e-3, (0.9, 0.95), 1e-8, 4


def make_model() -> nn.Module:
    """Six parameters; some are no multiples of their 32 elements, nor of a codec's block."""
    model = nn.Sequential(nn.Linear(9, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh(), nn.Linear(24, 5))
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    return model


def loss_of(model: nn.Module, node: int, step: int) -> Tensor:
    """Every island has other data, around another target."""
    draw = torch.Generator().manual_seed(1000 * node + step)
    x, y = torch.randn(BATCH, 9, generator=draw), torch.randn(BATCH, 5, generator=draw)
    return (model(x) - y - node).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def make_optimizer(name: str, parameters: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
    from decent_dp.optim import AccumAdamW

    tensors = [p for _, p in parameters]
    if name == "adamw":
        return torch.optim.AdamW(tensors, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    return AccumAdamW(tensors, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, accum_iter=S)


def train(topology: str, optimizer: str) -> Tensor:
    from decent_dp.ddp import DecentralizedDataParallel

    # A bucket limit of 0 makes each parameter a bucket, with an exchange and an optimizer of its own.
    model = DecentralizedDataParallel(
        make_model(), lambda parameters: make_optimizer(optimizer, parameters), topology=topology, bucket_size_in_mb=0
    )
    for step in range(STEPS):  # it zeroes gradients by itself, and its first update comes with the second forward pass
        loss_of(model, dist.get_rank(), step).backward()
    return flat(model)


def main(folder: Path, runs: list[str]) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run in runs:
        topology, _, optimizer = run.partition("/")
        torch.save(train(topology, optimizer), folder / f"{topology}-{optimizer}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

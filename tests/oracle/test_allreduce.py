"""Is ``allreduce`` torch's DistributedDataParallel, clipping and AdamW included?

With two islands both sides scale each gradient by exactly 1/2 and add two numbers, which commutes: the mean gradients have equal
bits. Norm, clip and AdamW are the same torch code on tensors of equal shape, stride and alignment (every parameter here is a
multiple of 64 bytes), so after each of 20 steps the parameters must agree to the bit.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dtrain
from dtrain.connect import Connection
from tests.dist import harness
from tests.islands import run_islands

STEPS, CLIP, BATCH = 20, 0.5, 8


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            assert p.numel() % 16 == 0
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def loss_of(model: nn.Module, node: int, step: int) -> Tensor:
    """Each island has other data; the targets are large, so that the gradient's norm is far above the clip."""
    g = torch.Generator().manual_seed(1000 * node + step)
    x, y = torch.randn(BATCH, 16, generator=g), torch.randn(BATCH, 16, generator=g)
    return (model(x) - 10 * y).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def ddp_rank(folder: str) -> None:
    torch.set_num_threads(1)
    rank = dist.get_rank()
    model = DistributedDataParallel(make_model())
    optimizer = make_optimizer(model)
    norms, seen = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        seen.append(flat(model))
    torch.save((torch.stack(seen), torch.stack(norms)), f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """(steps, parameters) of real DDP in two processes."""
    folder: Path = tmp_path_factory.mktemp("ddp")
    ranks = harness.run_islands(functools.partial(ddp_rank, folder=str(folder)), 1, 2, run=folder)
    assert [r.status for r in ranks] == [0, 0], harness.show(ranks)
    (seen, norms), (others, _) = (torch.load(folder / f"rank{rank}.pt") for rank in range(2))
    assert torch.equal(seen, others)
    assert float(norms.min()) > CLIP  # the clip acts in every step
    return seen


@pytest.mark.parametrize("reduce", ["all_to_all", "gather"])
def test_parameters_equal_ddp_to_the_bit(ddp: Tensor, reduce: str) -> None:
    def island(connection: Connection) -> Tensor:
        model = make_model()
        optimizer = make_optimizer(model)
        seen = []
        with dtrain.join(
            model, optimizer, recipe="allreduce", reduce=reduce, clip=CLIP, bucket_bytes=4096, link=connection
        ) as sync:
            assert len(sync.buckets) > 2
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, connection.node, step).backward()
                optimizer.step()
                seen.append(flat(model))
        return torch.stack(seen)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        islands = run_islands(2, island)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(islands[0], islands[1])
    assert torch.equal(islands[0], ddp)

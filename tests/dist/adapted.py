"""Which model has all that is not simply trained? One of adapters beside frozen weights, with buffers; and a loop with such."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dtrain
from dtrain import buffers
from dtrain.membership import place_from_env
from dtrain.shards import whole

WIDTH = 15
"""Two ranks have unequal parts."""


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.frozen(x).tanh() + self.up(self.down(x))


class Adapted(nn.Module):
    """A frozen trunk, which is an embedding and a block that no gradient comes to, then adapters. ``tied``: the embedding is
    trained, and the head. Buffers hold what was seen, and nothing is computed with them."""

    seen: Tensor
    mean: Tensor

    def __init__(self, vocab: int, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, WIDTH)
        self.blocks = nn.ModuleList([Adapter().requires_grad_(False), Adapter(), Adapter()])
        self.head = nn.Linear(WIDTH, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        else:
            self.embedding.requires_grad_(False)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        if self.training:
            self.seen += tokens.shape[0]
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return self.head(x)


def apart() -> dict[str, Any]:
    """Islands that start from weights of their own, frozen ones too, on one rank or on several that shard them."""
    torch.set_num_threads(1)
    buffers.MAX_BUCKET_BYTES = 100  # so that a layer's bias is compared apart from its weight
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    torch.manual_seed(place_from_env().island)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    frozen = model[0].requires_grad_(False)
    with torch.no_grad():
        frozen.get_parameter("bias").fill_(0.5)  # of all islands
    before = _numbers(frozen)
    if ranks > 1:
        fully_shard(model[0])
        fully_shard(model)
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=0.01)
    with dtrain.join(model, optimizer, recipe="fedavg", every=2, codec="identity") as sync:
        started, trained = _numbers(frozen), _numbers(model[2])
        for step in range(4):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step)).chunk(ranks)[rank]
            optimizer.zero_grad()
            (model(x) - x[:, :3].sin()).square().mean().backward()
            optimizer.step()
        sync.merge()
        sent = sync.stats().wire_bytes_start
    return {
        "before": before, "started": started, "ended": _numbers(frozen), "sent": sent, "moved": _numbers(model[2]) != trained,
        "trained": _numbers(model[2]),
    }  # fmt: skip


def _numbers(module: nn.Module) -> list[list[float]]:
    return [whole(p.detach()).flatten().tolist() for p in module.parameters()]

"""Do two islands on one GPU train to the bits of two on the CPU?

The problem is chosen so that no operation rounds: targets are multiples of 1/8 below 8, the learning rate is 1/2, and
two islands are averaged, so after s steps and r rounds a value has at most 3 + 3 + s + r bits, far fewer than fp32's
24. Then fused multiply-adds and the order of sums cannot matter, and every difference is a fault of the exchange (a
stream that was not waited for, a wire read too early)."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

import dtrain
from dtrain.connect import Connection, connect_local

NUMEL = 300_001  # several buckets, an odd one last
STEPS, EVERY = 12, 4


class Pull(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(NUMEL, device=device))

    def forward(self, target: Tensor) -> Tensor:
        return 0.5 * (self.x - target).square().sum()


def two_islands_equal_cpu(device: torch.device) -> str:
    for recipe, delay in (("fedavg", 0), ("fedavg", 3), ("dpsgd", 1), ("allreduce", 0)):
        there, here = (_train(d, recipe, delay) for d in (device, torch.device("cpu")))
        for island, (a, b) in enumerate(zip(there, here, strict=True)):
            assert torch.equal(a.cpu(), b), f"{recipe}, delay {delay}: island {island} differs from the CPU's"
    return f"4 methods, {NUMEL} parameters, {STEPS} steps: bit-equal to the CPU"


def _train(device: torch.device, recipe: str, delay: int) -> list[Tensor]:
    ended: dict[int, Tensor | Exception] = {}

    def island(connection: Connection) -> None:
        try:
            ended[connection.node] = _loop(connection, device, recipe, delay)
        except (RuntimeError, ValueError) as e:
            ended[connection.node] = e

    threads = [threading.Thread(target=island, args=(c,), daemon=True) for c in connect_local(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    results = []
    for node in range(2):
        result = ended.get(node)
        assert isinstance(result, Tensor), f"{recipe}, delay {delay}: island {node} ended with {result!r}"
        results.append(result)
    return results


def _loop(connection: Connection, device: torch.device, recipe: str, delay: int) -> Tensor:
    generator = torch.Generator().manual_seed(connection.node)
    target = (torch.randint(-63, 64, (NUMEL,), generator=generator) / 8).to(device)
    model = Pull(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    every = EVERY if recipe == "fedavg" else None
    with dtrain.join(
        model, optimizer, recipe=recipe, every=every, delay=delay, codec="identity", link=connection
    ) as sync:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(target).backward()
            optimizer.step()
        sync.merge()
    return model.x.detach().clone()

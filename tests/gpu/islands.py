"""Do two islands on one GPU train to the bits of two on the CPU?

The problem is chosen so that no operation rounds: targets are multiples of 1/8 below 8, the learning rate is 1/2, and
two islands are averaged, so after s steps and r rounds a value has at most 3 + 3 + s + r bits, far fewer than fp32's
24. Then fused multiply-adds and the order of sums cannot matter, and every difference is a fault of the exchange (a
stream that was not waited for, a wire read too early)."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dtrain
from dtrain.connect import Connection, connect_local

NUMEL = 300_001  # several buckets, an odd one last
STEPS, EVERY = 12, 4
Axes = dict[str, Any]


class Pull(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(NUMEL, device=device))

    def forward(self, target: Tensor) -> Tensor:
        return 0.5 * (self.x - target).square().sum()


def two_islands_equal_cpu(device: torch.device) -> str:
    outer: Axes = {"recipe": "fedavg", "every": EVERY}
    methods: tuple[Axes, ...] = (
        {**outer, "delay": 0},
        {**outer, "delay": 3},
        {**outer, "delay": 3, "outer_state": "host"},
        {"recipe": "dpsgd", "delay": 1},
        {"recipe": "allreduce", "delay": 0},
    )
    for axes in methods:
        there, here = (_train(d, axes) for d in (device, torch.device("cpu")))
        for island, (a, b) in enumerate(zip(there, here, strict=True)):
            assert torch.equal(a.cpu(), b), f"{axes}: island {island} differs from the CPU's"
    return f"{len(methods)} methods, {NUMEL} parameters, {STEPS} steps: bit-equal to the CPU"


def outer_state_leaves_the_gpu(device: torch.device) -> str:
    """Beside islands that never talk: with every landing whose state lies on the host no byte more of the GPU is held between two
    rounds, and with fp32 anchors and momenta beside the parameters 3 copies of them at least."""
    floor = _held_bytes(device, {"recipe": "local"})
    late: Axes = {"every": EVERY, "delay": 3, "outer_lr": 0.2, "outer_momentum": 0.5}
    loops: tuple[Axes, ...] = (
        {"recipe": "delayed_diloco", **late},
        {"recipe": "streaming_diloco", "every": EVERY, "fragments": 1, "delay": 3},
        {"recipe": "eager_diloco", **late},
        {"recipe": "diloco", **late, "landing": "pure"},
        {"recipe": "noloco", "every": EVERY},
    )
    for axes in loops:
        beside, away = (_held_bytes(device, {**axes, "outer_state": state}) - floor for state in ("device", "host"))
        assert beside >= 2 * 3 * 4 * NUMEL, f"{axes}: {beside} bytes beside the parameters of two islands"
        assert away <= 0, f"{axes}: {away} bytes of two islands' outer state lie on the GPU"
    return f"{len(loops)} outer loops: nothing of their state lies on the GPU between rounds"


def _held_bytes(device: torch.device, axes: Axes) -> int:
    """Of the GPU, by both islands, at rest."""
    held: list[int] = []
    together = threading.Barrier(2, action=lambda: held.append(torch.cuda.memory_allocated(device)), timeout=60)
    gc.collect()  # what an earlier run left
    before = torch.cuda.memory_allocated(device)
    _train(device, axes, at_rest=together.wait)
    return held[0] - before


def _train(device: torch.device, axes: Axes, at_rest: Callable[[], object] = lambda: None) -> list[Tensor]:
    ended: dict[int, Tensor | Exception] = {}

    def island(connection: Connection) -> None:
        try:
            ended[connection.node] = _loop(connection, device, axes, at_rest)
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
        assert isinstance(result, Tensor), f"{axes}: island {node} ended with {result!r}"
        results.append(result)
    return results


def _loop(connection: Connection, device: torch.device, axes: Axes, at_rest: Callable[[], object]) -> Tensor:
    generator = torch.Generator().manual_seed(connection.node)
    target = (torch.randint(-63, 64, (NUMEL,), generator=generator) / 8).to(device)
    model = Pull(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    codec = None if axes["recipe"] == "local" else "identity"
    feedback = False if axes["recipe"] == "delayed_diloco" else None
    with dtrain.join(model, optimizer, codec=codec, error_feedback=feedback, link=connection, **axes) as sync:
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(target).backward()
            optimizer.step()
        sync.drain()
        torch.cuda.synchronize() if device.type == "cuda" else None
        at_rest()
        sync.merge()
    return model.x.detach().clone()

"""How does a test run several islands? One thread an island, in this process; the first error is raised as soon as it happens."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dtrain.connect import Connection, LinkSettings, connect_local

T = TypeVar("T")


def run_islands(
    n: int, island: Callable[[Connection], T], *, timeout_s: float = 60.0, settings: LinkSettings | None = None
) -> list[T]:
    """What ``island`` returns for each of n connections, in node order."""
    ended: queue.SimpleQueue[tuple[int, T | None, BaseException | None]] = queue.SimpleQueue()

    def run(connection: Connection) -> None:
        try:
            ended.put((connection.node, island(connection), None))
        except BaseException as e:  # noqa: BLE001  (raised again below, on the caller's thread)
            ended.put((connection.node, None, e))

    for connection in connect_local(n, timeout_s=timeout_s, settings=settings):
        threading.Thread(target=run, args=(connection,), name=f"island{connection.node}", daemon=True).start()
    results: dict[int, T] = {}
    until = time.monotonic() + timeout_s
    while len(results) < n:
        try:
            node, result, error = ended.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            late = [node for node in range(n) if node not in results]
            raise TimeoutError(f"islands {late} did not end within {timeout_s:g} s") from None
        if error is not None:
            raise error
        results[node] = result  # pyright: ignore[reportArgumentType]  # without an error it is a T, None among them
    return [results[node] for node in range(n)]


class Quadratic(nn.Module):
    """loss = sum_k a_k / 2 (x_k - c_k)^2 over two parameters, so that G(x) = a (x - c) is known."""

    def __init__(self, start: Tensor, a: Tensor, c: Tensor, cut: int) -> None:
        super().__init__()
        self.left = nn.Parameter(start[:cut].clone())
        self.right = nn.Parameter(start[cut:].clone())
        self._a, self._c = a, c

    def forward(self) -> Tensor:
        x = torch.cat((self.left, self.right))
        return (0.5 * self._a * (x - self._c).square()).sum()

    def flat(self) -> Tensor:
        return torch.cat((self.left.detach(), self.right.detach()))

    @torch.no_grad()
    def set_flat(self, x: Tensor) -> None:
        cut = self.left.numel()
        self.left.copy_(x[:cut])
        self.right.copy_(x[cut:])


def sgd_step(model: Quadratic, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()
    optimizer.step()

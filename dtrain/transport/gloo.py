"""How is a raw group of processes made, outside torch's default group? Point-to-point messages, no collectives.

torch's type stubs leave these classes half described, so their part that dtrain uses is a protocol here.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

NEVER = timedelta(days=365)
"""A gloo wait that times out closes healthy pairs too; limits are kept by the engine."""


class Work(Protocol):
    def wait(self) -> bool: ...


class PointToPoint(Protocol):
    def send(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work: ...


def gloo_group(store: Store, rank: int, size: int, *, interface: str) -> PointToPoint:
    """Connect size processes over the addresses of one network interface; returns when all are connected."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=interface)]
    options._timeout = NEVER
    return cast(PointToPoint, gloo(store, rank, size, options))

"""How is a raw group of processes made, outside torch's default group? Point-to-point messages, no collectives.

torch's type stubs leave these classes half described, so their part that dtrain uses is a protocol here.
"""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

NEVER = timedelta(days=365)
"""A gloo wait that times out closes healthy pairs too; limits are kept by the engine."""


class Work(Protocol):
    def wait(self, timeout: timedelta = ..., /) -> bool: ...


class PointToPoint(Protocol):
    def send(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work: ...

    def recv(self, tensors: list[Tensor], peer: int, tag: int, /) -> Work: ...


_NO_WIRE = 3 << 29
"""A tag that no wire has."""


def break_off(group: PointToPoint, peer: int) -> None:
    """End all waits for wires from and to a peer. gloo closes a pair when a wait on it times out, and knows no other
    way.

    A thread that still waits inside gloo while Python shuts down takes the process with it: SIGABRT, not the exit
    status."""
    with suppress(RuntimeError):  # the time-out, or a pair that is closed already
        group.recv([torch.empty(1, dtype=torch.uint8)], peer, _NO_WIRE).wait(timedelta(milliseconds=1))


def reason(e: RuntimeError) -> str:
    """What gloo says of a lost peer, without the source file in front and the advice behind: ``Connection closed by
    peer [10.0.0.2]:4711``."""
    first = str(e).partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(". ")[0] or type(e).__name__


def gloo_group(store: Store, rank: int, size: int, *, interface: str, connect_s: float) -> PointToPoint:
    """Connect size processes over the addresses of one network interface; returns when all are connected.

    Raises RuntimeError when one has not come within connect_s. Wait for its works with ``NEVER``: the group's own limit
    is connect_s."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=interface)]
    options._timeout = timedelta(seconds=connect_s)
    return cast(PointToPoint, gloo(store, rank, size, options))

"""Which processes belong to a launch, and how do all of them end, whatever happens to the launcher?

Two nets. Every process asks the kernel to be killed when its parent dies (torchrun puts each worker into a session of its own, so
no process group reaches them all): that covers ``kill -9``. And every process carries the launch's tag in its environment, which
``/proc`` shows: so the launcher finds also those whose parent is gone, or that ignore signals.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

TAG_VARIABLE = "DTRAIN_LAUNCH"
PARENT_VARIABLE = "DTRAIN_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; a process that a person started by hand is left alone."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):  # it died before the request was made
        os._exit(1)


def tagged(tag: str, island: int | None = None) -> list[int]:
    """Process ids of a launch (of one island of it); the dead that nobody has reaped have no environment and are left out."""
    wanted = {f"{TAG_VARIABLE}={tag}".encode()}
    if island is not None:
        wanted.add(f"DTRAIN_ISLAND={island}".encode())
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # it ended just now, or belongs to somebody else
            continue
        if wanted <= set(environment.split(b"\0")):
            found.append(int(entry.name))
    return found


def end(tag: str, agents: Sequence[Popen[bytes]], *, island: int | None = None, grace_s: float = 2.0) -> None:
    """SIGTERM to all, and SIGKILL to whatever is left after ``grace_s``; returns when none is left."""
    _signal(tag, island, agents, signal.SIGTERM)
    grace_ends = time.monotonic() + grace_s
    gives_up = grace_ends + 10.0  # only a process that hangs inside the kernel survives SIGKILL
    while _left(tag, island, agents) and time.monotonic() < gives_up:
        if time.monotonic() > grace_ends:
            _signal(tag, island, agents, signal.SIGKILL)
        time.sleep(0.03)


def _left(tag: str, island: int | None, agents: Sequence[Popen[bytes]]) -> bool:
    running = [agent for agent in agents if agent.poll() is None]  # poll reaps
    return bool(running or tagged(tag, island))


def _signal(tag: str, island: int | None, agents: Sequence[Popen[bytes]], number: signal.Signals) -> None:
    running = {agent.pid for agent in agents if agent.poll() is None}
    for pid in running | set(tagged(tag, island)):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue

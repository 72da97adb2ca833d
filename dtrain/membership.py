"""Which islands are there, which have left, and who is back?

The launcher owns a TCPStore, the meeting point. Islands announce themselves in it, and say good-bye; the launcher
writes ``regroup`` when an island that was lost is started again. Islands of one process share a MemoryMembership
instead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from torch._C._distributed_c10d import Store, TCPStore

from dtrain.errors import PeerLost, Regroup

SAY_EVERY_S = 1.0

OnWait = Callable[[tuple[int, ...], float, float], None]
"""(islands waited for, seconds so far, limit in seconds): called about once a second while the island waits."""


class Notice(NamedTuple):
    """What an island said of itself: that it waits in an exact average, or that it left the job."""

    step: int
    merges: int
    """Exact averages that it had done."""
    merging: bool = False
    failed: bool = False

    @property
    def final(self) -> bool:
        """Whether it takes no wire any more, and sends none that is not under way."""
        return not self.merging

    def ends_rounds(self, merges: int) -> bool:
        """Whether no round after ``step`` will come from it, as seen by an island that has done this many merges."""
        return not self.failed and (self.final or self.merges >= merges)

    def misses_merge(self, index: int) -> bool:
        """Whether it left without the exact average of this index."""
        return self.final and not self.failed and self.merges <= index


class Membership(Protocol):
    failed_may_return: bool
    """Whether an island that failed may be started again, so that it is worth waiting for."""

    def announce(self, notice: Notice) -> None: ...

    def notices(self) -> dict[int, Notice]: ...

    def check_regroup(self) -> None:
        """Raises Regroup when a lost island has come back under a new epoch."""
        ...

    def shared(self, name: str, change: Callable[[str], str]) -> str:
        """Change a text that all islands share, empty at first, as if nobody else did; returns what it is then. ``change`` may be
        called again where somebody else was faster."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands, as the launcher told it."""

    island: int
    num_islands: int
    rank: int
    num_ranks: int
    meet: str
    epoch: int
    resume_step: int
    run: Path | None
    job: Path | None
    interface: str


def place_from_env(env: Mapping[str, str] | None = None) -> Place:
    """Read the launcher's and torchrun's environment; without them, one island of one rank."""
    e = os.environ if env is None else env
    return Place(
        island=int(e.get("DTRAIN_ISLAND", "0")),
        num_islands=int(e.get("DTRAIN_NUM_ISLANDS", "1")),
        rank=int(e.get("RANK", "0")),
        num_ranks=int(e.get("WORLD_SIZE", "1")),
        meet=e.get("DTRAIN_MEET", ""),
        epoch=int(e.get("DTRAIN_EPOCH", "0")),
        resume_step=int(e.get("DTRAIN_RESUME_STEP", "0")),
        run=Path(e["DTRAIN_RUN"]) if "DTRAIN_RUN" in e else None,
        job=Path(e["DTRAIN_JOB"]) if "DTRAIN_JOB" in e else None,
        interface=e.get("GLOO_SOCKET_IFNAME", "lo"),
    )


def meeting_store(meet: str, timeout_s: float) -> TCPStore:
    """Connect to the launcher's store at ``host:port``."""
    host, _, port = meet.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


class StoreMembership:
    """Membership through the meeting point, for one epoch."""

    failed_may_return = True

    def __init__(self, store: Store, *, node: int, num_nodes: int, rank: int, epoch: int) -> None:
        self._store = store
        self._node, self._num_nodes, self._rank, self._epoch = node, num_nodes, rank, epoch
        self._texts: set[str] = set()

    def gather(self, timeout_s: float, on_wait: OnWait) -> None:
        """Wait until this rank's counterparts on all islands are here; raises PeerLost naming who never came."""
        self._store.set(self._key("ready", self._node), "1")
        begun, say_at_s = time.monotonic(), SAY_EVERY_S
        missing = [n for n in range(self._num_nodes) if n != self._node]
        while True:
            missing = [n for n in missing if not self._store.check([self._key("ready", n)])]
            if not missing:
                return
            self.check_regroup()
            waited_s = time.monotonic() - begun
            if waited_s > timeout_s:
                self._store.delete_key(self._key("ready", self._node))  # who comes later must not take it for here
                raise PeerLost(missing, f"did not come to the meeting point within {timeout_s:g} s")
            if waited_s > say_at_s:
                on_wait(tuple(missing), waited_s, timeout_s)
                say_at_s = waited_s + SAY_EVERY_S
            time.sleep(0.02 if waited_s < 1 else 0.5)

    def announce(self, notice: Notice) -> None:
        self._store.set(self._key("notice", self._node), ":".join(str(int(value)) for value in notice))

    def notices(self) -> dict[int, Notice]:
        out = {}
        for n in range(self._num_nodes):
            if n != self._node and self._store.check([self._key("notice", n)]):
                step, merges, merging, failed = map(int, self._store.get(self._key("notice", n)).decode().split(":"))
                out[n] = Notice(step, merges, merging == 1, failed == 1)
        return out

    def check_regroup(self) -> None:
        if self._store.check(["regroup"]):
            epoch, step = self._store.get("regroup").decode().split(":")
            if int(epoch) > self._epoch:
                raise Regroup(int(epoch), int(step))

    def shared(self, name: str, change: Callable[[str], str]) -> str:
        key = f"{name}/{self._epoch}/{self._rank}"
        while True:
            if name not in self._texts and self._store.check([key]):  # a get would wait for a key that is not there
                self._texts.add(name)
            before = self._store.get(key).decode() if name in self._texts else ""
            after = change(before)
            if after == before or self._store.compare_set(key, before, after).decode() == after:
                return after

    def _key(self, what: str, node: int) -> str:
        return f"{what}/{self._epoch}/{self._rank}/{node}"


class Hub:
    """The notices of islands in one process, and the texts that they share."""

    def __init__(self) -> None:
        self.notices: dict[int, Notice] = {}
        self.texts: dict[str, str] = {}
        self.lock = threading.Lock()


class MemoryMembership:
    """Membership of islands in one process; what fails there does not come back."""

    failed_may_return = False

    def __init__(self, hub: Hub, node: int) -> None:
        self._hub = hub
        self._node = node

    def announce(self, notice: Notice) -> None:
        with self._hub.lock:
            self._hub.notices[self._node] = notice

    def notices(self) -> dict[int, Notice]:
        with self._hub.lock:
            return {n: e for n, e in self._hub.notices.items() if n != self._node}

    def check_regroup(self) -> None:
        """Islands of one process never regroup."""

    def shared(self, name: str, change: Callable[[str], str]) -> str:
        with self._hub.lock:
            text = self._hub.texts[name] = change(self._hub.texts.get(name, ""))
            return text

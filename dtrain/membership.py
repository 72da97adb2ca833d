"""Which islands are there, which have left, and who is back?

The launcher owns a TCPStore, the meeting point. Islands announce themselves in it, and say good-bye; the launcher
says which of them were lost, and when those are started again. Islands of one process share a MemoryMembership
instead."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from torch._C._distributed_c10d import Store, TCPStore

from dtrain.errors import PeerLost, Regroup
from dtrain.lanes import lanes_of
from dtrain.words import MemoryWords, StoreWords, Words, forget

SAY_EVERY_S = 1.0
HEARD_ALL = sys.maxsize
_LOST = "lost"

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
    words: Words
    """What islands say to all others."""

    def announce(self, notice: Notice) -> None: ...

    def notices(self) -> dict[int, Notice]: ...

    def check_regroup(self) -> None:
        """Raises Regroup when a lost island has come back under a new epoch."""
        ...

    def lost(self) -> tuple[int, ...]:
        """Islands that ended without having done their part, and are not started again yet."""
        ...

    def beat(self, heard: int) -> None:
        """Show life, and that this island has heard so many words; HEARD_ALL where it will hear no more."""
        ...

    def beats(self) -> Mapping[int, int]:
        """How often each island has shown life; none of them where one never did."""
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
    num_lanes: int = 0
    """The most ranks that an island of the job has; 0: all have as many as this one."""

    @property
    def lanes(self) -> tuple[int, ...]:
        """Those that end at this rank."""
        return lanes_of(self.rank, self.num_lanes or self.num_ranks, self.num_ranks)


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
        num_lanes=int(e.get("DTRAIN_NUM_LANES", "0")),
    )


def meeting_store(meet: str, timeout_s: float) -> TCPStore:
    """Connect to the launcher's store at ``host:port``."""
    host, _, port = meet.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


class StoreMembership:
    """Membership through the meeting point, for one epoch. A rank speaks on each of its lanes, and listens on the first."""

    failed_may_return = True

    def __init__(self, store: Store, *, node: int, num_nodes: int, lanes: Sequence[int], epoch: int) -> None:
        self._store = store
        self._node, self._num_nodes, self._lanes, self._epoch = node, num_nodes, lanes, epoch
        self.words: Words = StoreWords(store, _words(epoch))
        self._there: set[str] = set()
        """Keys that others set, and have set."""
        self._shown = 0

    def gather(self, timeout_s: float, on_wait: OnWait) -> None:
        """Wait until this rank's counterparts on all islands are here; raises PeerLost naming who never came."""
        self._say("ready", "1")
        begun, say_at_s = time.monotonic(), SAY_EVERY_S
        missing = [n for n in range(self._num_nodes) if n != self._node]
        while True:
            missing = [n for n in missing if not self._store.check(self._keys("ready", n))]
            if not missing:
                return
            self.check_regroup()
            waited_s = time.monotonic() - begun
            if waited_s > timeout_s:
                for key in self._keys("ready", self._node):  # who comes later must not take it for here
                    self._store.delete_key(key)
                raise PeerLost(missing, f"did not come to the meeting point within {timeout_s:g} s")
            if waited_s > say_at_s:
                on_wait(tuple(missing), waited_s, timeout_s)
                say_at_s = waited_s + SAY_EVERY_S
            time.sleep(0.02 if waited_s < 1 else 0.5)

    def announce(self, notice: Notice) -> None:
        self._say("notice", ":".join(str(int(value)) for value in notice))

    def notices(self) -> dict[int, Notice]:
        out = {}
        for n in range(self._num_nodes):
            told = None if n == self._node else self._get(self._key("notice", n))
            if told is not None:
                step, merges, merging, failed = map(int, told.split(":"))
                out[n] = Notice(step, merges, merging == 1, failed == 1)
        return out

    def check_regroup(self) -> None:
        told = self._get("regroup")
        if told is not None:
            epoch, step = told.split(":")
            if int(epoch) > self._epoch:
                raise Regroup(int(epoch), int(step))

    def lost(self) -> tuple[int, ...]:
        told = self._get(_LOST)
        epoch, _, islands = (told or ":").partition(":")
        return tuple(map(int, islands.split(","))) if islands and int(epoch) == self._epoch else ()

    def beat(self, heard: int) -> None:
        self._shown += 1
        self._say("beat", f"{self._shown}:{heard}")

    def beats(self) -> Mapping[int, int]:
        return {n: shown for n, (shown, _) in enumerate(_beats(self._store, self._num_nodes, self._epoch, self._lanes[0]))}

    def _get(self, key: str) -> str | None:
        """None where nobody has set it yet: to get it then would wait for it."""
        if key not in self._there:
            if not self._store.check([key]):
                return None
            self._there.add(key)
        return self._store.get(key).decode()

    def _say(self, what: str, value: str) -> None:
        for key in self._keys(what, self._node):
            self._store.set(key, value)

    def _key(self, what: str, node: int) -> str:
        return _key(what, self._epoch, self._lanes[0], node)

    def _keys(self, what: str, node: int) -> list[str]:
        return [_key(what, self._epoch, lane, node) for lane in self._lanes]


def _key(what: str, epoch: int, lane: int, node: int) -> str:
    return f"{what}/{epoch}/{lane}/{node}"


def _words(epoch: int) -> str:
    return f"words/{epoch}"


def _beats(store: Store, num_nodes: int, epoch: int, lane: int) -> list[tuple[int, int]]:
    """How often each island has shown life, and how many words it had heard; nothing before all have."""
    keys = [_key("beat", epoch, lane, node) for node in range(num_nodes)]
    told = [beat.decode().split(":") for beat in store.multi_get(keys)] if store.check(keys) else []
    return [(int(shown), int(heard)) for shown, heard in told]


# ---- what the launcher says and does


def tell_lost(store: Store, epoch: int, islands: Sequence[int]) -> None:
    """All that are lost in this epoch."""
    store.set(_LOST, f"{epoch}:" + ",".join(map(str, islands)))


def forget_words(store: Store, num_nodes: int, epoch: int, forgotten: int) -> int:
    """Drop the words that all islands have heard, the first ``forgotten`` of which are dropped; returns how many are then. The
    store would grow by 1 GB in a week of 10 words a second."""
    heard = min((heard for _, heard in _beats(store, num_nodes, epoch, 0)), default=0)
    return forget(store, _words(epoch), forgotten, heard)


class Hub:
    """What islands of one process say of themselves, and to each other."""

    def __init__(self) -> None:
        self.notices: dict[int, Notice] = {}
        self.words = MemoryWords()
        self.beats: dict[int, int] = {}
        self.lock = threading.Lock()


class MemoryMembership:
    """Membership of islands in one process; what fails there does not come back."""

    failed_may_return = False

    def __init__(self, hub: Hub, node: int) -> None:
        self.words: Words = hub.words
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

    def lost(self) -> tuple[int, ...]:
        return ()

    def beat(self, heard: int) -> None:
        with self._hub.lock:
            self._hub.beats[self._node] = self._hub.beats.get(self._node, 0) + 1

    def beats(self) -> Mapping[int, int]:
        with self._hub.lock:
            return dict(self._hub.beats)

"""What does a slow link feel like? A wrapper that lets an island's bytes through at a rate and delays them by half a
round trip.

One uplink is shared by all ranks of an island: each wire reserves its time on the uplink's clock (a file of eight
bytes under a lock, so that separate processes share it), and is handed on when its last bit would have left."""

from __future__ import annotations

import fcntl
import queue
import struct
import threading
import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dtrain.transport.base import OWN_WORK_S, Left, Tag, Transport, nobody


class Uplink(Protocol):
    def reserve(self, wire_bytes: int) -> float:
        """The time (time.monotonic) at which wire_bytes more will have left."""
        ...


class MemoryUplink:
    """An uplink used by one process only."""

    def __init__(self, bits_per_s: float) -> None:
        self._bits_per_s = bits_per_s
        self._free_at = 0.0
        self._lock = threading.Lock()

    def reserve(self, wire_bytes: int) -> float:
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + wire_bytes * 8 / self._bits_per_s
            return self._free_at


class SharedUplink:
    """An uplink shared by the processes that open the same file; the clock is system-wide (CLOCK_MONOTONIC)."""

    def __init__(self, path: Path, bits_per_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._bits_per_s = bits_per_s
        self._lock = threading.Lock()  # flock keeps other processes out, not this one's other threads

    def reserve(self, wire_bytes: int) -> float:
        with self._lock:
            return self._reserve(wire_bytes)

    def _reserve(self, wire_bytes: int) -> float:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            self._file.seek(0)
            stored = self._file.read(8)
            # A file of another boot may hold a time far ahead; no reservation of this run can be a day away.
            free_at = struct.unpack("<d", stored)[0] if len(stored) == 8 else 0.0
            now = time.monotonic()
            start = free_at if now < free_at < now + 86400 else now
            done = start + wire_bytes * 8 / self._bits_per_s
            self._file.seek(0)
            self._file.truncate(0)
            self._file.write(struct.pack("<d", done))
            return done
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


@dataclass(frozen=True, slots=True)
class Hop:
    """What wires to some peers go through."""

    uplink: Uplink | None
    rtt_s: float


class Throttle:
    """A transport that sends through another one, late. Wires to peers of ``group`` go by ``near``, where there is one."""

    def __init__(
        self, inner: Transport, *, uplink: Uplink | None, rtt_s: float, near: Hop | None = None, group: Container[int] = ()
    ) -> None:
        self.inbox, self.wires_on = inner.inbox, inner.wires_on
        self._inner = inner
        self._group = group
        self._let_go = threading.Event()
        self._far = _Late(Hop(uplink, rtt_s), inner, self._let_go)
        self._near = self._far if near is None else _Late(near, inner, self._let_go)

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        (self._near if peer in self._group else self._far).post(peer, tag, wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        self._inner.expect(peer, tag, wire_bytes)

    def forget(self, peer: int, tag: Tag) -> None:
        self._inner.forget(peer, tag)

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        late = {self._far, self._near}
        until = time.monotonic() + drain_s
        for link in late:
            link.end()
        for link in late:
            link.thread.join(timeout=max(0.0, until - time.monotonic()))
        self._let_go.set()
        for link in late:
            link.thread.join(timeout=OWN_WORK_S)
        self._inner.close(drain_s=max(0.0, until - time.monotonic()), left=left)


class _Late:
    """Wires that wait for their last bit to have left, and for half a round trip."""

    def __init__(self, hop: Hop, inner: Transport, let_go: threading.Event) -> None:
        self._inner, self._let_go = inner, let_go
        self._uplink = hop.uplink
        self._one_way_s = hop.rtt_s / 2
        self._queue: queue.SimpleQueue[tuple[float, int, Tag, Tensor, torch.Event | None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._deliver, name="dtrain-throttle", daemon=True)
        self.thread.start()

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        left_at = self._uplink.reserve(wire.numel()) if self._uplink else time.monotonic()
        written = torch.cuda.current_stream(wire.device).record_event() if wire.is_cuda else None
        self._queue.put((left_at + self._one_way_s, peer, tag, wire, written))

    def end(self) -> None:
        """After what was posted."""
        self._queue.put(None)

    def _deliver(self) -> None:
        """Reservations of one process only grow, so first come is first served."""
        while (item := self._queue.get()) is not None:
            due, peer, tag, wire, written = item
            if self._let_go.wait(timeout=max(0.0, due - time.monotonic())):
                return
            if written is not None:
                torch.cuda.current_stream(wire.device).wait_event(written)
            self._inner.post(peer, tag, wire)

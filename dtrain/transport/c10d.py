"""How do islands of separate processes talk? torch's gloo, through a raw process group that joins rank r of every
island.

No default process group is touched. A gloo wait that times out closes healthy pairs too, so threads wait without a limit, and
limits are kept above (the engine's wait). Wires on a GPU go through host memory.

Wires come in another order than they are expected in: with levels a follower expects the result of a far round as soon as that
starts, and near wires of the same peer pass it. So each wire that is expected has a thread of its own, whatever the others do.
A bucket expects one wire of a peer at a time: there are at most as many such threads as buckets, of all levels together, times
peers (16 a level and peer for 2^28 parameters or fewer, 78 for 1.3e9, and one more at most for each fragment and dtype, unless
bucket_bytes says otherwise). A thread takes 30 kB, less than the buffer of most wires. Only wires of rounds that went on without
their senders (quorum) are waited for beside those. Sends have one thread a peer: it keeps their buffers until they have left, and
nothing waits for that but the end."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from dtrain.staging import Pool
from dtrain.transport.base import ROUND, Inbox, Left, Tag, join_sender, nobody
from dtrain.transport.gloo import NEVER, Work, break_off, gloo_group, reason

_IDLE_S, _BROKEN_S = 0.25, 5.0
"""For threads of sends that are through to end, and for all that wait to notice that their pair is closed; both do at once."""


class GlooTransport:
    """Point-to-point gloo between the islands' ranks at the ends of one lane."""

    def __init__(
        self, store: Store, prefix: str, node: int, num_nodes: int, *, interface: str, connect_s: float,
        inbox: Inbox | None = None,
    ) -> None:  # fmt: skip
        """``inbox``: where wires arrive, another's too; its own where none is given."""
        self.inbox, self.wires_on = inbox or Inbox(), torch.device("cpu")
        self._pool = Pool(self.wires_on)
        self._group = gloo_group(PrefixStore(prefix, store), node, num_nodes, interface=interface, connect_s=connect_s)
        self._receives = _Receives(self.inbox)
        self._sends = {peer: _Sends(self.inbox, peer) for peer in range(num_nodes) if peer != node}

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        host = wire.cpu()
        try:
            work = self._group.send([host], peer, _number(tag))
        except RuntimeError as e:  # gloo raises it where the peer's socket is already closed
            self.inbox.lose(peer, reason(e))
            return
        self._sends[peer].add(work, host)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        host = self._pool.take(wire_bytes) if tag.kind == ROUND else torch.empty(wire_bytes, dtype=torch.uint8)
        try:
            work = self._group.recv([host], peer, _number(tag))
        except RuntimeError as e:
            self.inbox.lose(peer, reason(e))
            return
        self._receives.add(peer, tag, work, host)

    def forget(self, peer: int, tag: Tag) -> None:
        self.inbox.discard(peer, tag)

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        until = time.monotonic() + max(drain_s, _IDLE_S)
        for sends in self._sends.values():
            sends.finish(until, left)
        for peer, sends in self._sends.items():
            if sends.busy or self._receives.of(peer):
                break_off(self._group, peer)
        broken_by = time.monotonic() + _BROKEN_S
        for sends in self._sends.values():
            sends.finish(broken_by, nobody)
        self._receives.finish(broken_by)


class _Sends:
    """One thread that waits for the wires to one peer, in the order in which they were posted."""

    def __init__(self, inbox: Inbox, peer: int) -> None:
        self._inbox, self._peer = inbox, peer
        self._queue: queue.SimpleQueue[tuple[Work, Tensor] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"dtrain-send-{peer}", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def add(self, work: Work, wire: Tensor) -> None:
        self._queue.put((work, wire))

    def finish(self, until: float, left: Left) -> None:
        self._queue.put(None)
        join_sender(self._thread, self._peer, until, left)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, wire = item
            try:
                work.wait(NEVER)
            except RuntimeError as e:  # gloo's only way to say that the pair is closed
                self._inbox.lose(self._peer, reason(e))
                return
            del item, work, wire  # while it waits for the next, this thread keeps no buffer in use


class _Receives:
    """Threads that each wait for one wire, of whichever peer, and then for the next that is expected: never more of them than
    wires were waited for at once."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._queue: queue.SimpleQueue[tuple[int, Tag, Work, Tensor] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._waits = Counter[int]()
        """By peer; there are as many threads or more."""
        self._open = True

    def of(self, peer: int) -> int:
        """Wires of a peer that are waited for."""
        with self._lock:
            return self._waits[peer]

    def add(self, peer: int, tag: Tag, work: Work, wire: Tensor) -> None:
        with self._lock:
            if not self._open:  # who still expects something while the link ends has nobody who waits for it
                return
            self._waits[peer] += 1
            self._queue.put((peer, tag, work, wire))
            if self._waits.total() > len(self._threads):
                self._threads.append(threading.Thread(target=self._run, name="dtrain-receive", daemon=True))
                self._threads[-1].start()

    def finish(self, until: float) -> None:
        with self._lock:
            self._open = False
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            peer, tag, work, wire = item
            lost = None
            try:
                work.wait(NEVER)
            except RuntimeError as e:  # gloo's only way to say that the pair is closed
                lost = reason(e)
            with self._lock:  # before it is known to have come: who takes it may expect the next at once
                self._waits[peer] -= 1
            if lost is None:
                self._inbox.deliver(peer, tag, wire)
            else:
                self._inbox.lose(peer, lost)
            del item, work, wire  # while it waits for the next, this thread keeps no buffer in use


def _number(tag: Tag) -> int:
    """31 bits, as gloo's tags are: kind 2, round 11 (only one of a bucket is under way), bucket 12, phase 6."""
    return tag.kind << 29 | (tag.round % 2048) << 18 | tag.bucket << 6 | tag.phase

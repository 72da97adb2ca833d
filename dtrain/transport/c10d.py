"""How do islands of separate processes talk? torch's gloo, through a raw process group that joins rank r of every
island.

No default process group is touched. A gloo wait that times out closes healthy pairs too, so each peer has one waiter
thread that waits without a limit, and limits are kept above (the engine's wait). Wires on a GPU go through host
memory."""

from __future__ import annotations

import queue
import threading
import time

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from dtrain.staging import Pool
from dtrain.transport.base import ROUND, Inbox, Left, Tag, join_sender, nobody
from dtrain.transport.gloo import NEVER, Work, break_off, gloo_group, reason

_IDLE_S, _BROKEN_S = 0.25, 5.0
"""For threads without a work to end, and for those that wait to notice that their pair is closed; both do at once."""


class GlooTransport:
    """Point-to-point gloo between the islands' ranks of one number."""

    def __init__(self, store: Store, prefix: str, node: int, num_nodes: int, *, interface: str, connect_s: float) -> None:
        self.inbox, self.wires_on = Inbox(), torch.device("cpu")
        self._pool = Pool(self.wires_on)
        self._group = gloo_group(PrefixStore(prefix, store), node, num_nodes, interface=interface, connect_s=connect_s)
        self._receives = {peer: _Waiter(self.inbox, peer) for peer in range(num_nodes) if peer != node}
        self._sends = {peer: _Waiter(self.inbox, peer) for peer in range(num_nodes) if peer != node}

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        host = wire.cpu()
        try:
            work = self._group.send([host], peer, _number(tag))
        except RuntimeError as e:  # gloo raises it where the peer's socket is already closed
            self.inbox.lose(peer, reason(e))
            return
        self._sends[peer].add(work, None, host)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        host = self._pool.take(wire_bytes) if tag.kind == ROUND else torch.empty(wire_bytes, dtype=torch.uint8)
        try:
            work = self._group.recv([host], peer, _number(tag))
        except RuntimeError as e:
            self.inbox.lose(peer, reason(e))
            return
        self._receives[peer].add(work, tag, host)

    def forget(self, peer: int, tag: Tag) -> None:
        self._receives[peer].forget(tag)

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        until = time.monotonic() + drain_s
        for waiter in self._sends.values():
            waiter.finish(until, left)
        idle_by = time.monotonic() + _IDLE_S
        for peer, waiter in self._receives.items():
            waiter.finish(idle_by, nobody)
            if waiter.busy or self._sends[peer].busy:
                break_off(self._group, peer)
        broken_by = time.monotonic() + _BROKEN_S
        for waiter in (*self._receives.values(), *self._sends.values()):
            waiter.finish(broken_by, nobody)


class _Waiter:
    """One thread that waits for one peer's works, in the order in which both sides started them."""

    def __init__(self, inbox: Inbox, peer: int) -> None:
        self._inbox = inbox
        self._peer = peer
        self._queue: queue.SimpleQueue[tuple[Work, Tag | None, Tensor] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._current: Tag | None = None
        self._forgotten: set[Tag] = set()
        self._threads: list[threading.Thread] = []
        self._start()

    @property
    def busy(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def add(self, work: Work, tag: Tag | None, wire: Tensor) -> None:
        self._queue.put((work, tag, wire))

    def forget(self, tag: Tag) -> None:
        """Works that were started after this one are waited for by another thread."""
        with self._lock:
            self._forgotten.add(tag)
            if self._current == tag:
                self._start()

    def finish(self, until: float, left: Left) -> None:
        self._queue.put(None)
        for thread in self._threads:
            join_sender(thread, self._peer, until, left)

    def _start(self) -> None:
        self._threads.append(threading.Thread(target=self._run, name=f"dtrain-link-{self._peer}", daemon=True))
        self._threads[-1].start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, tag, wire = item
            with self._lock:
                if tag in self._forgotten:
                    continue
                self._current = tag
            try:
                work.wait(NEVER)
            except RuntimeError as e:  # gloo's only way to say that the pair is closed
                self._inbox.lose(self._peer, reason(e))
                return
            with self._lock:
                if tag in self._forgotten:
                    return
                self._current = None
            if tag is not None:
                self._inbox.deliver(self._peer, tag, wire)
            del item, work, wire  # while it waits for the next, this thread keeps no buffer in use


def _number(tag: Tag) -> int:
    """31 bits, as gloo's tags are: kind 2, round 11 (only one of a bucket is under way), bucket 12, phase 6."""
    return tag.kind << 29 | (tag.round % 2048) << 18 | tag.bucket << 6 | tag.phase

"""How do near, static islands talk over a backend whose messages have no names? NCCL's pair up by the order in which
they are issued.

Each direction of each pair has a communicator of its own, and its sender alone decides the order: it announces every
wire (name and length) on a gloo control channel, then sends it; the receiver takes wires in the announced order into
buffers of the announced length. So no order has to be agreed between islands, and no wire waits for one that the
receiver does not expect yet. A lost peer ends the job here; links that may break belong to c10d."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from dtrain.transport.base import Inbox, Left, Tag, join_sender, nobody
from dtrain.transport.gloo import NEVER, PointToPoint, Work, break_off, gloo_group, reason

_BROKEN_S = 5.0
"""For a receiver to notice that its control channel is closed; it does at once."""

MakeGroup = Callable[[Store, int, int], PointToPoint]
"""(store, rank, size) -> a group of two ranks that carries wires one way."""


def nccl_group(device: torch.device) -> MakeGroup:
    """Raises ValueError where there is no GPU or no NCCL: a backend that was asked for is never replaced."""
    if device.type != "cuda" or not dist.is_nccl_available():
        raise ValueError('link.transport = "nccl" needs a GPU and a torch built with NCCL; use "c10d"')

    def make(store: Store, rank: int, size: int) -> PointToPoint:
        nccl: Any = dist.ProcessGroupNCCL
        return cast(PointToPoint, nccl(store, rank, size, nccl.Options()))

    return make


class OrderedTransport:
    """Point-to-point wires in the sender's order; ``make_group`` chooses what carries them."""

    def __init__(
        self,
        store: Store,
        prefix: str,
        node: int,
        num_nodes: int,
        *,
        make_group: MakeGroup,
        interface: str,
        device: torch.device,
        connect_s: float,
        inbox: Inbox | None = None,
    ) -> None:
        """``inbox``: where wires arrive, another's too; its own where none is given."""
        self.inbox, self.wires_on = inbox or Inbox(), device
        self._device = device
        meet = PrefixStore(f"{prefix}/control", store)
        control = gloo_group(meet, node, num_nodes, interface=interface, connect_s=connect_s)
        self._control = control
        self._receivers: dict[int, _Receiver] = {}
        self._senders: dict[int, _Sender] = {}
        # Every node makes its groups in the order of (low, high), so that no two wait for each other.
        for low, high in [(a, b) for b in range(num_nodes) for a in range(b) if node in (a, b)]:
            peer = high if node == low else low
            for source in (low, high):
                name = f"{prefix}/{low}-{high}/from{source}"
                group = make_group(PrefixStore(name, store), 0 if node == source else 1, 2)
                if node == source:
                    self._senders[peer] = _Sender(self.inbox, control, group, peer, device)
                else:
                    self._receivers[peer] = _Receiver(self.inbox, control, group, peer, device)

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        self._senders[peer].add(tag, wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        """Nothing to make ready: a wire is announced with its length."""

    def forget(self, peer: int, tag: Tag) -> None:
        """Nothing waits for it: a wire that does not come is not announced."""

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        until = time.monotonic() + drain_s
        for sender in self._senders.values():
            sender.finish(until, left)
        for peer in self._receivers:
            break_off(self._control, peer)
        broken_by = time.monotonic() + _BROKEN_S
        for peer, receiver in self._receivers.items():
            self._senders[peer].finish(broken_by, nobody)
            receiver.thread.join(timeout=max(0.0, broken_by - time.monotonic()))


class _Sender:
    def __init__(
        self, inbox: Inbox, control: PointToPoint, group: PointToPoint, peer: int, device: torch.device
    ) -> None:
        self._inbox, self._control, self._group, self._peer, self._device = inbox, control, group, peer, device
        self._queue: queue.SimpleQueue[tuple[Tag, Tensor, torch.Event | None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"dtrain-send-{peer}", daemon=True)
        self._thread.start()

    def add(self, tag: Tag, wire: Tensor) -> None:
        written = torch.cuda.current_stream(self._device).record_event() if wire.is_cuda else None
        self._queue.put((tag, wire, written))

    def finish(self, until: float, left: Left) -> None:
        self._queue.put(None)
        join_sender(self._thread, self._peer, until, left)

    def _run(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        while (item := self._queue.get()) is not None:
            tag, wire, written = item
            try:
                self._control.send([torch.tensor([*tag, wire.numel()])], self._peer, 0).wait(NEVER)
                _carry(lambda wire=wire: self._group.send([wire], 1, 0), stream, written)
            except RuntimeError as e:  # the only way in which a group says that its peer is gone
                self._inbox.lose(self._peer, reason(e))
                return


class _Receiver:
    def __init__(
        self, inbox: Inbox, control: PointToPoint, group: PointToPoint, peer: int, device: torch.device
    ) -> None:
        self._inbox, self._control, self._group, self._peer, self._device = inbox, control, group, peer, device
        self.thread = threading.Thread(target=self._run, name=f"dtrain-receive-{peer}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        announced = torch.empty(5, dtype=torch.int64)
        try:
            while True:
                self._control.recv([announced], self._peer, 0).wait(NEVER)
                kind, index, bucket, phase, wire_bytes = announced.tolist()
                wire = torch.empty(wire_bytes, dtype=torch.uint8, device=self._device)
                # Its memory may have been freed by a kernel that this thread's stream has not come to yet.
                free = torch.cuda.current_stream(self._device).record_event() if wire.is_cuda else None
                _carry(lambda wire=wire: self._group.recv([wire], 0, 0), stream, free)
                self._inbox.deliver(self._peer, Tag(kind, index, bucket, phase), wire)
        except RuntimeError as e:  # the only way in which a group says that its peer is gone
            self._inbox.lose(self._peer, reason(e))


def _carry(issue: Callable[[], Work], stream: torch.cuda.Stream | None, after: torch.Event | None) -> None:
    """Issue a transfer and wait until its bytes are there; on a GPU on a stream of its own, behind what wrote the
    wire."""
    if stream is None:
        issue().wait(NEVER)
        return
    with torch.cuda.stream(stream):
        if after is not None:
            stream.wait_event(after)
        issue().wait()
    stream.synchronize()

"""What does this machine's link give, and what do carrying and encoding cost it? Short measurements, on the real transport.

Two islands of this process talk over gloo on the loopback, shaped as the job says. Costs are CPU time of all threads, which other
programs on the machine do not stretch as they stretch the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from statistics import median

import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from dtrain.bucket import whole
from dtrain.codec import BoundCodec, plain
from dtrain.connect import LinkSettings
from dtrain.core import Flight
from dtrain.link import Link
from dtrain.plan.model import LinkSpeed
from dtrain.topology.one_peer import one_peer_exponential
from dtrain.traffic import Traffic
from dtrain.transport.base import ROUND, Tag, Transport
from dtrain.transport.c10d import GlooTransport
from dtrain.transport.throttle import MemoryUplink, Throttle

_CPU = torch.device("cpu")
_LIMIT_S = 60.0
_PINGS = 9
_BULK_S = 0.3
"""How long the wire takes that the rate is found with: long against the jitter of threads, some 0.1 ms."""
_MOST_BULK_BYTES = 2**25
_ROUNDS = 40
_LARGE = 2**17
"""Elements: a bucket of a small model, of half a megabyte."""


def probe_link(settings: LinkSettings) -> LinkSpeed:
    """Round trip of a small wire, and the rate of a long one less half of that."""
    with _pair(settings) as (one, other):
        _send(one, other, 1, 0)  # the first wire finds threads that are not awake yet
        rtt_s = median(_send(one, other, 1, 2 * i + 2) + _send(other, one, 1, 2 * i + 3) for i in range(_PINGS))
        bulk_bytes = _MOST_BULK_BYTES
        if settings.bits_per_s is not None:
            bulk_bytes = min(bulk_bytes, max(1024, int(settings.bits_per_s * _BULK_S / 8)))
        took_s = median(_send(one, other, bulk_bytes, 100 + i) for i in range(3))
    return LinkSpeed(bulk_bytes * 8 / max(took_s - rtt_s / 2, 1e-9), rtt_s)


def _send(sender: Transport, receiver: Transport, num_bytes: int, number: int) -> float:
    """Seconds until a wire is there."""
    tag, wire = Tag(ROUND, number, 0, 0), torch.zeros(num_bytes, dtype=torch.uint8)
    peer = 0 if number % 2 and num_bytes == 1 else 1
    source = 1 - peer
    receiver.expect(source, tag, num_bytes)
    begun = time.monotonic()
    sender.post(peer, tag, wire)
    with receiver.inbox.changed:
        receiver.inbox.changed.wait_for(lambda: receiver.inbox.has(source, tag), timeout=_LIMIT_S)
    took_s = time.monotonic() - begun
    receiver.inbox.pop(source, tag)
    return took_s


@contextmanager
def _pair(settings: LinkSettings) -> Iterator[tuple[Transport, Transport]]:
    store = HashStore()

    def make(node: int) -> Transport:
        transport: Transport = GlooTransport(store, "probe", node, 2, interface="lo", connect_s=_LIMIT_S)
        if settings.bits_per_s is None and settings.rtt_s == 0:
            return transport
        uplink = MemoryUplink(settings.bits_per_s) if settings.bits_per_s is not None else None
        return Throttle(transport, uplink=uplink, rtt_s=settings.rtt_s)

    with ExitStack() as closing, ThreadPoolExecutor(2) as pool:
        transports = list(pool.map(make, range(2)))
        for transport in transports:
            closing.callback(transport.close, drain_s=0.0)
        yield transports[0], transports[1]


def probe_carrying() -> tuple[float, float]:
    """CPU seconds of a wire, and of each of its bytes, for who sends it and hears one like it: copied, sent, received,
    checked."""
    with _pair(LinkSettings()) as pair, ExitStack() as closing:
        traffic = [Traffic(transport, _CPU) for transport in pair]
        for one in traffic:
            closing.callback(one.close, drain_s=0.0)
        small, large = (_round_cpu_s(traffic, numel) for numel in (64, _LARGE))
    per_byte_s = max(0.0, large - small) / (4 * (_LARGE - 64))
    return small, per_byte_s


def _round_cpu_s(traffic: list[Traffic], numel: int) -> float:
    codec = plain("identity").bind(whole("probe", torch.empty(numel, device="meta")))
    wires = [codec.new_wire(_CPU) for _ in range(2)]
    for wire in wires:
        codec.encode(torch.zeros(numel), wire, {})

    def fly(count: int) -> None:
        for index in range(count):
            flights = [_swap(codec, wires[node], node, Tag(ROUND, index, numel % 97, 0)) for node in (0, 1)]
            for one, flight in zip(traffic, flights, strict=True):
                one.launch([flight])
            for one, flight in zip(traffic, flights, strict=True):
                one.wait([flight], _LIMIT_S)

    fly(3)
    return _cpu_s(lambda: fly(_ROUNDS)) / (2 * _ROUNDS)


def _swap(codec: BoundCodec, wire: Tensor, node: int, tag: Tag) -> Flight:
    link = Link(node, 2, one_peer_exponential(0, node, 2))

    def generate() -> Iterator[None]:
        link.post(1 - node, wire)
        link.expect(1 - node, codec.wire_bytes, codec.check)
        yield

    return Flight(generate(), link, kind=tag.kind, index=tag.round, bucket=tag.bucket, step=0)


@cache
def memory_bytes_per_s(codec: str) -> float:
    """At which encoding into a codec's wire and mixing two of them move bytes, on one thread."""
    bound = plain(codec).bind(whole("probe", torch.empty(_LARGE, device="meta")))
    x, wire = torch.randn(_LARGE, generator=torch.Generator().manual_seed(0)), bound.new_wire(_CPU)

    def both() -> None:
        bound.encode(x, wire, {})
        bound.mix(x, [wire, wire], [-0.5, 0.5])

    both()
    moved = (4 * _LARGE + bound.wire_bytes) + (8 * _LARGE + 2 * bound.wire_bytes)
    return moved * 10 / _cpu_s(lambda: [both() for _ in range(10)])


def _cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun

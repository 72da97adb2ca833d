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
from threading import Barrier

import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

from dtrain.bucket import whole
from dtrain.connect import Connection, LinkSettings
from dtrain.engine import join
from dtrain.island.replicas import Alone
from dtrain.membership import Hub, MemoryMembership
from dtrain.own_codec import codec_of
from dtrain.plan.company import LinkSpeed
from dtrain.plan.model import Carrying
from dtrain.transport.base import ROUND, Tag, Transport
from dtrain.transport.c10d import GlooTransport
from dtrain.transport.throttle import MemoryUplink, Throttle

_CPU = torch.device("cpu")
_LIMIT_S = 60.0
_PINGS = 9
_BULK_S = 0.3
"""How long the wire takes that the rate is found with: long against the jitter of threads, some 0.1 ms."""
_MOST_BULK_BYTES = 2**25
_WARM_ROUNDS, _ROUNDS = 5, 60
_SEVERAL = 5
_PASSES = 20
_LARGE = 2**17
"""Elements: a bucket of a small model, of half a megabyte."""


def probe_link(settings: LinkSettings) -> LinkSpeed:
    """Round trip of a small wire, and the rate of a long one less half of that."""
    with _linked(settings, 2) as (one, other):
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
def _linked(settings: LinkSettings, num_islands: int) -> Iterator[list[Transport]]:
    store = HashStore()

    def make(node: int) -> Transport:
        transport: Transport = GlooTransport(store, "probe", node, num_islands, interface="lo", connect_s=_LIMIT_S)
        if settings.bits_per_s is None and settings.rtt_s == 0:
            return transport
        uplink = MemoryUplink(settings.bits_per_s) if settings.bits_per_s is not None else None
        return Throttle(transport, uplink=uplink, rtt_s=settings.rtt_s)

    with ExitStack() as closing, ThreadPoolExecutor(num_islands) as pool:
        transports = list(pool.map(make, range(num_islands)))
        for transport in transports:
            closing.callback(transport.close, drain_s=0.0)
        yield transports


def probe_carrying() -> Carrying:
    """CPU time of everything that a round of a bucket does but encoding and mixing, which ``memory_bytes_per_s`` measures: of two
    islands, of more, whose rounds are as many with more wires, and of two with longer wires."""
    with _one_thread():
        one, several, long = _round_cpu_s(64, 2), _round_cpu_s(64, _SEVERAL), _round_cpu_s(_LARGE, 2)
    wire_s = min(one, max(0.0, several - one) / (_SEVERAL - 2))
    # dpsgd reads x and writes a wire; then it reads x and two wires, and writes x.
    mixing_s = 6 * 4 * _LARGE / memory_bytes_per_s("identity")
    return Carrying(one - wire_s, wire_s, max(0.0, long - one - mixing_s) / (4 * _LARGE))


def _round_cpu_s(numel: int, num_islands: int) -> float:
    """Of an island: rounds of the engine over gloo, without a step in between."""
    exits = Hub()
    spent_s = 0.0
    with _linked(LinkSettings(), num_islands) as transports:
        links = [
            Connection(n, num_islands, t, MemoryMembership(exits, n), Alone(), _LIMIT_S) for n, t in enumerate(transports)
        ]
        begin, end = Barrier(num_islands + 1), Barrier(num_islands + 1)

        def island(connection: Connection) -> None:
            model = nn.Linear(numel, 1, bias=False)
            with join(model, [], recipe="dpsgd", topology="complete", bucket_bytes=4 * numel, link=connection) as sync:
                for count in (_WARM_ROUNDS, _ROUNDS):
                    begin.wait(_LIMIT_S)
                    for _ in range(count):
                        sync.before_update()
                        sync.after_update()
                    sync.settle()
                    end.wait(_LIMIT_S)

        with ThreadPoolExecutor(num_islands) as pool:
            ended = [pool.submit(island, link) for link in links]
            for _ in range(2):
                begin.wait(_LIMIT_S)
                begun = time.process_time()
                end.wait(_LIMIT_S)
                spent_s = time.process_time() - begun
            for one in ended:
                one.result()
    return spent_s / (num_islands * _ROUNDS)


@cache
def memory_bytes_per_s(codec: str) -> float:
    """At which encoding into a codec's wire and mixing two of them move bytes, on one thread."""
    bound = codec_of(codec, error_feedback=False).bind(whole("probe", torch.empty(_LARGE, device="meta")))
    x, wire = torch.randn(_LARGE, generator=torch.Generator().manual_seed(0)), bound.new_wire(_CPU)
    state = bound.init(_CPU)

    def both() -> None:
        bound.encode(x, wire, state)
        bound.mix(x, [wire, wire], [-0.5, 0.5])

    moved = (4 * _LARGE + bound.wire_bytes) + (8 * _LARGE + 2 * bound.wire_bytes)
    with _one_thread():
        both()
        return moved * _PASSES / _cpu_s(lambda: [both() for _ in range(_PASSES)])


def _cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch's threads wait for each other at work, and on a busy machine that is most of their CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

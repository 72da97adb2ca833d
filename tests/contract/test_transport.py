"""Does every transport carry named bytes, in whatever order they are posted and expected, and tell of a peer that is gone?

One suite over all of them. Nodes are threads of this process; gloo's talk over 127.0.0.1. ``ordered`` runs with gloo in
place of NCCL: what it adds, the announcements and the order, is the same.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store

from dtrain.transport.base import MERGE, ROUND, START, Inbox, Left, Tag, Transport, nobody
from dtrain.transport.c10d import GlooTransport
from dtrain.transport.gloo import PointToPoint, gloo_group, reason
from dtrain.transport.local import LocalHub
from dtrain.transport.ordered import OrderedTransport, nccl_group
from dtrain.transport.throttle import MemoryUplink, SharedUplink, Throttle

CPU = torch.device("cpu")
WITHIN_S = 20.0

Opened = list[Transport]


def _each(num_nodes: int, make: Callable[[int], Transport]) -> Opened:
    """Groups are made by all their members at once."""
    with ThreadPoolExecutor(num_nodes) as pool:
        return list(pool.map(make, range(num_nodes)))


def _local(num_nodes: int) -> Opened:
    hub = LocalHub(num_nodes)
    return [hub.transport(node) for node in range(num_nodes)]


def _gloo(num_nodes: int) -> Opened:
    store = HashStore()
    return _each(num_nodes, lambda node: GlooTransport(store, "link", node, num_nodes, interface="lo", connect_s=WITHIN_S))


def _ordered(num_nodes: int) -> Opened:
    store = HashStore()

    def group(store: Store, rank: int, size: int) -> PointToPoint:
        return gloo_group(PrefixStore("pair", store), rank, size, interface="lo", connect_s=WITHIN_S)

    def make(node: int) -> Transport:
        return OrderedTransport(
            store, "link", node, num_nodes, make_group=group, interface="lo", device=CPU, connect_s=WITHIN_S
        )

    return _each(num_nodes, make)


def _throttled(num_nodes: int) -> Opened:
    return [Throttle(t, uplink=MemoryUplink(1e9), rtt_s=0.002) for t in _gloo(num_nodes)]


KINDS: dict[str, Callable[[int], Opened]] = {"local": _local, "c10d": _gloo, "ordered": _ordered, "throttle": _throttled}
every_transport = pytest.mark.parametrize("kind", KINDS)


@contextmanager
def opened(kind: str, num_nodes: int) -> Iterator[Opened]:
    with ExitStack() as closing:
        transports = KINDS[kind](num_nodes)
        for transport in transports:
            closing.callback(transport.close, drain_s=0.0)
        yield transports


def bytes_of(seed: int, count: int) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def arrived(transport: Transport, peer: int, tag: Tag) -> Tensor:
    inbox = transport.inbox
    with inbox.changed:
        here = inbox.changed.wait_for(lambda: inbox.has(peer, tag) or peer in inbox.lost(), timeout=WITHIN_S)
    assert here, f"{tag} from {peer}: not within {WITHIN_S} s"
    assert inbox.has(peer, tag), inbox.lost()
    return inbox.pop(peer, tag)


@every_transport
def test_wires_find_their_names_in_whatever_order_they_come(kind: str) -> None:
    """Three nodes, each sending 24 wires to each other one, posted in one order and expected in another."""
    tags = [Tag(k, r, b, p) for k in (START, ROUND, MERGE) for r in (0, 7) for b in (0, 4095) for p in (0, 1)]
    rng = random.Random(0)

    def wire(sender: int, receiver: int, tag: Tag) -> Tensor:
        return bytes_of(hash((sender, receiver, tag)), 1 + hash(tag) % 5000)

    with opened(kind, 3) as nodes:
        jobs: list[Callable[[], None]] = []
        for here, transport in enumerate(nodes):
            for there in {0, 1, 2} - {here}:
                for tag in tags:
                    jobs.append(lambda t=transport, h=here, p=there, tag=tag: t.post(p, tag, wire(h, p, tag)))
                    jobs.append(lambda t=transport, h=here, p=there, tag=tag: t.expect(p, tag, wire(p, h, tag).numel()))
        rng.shuffle(jobs)
        for job in jobs:
            job()
        for here, transport in enumerate(nodes):
            for there in {0, 1, 2} - {here}:
                for tag in rng.sample(tags, len(tags)):
                    assert torch.equal(arrived(transport, there, tag), wire(there, here, tag))


@every_transport
def test_a_long_wire_comes_whole(kind: str) -> None:
    tag, sent = Tag(ROUND, 3, 2, 0), bytes_of(1, 5_000_001)
    with opened(kind, 2) as (one, other):
        other.expect(0, tag, sent.numel())
        one.post(1, tag, sent)
        assert torch.equal(arrived(other, 0, tag), sent)


@every_transport
def test_a_name_can_be_used_again_once_its_wire_was_taken(kind: str) -> None:
    tag = Tag(ROUND, 1, 1, 1)
    with opened(kind, 2) as (one, other):
        for k in range(20):
            other.expect(0, tag, 100)
            one.post(1, tag, bytes_of(k, 100))
            assert torch.equal(arrived(other, 0, tag), bytes_of(k, 100))


@every_transport
def test_closing_with_time_lets_every_posted_wire_leave(kind: str) -> None:
    tags = [Tag(ROUND, r, 0, 0) for r in range(50)]
    with opened(kind, 2) as (one, other):
        for tag in tags:
            other.expect(0, tag, 20_000)
        for k, tag in enumerate(tags):
            one.post(1, tag, bytes_of(k, 20_000))
        one.close(drain_s=WITHIN_S)
        for k, tag in enumerate(tags):
            assert torch.equal(arrived(other, 0, tag), bytes_of(k, 20_000))


@every_transport
def test_a_wire_that_is_forgotten_holds_up_none_behind_it(kind: str) -> None:
    dropped, later = Tag(ROUND, 1, 0, 0), Tag(ROUND, 2, 0, 0)
    with opened(kind, 2) as (one, other):
        other.expect(0, dropped, 100)
        other.expect(0, later, 100)
        other.forget(0, dropped)
        one.post(1, later, bytes_of(5, 100))
        assert torch.equal(arrived(other, 0, later), bytes_of(5, 100))


@every_transport
def test_a_wire_that_comes_late_holds_up_none_that_is_expected_after_it(kind: str) -> None:
    """As with levels, where a far round's result is expected before the near rounds that pass it: here the wire that is expected
    last comes first, alone, whether it is of the same bucket, round or kind."""
    tags = [Tag(k, r, b, p) for k in (ROUND, MERGE) for r in (0, 7) for b in (0, 1) for p in (3, 0)]
    with opened(kind, 2) as (one, other):
        for tag in tags:
            other.expect(0, tag, 100)
        for k, tag in reversed(list(enumerate(tags))):
            one.post(1, tag, bytes_of(k, 100))
            assert torch.equal(arrived(other, 0, tag), bytes_of(k, 100))


def test_gloo_has_a_thread_for_each_wire_awaited_at_once_and_no_more_and_all_end() -> None:
    """Three peers, two buckets, many rounds; in the last round nothing comes."""
    before, buckets, rounds = set(threading.enumerate()), 2, 20
    with opened("c10d", 4) as (one, *others):
        for k in range(rounds):
            tags = [Tag(ROUND, k, b, 0) for b in range(buckets)]
            for peer in (1, 2, 3):
                for tag in tags:
                    one.expect(peer, tag, 100)
            for peer, other in enumerate(others, start=1):
                for tag in tags:
                    if k < rounds - 1:
                        other.post(0, tag, bytes_of(peer, 100))
                        assert torch.equal(arrived(one, peer, tag), bytes_of(peer, 100))
        receiving = [t for t in set(threading.enumerate()) - before if t.name == "dtrain-receive"]
        assert len(receiving) == 3 * buckets
    ended = [t for t in set(threading.enumerate()) - before if t.name.startswith("dtrain")]
    assert ended == [], "a thread that is left inside gloo aborts the interpreter's end"


@pytest.mark.parametrize("kind", ["c10d", "ordered", "throttle"])
def test_a_peer_that_is_gone_is_named_and_the_others_talk_on(kind: str) -> None:
    tag = Tag(ROUND, 1, 0, 0)
    with opened(kind, 3) as nodes:
        for there in (0, 2):
            nodes[1].expect(there, tag, 1000)
        nodes[2].expect(1, tag, 1000)  # it fails in the middle of a round
        nodes[2].close(drain_s=0.0)
        inbox = nodes[1].inbox
        with inbox.changed:
            assert inbox.changed.wait_for(lambda: 2 in inbox.lost(), timeout=WITHIN_S), "node 2 left"
        assert set(inbox.lost()) == {2}
        nodes[0].post(1, tag, bytes_of(9, 1000))
        assert torch.equal(arrived(nodes[1], 0, tag), bytes_of(9, 1000))


@pytest.mark.parametrize("kind", ["c10d", "throttle"])
def test_closing_does_not_wait_for_a_peer_that_has_left_without_asking(kind: str) -> None:
    """A wire that nobody expects never leaves; the peer has said good-bye, so nobody will."""
    with opened(kind, 2) as (one, _):
        one.post(1, Tag(ROUND, 1, 0, 0), bytes_of(0, 4_000_000))
        begun = time.monotonic()
        one.close(drain_s=600.0, left=lambda: {1})
        assert time.monotonic() - begun < WITHIN_S


def test_a_peer_that_never_comes_is_not_waited_for_without_end() -> None:
    with pytest.raises(RuntimeError):
        GlooTransport(HashStore(), "link", 0, 2, interface="lo", connect_s=0.5)


def test_a_wire_may_take_longer_than_connecting() -> None:
    """gloo has one limit for both unless told otherwise, and closes the pair when it has passed."""
    store, tag, connect_s = HashStore(), Tag(ROUND, 1, 0, 0), 1.0

    def make(node: int) -> Transport:
        return GlooTransport(store, "link", node, 2, interface="lo", connect_s=connect_s)

    one, other = _each(2, make)
    try:
        other.expect(0, tag, 100)
        with other.inbox.changed:
            assert not other.inbox.changed.wait_for(lambda: 0 in other.inbox.lost(), timeout=2 * connect_s)
        one.post(1, tag, bytes_of(3, 100))
        assert torch.equal(arrived(other, 0, tag), bytes_of(3, 100))
    finally:
        one.close(drain_s=0.0)
        other.close(drain_s=0.0)


def test_what_gloo_says_is_cut_to_what_helps() -> None:
    long = "[/build/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:4711. This is typically caused by\nmore"
    assert reason(RuntimeError(long)) == "Connection closed by peer [10.0.0.2]:4711"
    assert reason(RuntimeError("Timed out waiting 1ms")) == "Timed out waiting 1ms"
    assert reason(RuntimeError()) == "RuntimeError"


def test_nccl_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r'link.transport = "nccl" needs a GPU.*use "c10d"'):
        nccl_group(CPU)


# The throttle's promise is a time before which no wire leaves; only ever the earliest is checked, never how fast it is.


class _Recorder:
    """An inner transport that notes when a wire was handed on."""

    wires_on = torch.device("cpu")

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.posts: list[tuple[float, Tag]] = []

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        self.posts.append((time.monotonic(), tag))

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        """Not of interest here."""

    def forget(self, peer: int, tag: Tag) -> None:
        """Not of interest here."""

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        """Not of interest here."""


def test_no_wire_leaves_before_its_last_bit_would_have() -> None:
    inner, wire_bytes, bits_per_s, rtt_s = _Recorder(), 2_500, 1e6, 0.05  # 20 ms a wire
    throttle = Throttle(inner, uplink=MemoryUplink(bits_per_s), rtt_s=rtt_s)
    begun = time.monotonic()
    for k in range(5):
        throttle.post(1, Tag(ROUND, k, 0, 0), torch.zeros(wire_bytes, dtype=torch.uint8))
    throttle.close(drain_s=WITHIN_S)
    assert [tag.round for _, tag in inner.posts] == list(range(5))
    for k, (at, _) in enumerate(inner.posts):
        assert at - begun >= (k + 1) * wire_bytes * 8 / bits_per_s + rtt_s / 2


def test_one_uplink_is_shared_by_all_who_open_it(tmp_path: Path) -> None:
    """Two ranks of an island reserve in turn: together they get the rate, not each."""
    ranks = [SharedUplink(tmp_path / "uplink.clock", 1e6) for _ in range(2)]
    done = [ranks[k % 2].reserve(125_000) for k in range(6)]  # a second each
    assert [b - a for a, b in pairwise(done)] == pytest.approx([1.0] * 5, abs=1e-9)


def test_threads_of_one_rank_share_its_uplink_too(tmp_path: Path) -> None:
    """Rounds start on the main thread while others go on in the background; no second may be given twice."""
    uplink = SharedUplink(tmp_path / "uplink.clock", 1e6)
    with ThreadPoolExecutor(4) as pool:
        done = sorted(pool.map(uplink.reserve, [125_000] * 400))  # a second each
    assert [b - a for a, b in pairwise(done)] == pytest.approx([1.0] * 399, abs=1e-9)


@pytest.mark.parametrize("rest_of_the_file", [b"", b"\0", b"\xff" * 8, bytes(8), b"\x00\x00\x00\x00\x00\x00\xf8\x7f"])
def test_a_clock_of_another_boot_does_not_stop_the_link(tmp_path: Path, rest_of_the_file: bytes) -> None:
    path = tmp_path / "uplink.clock"
    path.write_bytes(rest_of_the_file)
    assert SharedUplink(path, 1e6).reserve(125) - time.monotonic() <= 0.001

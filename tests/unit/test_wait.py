"""When is an island that sends nothing lost, and when is it only slow? By a clock that a test moves on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from dtrain.connect import connect_local
from dtrain.core import Flight
from dtrain.errors import NonFinite, PeerLost, Regroup
from dtrain.link import Link
from dtrain.topology.static import complete
from dtrain.traffic import Traffic
from dtrain.transport.base import MERGE, Tag
from dtrain.wait import _REGROUP, Wait

N, WIRE_BYTES, LIMIT_S, WITHIN_S = 3, 2500, 10.0, 60.0
Arrival = tuple[int, int, int]
"""(peer, bucket, phase)"""


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def flight(bucket: int, phases: int) -> Flight:
    """Expects a wire of both others in each phase."""
    link = Link(0, N, complete(0, 0, N))

    def run() -> Iterator[None]:
        for _ in range(phases):
            for peer in link.others():
                link.expect(peer, WIRE_BYTES)
            yield

    return Flight(run(), link, kind=MERGE, index=0, bucket=bucket, step=0)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    """Waits as island 0 of 3 for two phases of a few buckets, one ``arrival`` or none at each look, which is ``look_s`` after the
    last; returns how long it took. ``broken``: peers of which the link is known to be."""

    def wait_for(arrivals: Sequence[Arrival | None], look_s: float, buckets: int, broken: Sequence[int] = ()) -> float:
        clock, connections = Clock(), connect_local(N, timeout_s=LIMIT_S)
        monkeypatch.setattr("dtrain.wait.time", clock)
        transports = [connection.transport for connection in connections]
        traffic, flights = Traffic(transports[0], torch.device("cpu")), [flight(b, phases=2) for b in range(buckets)]
        really, coming = traffic.wait, iter(arrivals)

        def look(flights: Sequence[Flight], timeout_s: float) -> bool:
            clock.now_s += look_s
            assert clock.now_s < 20 * LIMIT_S, "it waits for ever"
            arrival = next(coming, None)
            if arrival is not None:
                peer, bucket, phase = arrival
                to = flights[bucket]
                transports[peer].post(0, Tag(MERGE, 0, bucket, phase), torch.zeros(WIRE_BYTES, dtype=torch.uint8))
                with traffic.changed:  # it has gone on, where it could
                    assert traffic.changed.wait_for(lambda: to.done or bool(traffic.missing(to)), timeout=WITHIN_S)
            return really(flights, timeout_s=0.0)

        monkeypatch.setattr(traffic, "wait", look)
        traffic.launch(flights)
        for peer in broken:
            transports[0].inbox.lose(peer, "Connection closed by peer")
        try:
            Wait(connections[0], traffic).own(step=0, merges=0, flights=flights)
        except PeerLost as e:
            raise PeerLost(e.islands, f"{e.reason}, {clock.now_s:g} s after the wait began") from None
        finally:
            traffic.close(drain_s=0.0)
        return clock.now_s

    return wait_for


def test_an_exchange_may_take_longer_than_the_limit(waited: Callable[..., float]) -> None:
    """Two buckets, two phases: all wires of one island, then all of the other, each within the limit of the last."""
    arrivals = [(peer, bucket, phase) for phase in (0, 1) for peer in (2, 1) for bucket in (0, 1)]
    assert waited(arrivals, 0.9 * LIMIT_S, buckets=2) == pytest.approx(8 * 0.9 * LIMIT_S)


def test_an_island_is_lost_when_nothing_has_come_for_the_limit_and_not_before(waited: Callable[..., float]) -> None:
    """The last wire comes at 24 s, and looks are 4 s apart. Then either owes one of the first bucket's second phase."""
    arrivals = [(2, 0, 0), None, (1, 0, 0), None, None, (2, 1, 0)]
    with pytest.raises(PeerLost) as caught:
        waited(arrivals, 0.4 * LIMIT_S, buckets=2)
    assert caught.value.islands == (1, 2)
    said = "nothing came from it for 10 s; if its link needs longer for one wire of 2.5 kB, raise link.timeout_s"
    assert caught.value.reason == f"{said}, 36 s after the wait began"


def test_who_has_sent_all_is_not_named_and_a_link_that_is_broken_is(waited: Callable[..., float]) -> None:
    with pytest.raises(PeerLost) as caught:
        waited([None, (2, 0, 0)], 0.4 * LIMIT_S, buckets=1, broken=[1])
    assert caught.value.islands == (1,)
    assert caught.value.reason == "nothing came from it for 10 s (Connection closed by peer), 20 s after the wait began"


@pytest.mark.parametrize("own", [None, PeerLost((1,), "it was silent"), NonFinite("inf")])
def test_where_one_rank_stands_still_for_another_island_all_of_its_island_do(
    own: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever another rank saw in the same moment, it must not end, and with it the island."""
    connection = connect_local(N)[0]
    wait = Wait(connection, Traffic(connection.transport, torch.device("cpu")))
    monkeypatch.setattr(wait, "_ranks", AnotherRank())

    def regroup() -> None:
        raise Regroup(1, 100)

    monkeypatch.setattr(connection.membership, "check_regroup", regroup)
    with pytest.raises(Regroup):
        wait._agree(own)


class AnotherRank:
    num_ranks = 2

    def worst(self, seen: int) -> int:
        return max(seen, _REGROUP)

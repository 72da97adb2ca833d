"""Does a close that drains nothing still end the threads? One that is left inside torch aborts the interpreter's exit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from dtrain.core import Flight
from dtrain.link import Link
from dtrain.topology import Round
from dtrain.traffic import Traffic
from dtrain.transport.base import OWN_WORK_S, ROUND, Tag
from dtrain.transport.local import LocalHub
from dtrain.transport.throttle import Throttle

PEER, WIRE_BYTES = 1, 4
LONG_S, WORK_S = 60.0, 0.3


def test_a_flight_at_work_is_waited_for() -> None:
    """The thread is inside the flight when close begins, and has left it when close is over."""
    inside = threading.Event()
    link = Link(0, 2, Round(0.5, (PEER,), ((PEER, 0.5),)))

    def flight() -> Iterator[None]:
        link.expect(PEER, WIRE_BYTES)
        yield
        inside.set()
        threading.Event().wait(WORK_S)

    hub = LocalHub(2)
    traffic = Traffic(hub.transport(0), torch.device("cpu"))
    flown = Flight(flight(), link, kind=ROUND, index=0, bucket=0, step=1)
    traffic.launch([flown])
    hub.transport(PEER).post(0, flown.tag(), torch.zeros(WIRE_BYTES, dtype=torch.uint8))
    assert inside.wait(LONG_S)
    traffic.close(drain_s=0.0)
    assert flown.done


def test_a_flight_at_work_is_given_up_after_it() -> None:
    """It is given up in the middle of its second part, which posts, writes and expects: all of that before, nothing after."""
    inside, go_on = threading.Event(), threading.Event()
    link = Link(0, 2, Round(0.5, (PEER,), ((PEER, 0.5),)))
    wire, written = torch.zeros(WIRE_BYTES, dtype=torch.uint8), list[str]()

    def flight() -> Iterator[None]:
        link.expect(PEER, WIRE_BYTES)
        yield
        inside.set()
        assert go_on.wait(LONG_S)
        written.append("second part")
        link.post(PEER, wire)
        link.expect(PEER, WIRE_BYTES)
        yield
        written.append("third part")

    hub = LocalHub(2)
    traffic = Traffic(hub.transport(0), torch.device("cpu"))
    flown = Flight(flight(), link, kind=ROUND, index=0, bucket=0, step=1)
    traffic.launch([flown])
    peer = hub.transport(PEER)
    peer.post(0, flown.tag(), wire)
    assert inside.wait(LONG_S)
    giver = threading.Thread(target=lambda: (traffic.drop([flown]), written.append("given up")))
    giver.start()
    assert not flown.done
    go_on.set()
    giver.join(LONG_S)
    assert written == ["second part", "given up"]
    assert flown.dropped
    assert peer.inbox.has(0, Tag(ROUND, 0, 0, 1))
    peer.post(0, Tag(ROUND, 0, 0, 1), wire)
    traffic.close(drain_s=0.0)
    assert "third part" not in written


def test_a_wire_that_is_held_back_is_let_go_of() -> None:
    """With a round trip of two minutes nothing leaves before close, and nothing is posted after it."""
    hub = LocalHub(2)
    before = set(threading.enumerate())
    link = Throttle(hub.transport(0), uplink=None, rtt_s=2 * LONG_S)
    (own,) = set(threading.enumerate()) - before
    tag = Tag(ROUND, 0, 0, 0)
    link.post(PEER, tag, torch.zeros(WIRE_BYTES, dtype=torch.uint8))
    begun = time.monotonic()
    link.close(drain_s=0.0)
    assert time.monotonic() - begun < LONG_S
    assert not own.is_alive()
    assert not hub.transport(PEER).inbox.has(0, tag)


@pytest.mark.parametrize("drain_s", [0.0, LONG_S])
def test_an_idle_traffic_ends_at_once(drain_s: float) -> None:
    before = set(threading.enumerate())
    traffic = Traffic(LocalHub(2).transport(0), torch.device("cpu"))
    (own,) = set(threading.enumerate()) - before
    begun = time.monotonic()
    traffic.close(drain_s=drain_s)
    assert time.monotonic() - begun < OWN_WORK_S
    assert not own.is_alive()

"""Do pairs that meet when both are ready mix as the equations say, and does nobody wait for an island that is slow?

Islands are threads here. Who meets whom follows from who is ready first, so each test asserts what holds in any order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import dtrain
from dtrain import matchmaker
from dtrain.connect import Connection
from dtrain.core import Flight
from dtrain.engine import Sync
from dtrain.errors import PeerLost
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_a2cid2 import momentum

WIDTH, CUT = 24, 10
U = 2.0**-24
LONG_S = 60.0
RING: dict[str, Any] = {"topology": "one_peer_ring"}
PATH: dict[str, Any] = {"topology": "coloured", "graph": "path"}
ANY: dict[str, Any] = {"topology": "random_pairs"}
Matrix = NDArray[np.float64]


def start_of(node: int) -> Tensor:
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(node))


def loop(connection: Connection, **axes: Any) -> tuple[Sync, Callable[[], None], Quadratic]:
    """An island of two buckets that starts from its own parameters, which join would have made equal; and a step without a
    gradient, so that meetings alone move it."""
    model = Quadratic(torch.zeros(WIDTH), torch.ones(WIDTH), torch.zeros(WIDTH), CUT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sync = dtrain.join(
        *(model, optimizer), recipe="a2cid2", schedule="ready", **axes, bucket_bytes=4 * CUT, link=connection
    )
    model.set_flat(start_of(connection.node))
    assert len(sync.core.lanes) == 2

    def step() -> None:
        sgd_step(model, optimizer)
        others_turn()

    return sync, step, model


def others_turn() -> None:
    """Let the other islands have the cores; nothing is right or wrong by how long this takes."""
    threading.Event().wait(0.0005)


def until(true: Callable[[], bool], meanwhile: Callable[[], None] = others_turn) -> None:
    ends = time.monotonic() + LONG_S
    while not true():
        assert time.monotonic() < ends, "it never came"
        meanwhile()


def landed(sync: Sync) -> int:
    return (sync.core.meetings or 0) - bool(sync.core.in_flight())


def wires_are_here(sync: Sync) -> bool:
    return all(lane.flight is not None and lane.flight.done for lane in sync.core.lanes)


class Mixed(NamedTuple):
    xs: list[NDArray[np.float32]]
    """After each meeting."""
    rested: NDArray[np.float32]
    meetings: list[tuple[int, int]]
    """Number and peer."""


def chances(axes: dict[str, Any], n: int) -> Matrix:
    """How likely two are to meet in a round."""
    if axes is ANY:
        return (np.ones((n, n)) - np.eye(n)) / (n - 1)
    out = np.zeros((n, n))
    for a in range(n - (axes is PATH)):  # two rounds in turns, each with every second edge
        out[a, (a + 1) % n] = out[(a + 1) % n, a] = 1 / 2
    return out


@pytest.mark.parametrize(("axes", "n"), [(RING, 6), (PATH, 4), (ANY, 4)], ids=["ring", "path", "random pairs"])
def test_meetings_follow_the_equations_in_the_order_that_they_had_and_keep_the_mean(axes: dict[str, Any], n: int) -> None:
    """Meetings by their numbers are an order in which each island had its own, so a recursion over them gives all parameters."""

    counts, least = [0] * n, 12

    def island(connection: Connection) -> Mixed:
        sync, step, model = loop(connection, **axes)
        flights, xs = list[Flight](), list[NDArray[np.float32]]()
        with sync:

            def watched() -> None:
                step()
                if landed(sync) > len(xs):
                    xs.append(model.flat().numpy().copy())
                    counts[connection.node] = len(xs)
                flight = sync.core.lanes[0].flight
                if flight is not None and flight not in flights:
                    flights.append(flight)

            until(lambda: min(counts) >= least, watched)
            sync.drain()
            if landed(sync) > len(xs):
                xs.append(model.flat().numpy().copy())
            for lane in sync.core.lanes:
                lane.rest()
        of = [(f.index, f.link.row.sends[0]) for f in flights if not f.dropped]
        assert len(of) == len(xs) == sync.core.meetings
        return Mixed(xs, model.flat().numpy().copy(), of)

    got = run_islands(n, island)
    pairs: dict[int, set[int]] = {}
    for node, mixed in enumerate(got):
        for number, peer in mixed.meetings:
            pairs.setdefault(number, set()).add(node)
            assert chances(axes, n)[node, peer] > 0, "an edge of the topology"
    assert sorted(pairs) == list(range(1, len(pairs) + 1)), "all that were given came about"
    assert all(len(pair) == 2 for pair in pairs.values()), "on both sides"
    rates = chances(axes, n)
    eta, alpha = momentum(rates, every=1)
    assert alpha > (0.7 if axes is not ANY else 0.49)
    e = np.exp(-2 * eta / rates.sum(axis=1))
    eye = np.eye(2 * n)
    state = np.concatenate((np.array([start_of(node).numpy() for node in range(n)]), np.zeros((n, WIDTH)))).astype(np.float64)
    began, M, through, xs = state[:n], np.abs(state).max(), eye[None], [list[Matrix]() for _ in range(n)]
    for number in sorted(pairs):
        met, flow, (i, j) = eye.copy(), eye.copy(), pairs[number]
        for one, other in ((i, j), (j, i)):
            for row, share in ((one, 0.5), (n + one, alpha - 0.5)):
                met[row, other] += share
                met[row, one] -= share
            flow[one, n + one], flow[n + one, n + one] = (1 - e[one]) / 2, e[one]
        state = flow @ met @ state
        through = np.concatenate((flow @ met @ through, eye[None]))
        for node in (i, j):
            xs[node].append(state[node].copy())
        M = max(M, np.abs(state).max())
    # A landing rounds x by 3 u M in the mix and 3 in the flow, a by 3 and 1, and constants that float32 rounds add 2: 8 u M in
    # each coordinate, which later maps carry on by the sums of their rows.
    allowed = 8 * U * M * np.abs(through).sum(axis=2).max(axis=1).sum()
    for node, mixed in enumerate(got):
        assert np.abs(np.array(mixed.xs) - np.array(xs[node])).max() <= allowed
    rested = np.array([mixed.rested for mixed in got], dtype=np.float64)
    assert np.abs(rested.mean(axis=0) - began.mean(axis=0)).max() <= 2 * allowed
    # Squared disagreement falls by e^(-t / chi1) at least, in t meetings of each; chi1 is 3.4 of the path, the others have less.
    assert np.var(rested, axis=0).sum() < 0.1 * np.var(began, axis=0).sum()


def test_what_an_island_learns_between_ready_and_landing_is_kept() -> None:
    """Two islands have one edge of rate 1: chi1 = chi2 = 1/2, eta = 1, alpha = 1/2, no momentum. Island 0 moves by -1 a step."""

    def island(connection: Connection) -> NDArray[np.float32]:
        model = Quadratic(torch.zeros(WIDTH), torch.zeros(WIDTH), torch.zeros(WIDTH), CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with dtrain.join(
            *(model, optimizer), recipe="a2cid2", schedule="ready", every=3, bucket_bytes=4 * CUT, link=connection
        ) as sync:
            model.set_flat(start_of(connection.node))
            for step in range(5):  # it becomes ready after step 3, and lands in step 4
                if step == 3:
                    until(lambda: wires_are_here(sync))
                for p in model.parameters():
                    p.grad = torch.full_like(p, float(connection.node == 0))
                optimizer.step()
            assert landed(sync) == 1
            return model.flat().numpy().copy()

    got = np.array(run_islands(2, island), dtype=np.float64)
    a, b = (start_of(node).numpy().astype(np.float64) for node in range(2))
    want = np.array([(a - 3 + b) / 2 - 2, (a - 3 + b) / 2])
    assert np.abs(got - want).max() <= 16 * U * 8  # of numbers below 8, 5 steps and a mix


def test_an_island_that_is_held_in_its_step_holds_nobody_else() -> None:
    """Rounds that all share would stand still; here island 2 is met no more, and the others meet each other."""
    n, more = 4, 6
    released, done = threading.Event(), set[int]()

    def island(connection: Connection) -> int:
        sync, step, _ = loop(connection, **RING)
        with sync:
            for _ in range(3):
                step()
            if connection.node == 2:
                assert released.wait(LONG_S)
                return landed(sync)
            # A wire that 2 posted before it was held may still land: one meeting of each neighbour.
            before = landed(sync)
            until(lambda: landed(sync) >= before + more, step)
            done.add(connection.node)
            until(lambda: len(done) == n - 1, step)  # those who are not done need somebody to meet
            released.set()
            return landed(sync)

    counts = run_islands(n, island)
    assert counts[2] <= 3, "it had made 3 steps"


def test_who_waits_withdraws_where_it_settles_and_asks_again() -> None:
    """Island 1 is not ready before island 0 has settled, so nobody has answered."""
    settled = threading.Event()

    def island(connection: Connection) -> int:
        sync, step, model = loop(connection, **RING)
        with sync:
            if connection.node == 0:
                step()
                assert sync.core.in_flight()
                sync.settle()
                assert (sync.core.in_flight(), sync.core.meetings) == ([], 0)
                assert {key: int(value) for key, value in sync.state_dict().items() if key.endswith(("land_step", "round"))} == {
                    **dict.fromkeys(("bucket0.land_step", "bucket1.land_step"), -1),
                    **dict.fromkeys(("bucket0.round", "bucket1.round"), 0),
                }
                assert torch.equal(model.flat(), start_of(0))
                settled.set()
            assert settled.wait(LONG_S)
            until(lambda: landed(sync) >= 1, step)
            return landed(sync)

    assert min(run_islands(2, island)) >= 1


def test_all_may_settle_at_once_again_and_again() -> None:
    """After each step: some have a partner then and some have none, and each partner settles as well."""

    def island(connection: Connection) -> int:
        sync, step, _ = loop(connection, **ANY)
        keys = set(sync.state_dict())
        with sync:
            for _ in range(40):
                step()
                assert set(sync.state_dict()) == keys
            sync.merge()
            return sync.core.meetings or 0

    counts = run_islands(4, island)
    assert sum(counts) % 2 == 0
    assert sum(counts) > 0


def meet_once_on_a_path(connection: Connection, sync: Sync, step: Callable[[], None], met: threading.Barrier) -> None:
    """Islands 0 and 1 meet once, and 2 nobody; all end after step 4."""
    step()
    step()
    if connection.node != 2:
        step()
        until(lambda: wires_are_here(sync))
    met.wait(LONG_S)
    while sync.step < 4:
        step()
    sync.drain()


def test_a_merge_takes_the_mean_that_meetings_keep() -> None:
    """That of x + a/2. On a path of three, islands 0 and 1 meet once and 2 does not; e of 0, an end, is smaller than e of 1, so x
    alone has another mean then."""
    met = threading.Barrier(3)

    def island(connection: Connection) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
        sync, step, model = loop(connection, **PATH, every=3)
        with sync:
            meet_once_on_a_path(connection, sync, step, met)
            x = model.flat().numpy().copy()
            sync.merge()
            return x, model.flat().numpy().copy(), sync.core.meetings or 0

    x, merged, counts = zip(*run_islands(3, island), strict=True)
    assert counts == (1, 1, 0)
    kept = np.mean([start_of(node).numpy().astype(np.float64) for node in range(3)], axis=0)
    # 8 u M of a landing (above), |x| and |a| below 3 times what they were; as much again of the mean of three.
    allowed = 16 * U * 3 * max(float(start_of(node).abs().max()) for node in range(3))
    assert np.ptp(np.array(merged), axis=0).max() == 0.0
    assert np.abs(np.array(merged, dtype=np.float64)[0] - kept).max() <= allowed
    assert np.abs(np.array(x, dtype=np.float64).mean(axis=0) - kept).max() > 100 * allowed, "it matters"


def test_who_has_nobody_left_to_meet_goes_on_alone() -> None:
    def island(connection: Connection) -> int:
        sync, step, _ = loop(connection, **RING)
        with sync:
            if connection.node == 1:
                return 0
            until(lambda: sync.step > 0 and not sync.core.in_flight(), step)
            for _ in range(5):
                step()
                assert not sync.core.in_flight()
            return sync.core.meetings or 0

    assert run_islands(2, island) == [0, 0]


def test_a_wire_that_came_before_a_checkpoint_lands_after_the_resume() -> None:
    saved: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def first(connection: Connection) -> NDArray[np.float32]:
        sync, step, model = loop(connection, **RING, every=2)
        with sync:
            step()
            step()
            until(lambda: wires_are_here(sync))
            saved[connection.node] = (model.flat(), {key: value.clone() for key, value in sync.state_dict().items()})
            step()
            return model.flat().numpy().copy()

    def again(connection: Connection) -> NDArray[np.float32]:
        sync, step, model = loop(connection, **RING, every=2)
        with sync:
            x, state = saved[connection.node]
            model.set_flat(x)
            sync.load_state_dict(state)
            step()
            assert (sync.step, sync.core.meetings) == (3, 1)
            return model.flat().numpy().copy()

    one, two = np.array(run_islands(2, first)), np.array(run_islands(2, again))
    assert (one == two).all()
    assert (one[0] != start_of(0).numpy()).all()


def test_a_partner_whose_wires_never_come_is_lost() -> None:
    """Island 1 asks at the desk by hand and posts nothing."""
    over = threading.Event()

    def island(connection: Connection) -> tuple[int, ...]:
        sync, step, _ = loop(connection, **RING)
        if connection.node == 1:
            connection.membership.words.say(matchmaker.word(1, "ask"))
            assert over.wait(LONG_S)
            sync.close(failed=True)
            return ()
        try:
            until(lambda: False, step)
        except PeerLost as e:
            return e.islands
        finally:
            over.set()
            sync.close(failed=True)
        return ()

    results = run_islands(2, lambda connection: island(replace(connection, timeout_s=0.2)))
    assert results[0] == (1,)

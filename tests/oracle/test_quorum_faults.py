"""What happens where a quorum is enough and a payload is not finite, words do not come, an island is lost, or a look comes early?

Islands are threads here, as in ``test_quorum.py``. What the deciding islands take for the time is moved on by the tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dtrain.connect import Connection
from dtrain.errors import NonFinite, PeerLost, Regroup
from tests.islands import run_islands, sgd_step
from tests.oracle.test_diloco import problem
from tests.oracle.test_quorum import ALL, LONG_S, OTHERS, SLOW, Island, N
from tests.oracle.test_ready_faults import Stuck, Watched


@pytest.mark.parametrize("delay", [0, 1])
def test_a_payload_that_is_not_finite_is_raised_at_once_and_the_others_go_on(delay: int) -> None:
    """Of two buckets one has it, and the other's wire has left. Nobody has said yet with whom that one is."""
    raised = threading.Event()

    def island(connection: Connection) -> str:
        one = Island(connection, problem(N), every=4, delay=delay)
        assert len(one.sync.buckets) > 1
        try:
            one.steps_to(3)
            if one.node == SLOW:
                x = one.model.flat()
                x[0] = torch.inf
                one.model.set_flat(x)
                one.steps_to(4)
            assert raised.wait(LONG_S / 4)
            one.steps_to(14)
        except NonFinite as e:
            one.sync.close(failed=True)
            raised.set()
            return str(e)
        one.sync.close()
        assert one.counts() == (3, 0)
        return "went on"

    texts = run_islands(N, island)
    assert texts.pop(SLOW).startswith("step 4: the payload holds inf or NaN; the loss has diverged")
    assert texts == ["went on"] * 3


def test_where_all_wires_are_here_and_no_word_comes_it_is_waited_for_up_to_the_limit() -> None:
    def island(connection: Connection) -> str:
        watched = Watched(connection.membership)
        watched.words = Stuck()
        one = Island(replace(connection, timeout_s=1.0, membership=watched), problem(N), every=2, delay=1)
        try:
            one.steps_to(3)
        except PeerLost as e:
            return str(e)
        finally:
            one.sync.close(failed=True)
        return "it went on"

    for node, text in enumerate(run_islands(N, island)):
        others = ", ".join(str(n) for n in range(N) if n != node)
        assert text.endswith(f"{others}: nothing came through the meeting point for 1 s")


class Clock:
    """``time``, for those who are given it, with a monotonic clock that a test moves on."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def move_on(self, by_s: float) -> None:
        self.ahead_s += by_s


@pytest.mark.parametrize(
    ("look", "step_s", "later_s", "members"),
    [
        (lambda sync: sync.state_dict(), 10.0, 12.0, ALL),
        (lambda sync: sync.consensus_distance(), 10.0, 12.0, ALL),
        (lambda sync: sync.settle(), 10.0, 21.0, OTHERS),
        (lambda sync: sync.settle(), 1000.0, LONG_S / 2 + 1, OTHERS),
    ],
    ids=["checkpoint", "look", "late", "later than the limit"],
)
def test_what_waits_for_a_round_before_its_step_leaves_others_the_time_until_then(
    look: Callable[..., object], step_s: float, later_s: float, members: frozenset[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others wait two steps before the round is to land, when island 2 has not launched it. Whether it does so before that
    time is over decides whether it is a member."""
    clock, waited, settled = Clock(), threading.Semaphore(0), threading.Semaphore(0)
    monkeypatch.setattr("dtrain.roll_call.time", clock)
    step_begins = threading.Barrier(N, action=lambda: clock.move_on(step_s))

    def island(connection: Connection) -> Island:
        says = replace(connection, on_wait=lambda missing, waited_s, limit_s: waited.release())
        one = Island(says, problem(N), every=4, delay=2)
        with one.sync:
            for step in range(1, 5):
                step_begins.wait(LONG_S)
                if one.node != SLOW or step < 4:
                    one.steps_to(step)
            if one.node == SLOW:
                assert waited.acquire(timeout=LONG_S / 4), "they have not waited"
                clock.move_on(later_s)
                for _ in OTHERS:
                    assert (waited if members == ALL else settled).acquire(timeout=LONG_S / 4)
                one.steps_to(4)
            look(one.sync)
            settled.release()
            one.steps_to(6)
        return one

    for one in run_islands(N, island):
        assert one.members == {4: members}


def stands_still(after: Callable[[Watched], None], timeout_s: float) -> list[BaseException]:
    """What the others raise where island 2 is said to be lost, and no round is due for long."""

    def island(connection: Connection) -> BaseException | None:
        watched = Watched(connection.membership)
        limited = replace(
            connection, timeout_s=timeout_s, membership=watched, on_wait=lambda missing, waited_s, limit_s: after(watched)
        )
        one = Island(limited, problem(N), every=10**6, delay=1)
        if one.node == SLOW:
            one.sync.close()
            return None
        one.steps_to(1)
        watched.lost_now = (SLOW,)
        begun = time.monotonic()
        try:
            while time.monotonic() - begun < LONG_S / 4:
                sgd_step(one.model, one.optimizer)
        except (PeerLost, Regroup) as e:
            return e
        finally:
            one.sync.close(failed=True)
        raise AssertionError("it went on for ever")

    return [error for error in run_islands(N, island) if error is not None]


def test_with_a_quorum_too_who_is_lost_is_stood_still_for_until_all_regroup() -> None:
    def come_back(watched: Watched) -> None:
        watched.again = Regroup(1, 20)

    assert [type(error) for error in stands_still(come_back, timeout_s=2.5)] == [Regroup] * 3


def test_who_stays_lost_ends_the_run_at_the_limit() -> None:
    errors = stands_still(lambda watched: None, timeout_s=0.5)
    assert [str(error) for error in errors] == ["lost island 2: it was not started again for 0.5 s"] * 3

"""What happens to pairs that meet when both are ready where an island is slow, lost or failed, or its payload is not finite?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.connect import Connection
from dtrain.errors import NonFinite, PeerLost, Regroup
from dtrain.membership import Membership, Notice
from dtrain.words import Words
from tests.islands import run_islands
from tests.oracle.test_ready import LONG_S, PATH, RING, U, landed, loop, meet_once_on_a_path, start_of, until


class Stuck:
    """Words that nobody hears."""

    def say(self, word: str) -> int:
        return 1

    def heard(self, after: int) -> list[str]:
        return []


class Watched:
    """A membership of which a test says who was lost, and which may fall silent after its first sign of life."""

    failed_may_return = True

    def __init__(self, under: Membership, *, silent: bool = False) -> None:
        self.words: Words = under.words
        self.lost_now: tuple[int, ...] = ()
        self.again: Regroup | None = None
        self._under, self._silent, self._shown = under, silent, 0

    def announce(self, notice: Notice) -> None:
        self._under.announce(notice)

    def notices(self) -> dict[int, Notice]:
        return self._under.notices()

    def check_regroup(self) -> None:
        if self.again is not None:
            raise self.again

    def lost(self) -> tuple[int, ...]:
        return self.lost_now

    def beat(self, heard: int) -> None:
        self._shown += 1
        if self._shown == 1 or not self._silent:
            self._under.beat(heard)

    def beats(self) -> Mapping[int, int]:
        return self._under.beats()


@pytest.mark.parametrize("average", ["merge", "merged"])
def test_an_average_waits_for_an_island_that_is_slow_for_longer_than_the_limit(average: str) -> None:
    """Island 1 does not come before island 0 has said three times, once a second, that it waits; the limit is two seconds."""
    waited = threading.Semaphore(0)

    def island(connection: Connection) -> NDArray[np.float32]:
        limited = replace(connection, timeout_s=2.0, on_wait=lambda missing, waited_s, limit_s: waited.release())
        sync, step, model = loop(limited, **RING)
        with sync:
            step()
            if connection.node == 1:
                for _ in range(3):
                    assert waited.acquire(timeout=LONG_S)
            if average == "merged":
                with sync.merged():
                    return model.flat().numpy().copy()
            sync.merge()
            return model.flat().numpy().copy()

    one, two = run_islands(2, island)
    assert (one == two).all()


def test_an_island_that_shows_no_life_is_not_waited_for_beyond_the_limit() -> None:
    over = threading.Event()

    def island(connection: Connection) -> tuple[int, ...]:
        mute = replace(connection, timeout_s=1.0, membership=Watched(connection.membership, silent=connection.node == 1))
        sync, _, _ = loop(mute, **RING)
        try:
            if connection.node == 1:
                assert over.wait(LONG_S)
            else:
                sync.merge()
        except PeerLost as e:
            return e.islands
        finally:
            over.set()
            sync.close(failed=True)
        return ()

    assert run_islands(2, island) == [(1,), ()]


def stands_still(after: Callable[[Watched], None], timeout_s: float) -> tuple[BaseException, list[tuple[int, ...]]]:
    """What island 0 raises where island 1 is said to be lost, and for whom it said that it waits."""
    over = threading.Event()

    def island(connection: Connection) -> tuple[BaseException, list[tuple[int, ...]]] | None:
        watched, said = Watched(connection.membership), list[tuple[int, ...]]()

        def on_wait(missing: tuple[int, ...], waited_s: float, limit_s: float) -> None:
            said.append(missing)
            after(watched)

        sync, step, _ = loop(replace(connection, timeout_s=timeout_s, membership=watched, on_wait=on_wait), **RING)
        try:
            if connection.node == 1:
                assert over.wait(LONG_S)
                return None
            step()
            watched.lost_now = (1,)
            until(lambda: False, step)
        except (PeerLost, Regroup) as e:
            return e, said
        finally:
            over.set()
            sync.close(failed=True)
        raise AssertionError("it went on for ever")

    found = run_islands(2, island)[0]
    assert found is not None
    return found


def test_who_is_lost_is_stood_still_for_until_all_regroup() -> None:
    def come_back(watched: Watched) -> None:
        watched.again = Regroup(1, 20)

    error, said = stands_still(come_back, timeout_s=LONG_S)
    assert isinstance(error, Regroup)
    assert set(said) == {(1,)}


def test_who_stays_lost_ends_the_run_at_the_limit() -> None:
    error, said = stands_still(lambda watched: None, timeout_s=1.5)
    assert isinstance(error, PeerLost)
    assert error.islands == (1,)
    assert str(error) == "lost island 1: it was not started again for 1.5 s"
    assert set(said) == {(1,)}


def test_an_island_that_failed_and_cannot_come_back_ends_the_others_at_once() -> None:
    """No wire is waited for: the other would train on to its last step."""

    def island(connection: Connection) -> str:
        sync, step, _ = loop(connection, **RING)
        if connection.node == 1:
            sync.close(failed=True)
            return ""
        try:
            until(lambda: False, step)
        except PeerLost as e:
            return str(e)
        finally:
            sync.close(failed=True)
        return "it went on"

    assert run_islands(2, island)[0] == "lost island 1: it failed after step 0"


def test_a_payload_that_is_not_finite_is_raised_though_nobody_has_answered() -> None:
    """Of two buckets one has it. Island 1 is never ready, so the other bucket waits for a partner, and would be withdrawn."""
    over = threading.Event()

    def island(connection: Connection) -> str:
        sync, step, model = loop(connection, **RING)
        try:
            if connection.node == 1:
                assert over.wait(LONG_S)
                return ""
            x = start_of(0)
            x[0] = torch.inf
            model.set_flat(x)
            step()
            sync.state_dict()
        except NonFinite as e:
            return str(e)
        finally:
            over.set()
            sync.close(failed=True)
        return "a checkpoint was taken"

    assert run_islands(2, island)[0].startswith("step 1: the payload holds inf or NaN; the loss has diverged")


def test_a_look_at_the_average_takes_the_mean_that_meetings_keep_and_leaves_all_as_it_was() -> None:
    """As of a merge (``test_ready.py``): on a path of three, islands 0 and 1 have met once, and 2 nobody."""
    met = threading.Barrier(3)

    def island(connection: Connection) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        sync, step, model = loop(connection, **PATH, every=3)
        with sync:
            meet_once_on_a_path(connection, sync, step, met)
            assert landed(sync) == (connection.node != 2)
            before: dict[str, Tensor] = {key: value.clone() for key, value in sync.state_dict().items() if "bucket" in key}
            x = model.flat().numpy().copy()
            with sync.merged():
                merged = model.flat().numpy().copy()
            sync.consensus_distance()
            assert (model.flat().numpy() == x).all()
            assert all(torch.equal(value, before[key]) for key, value in sync.state_dict().items() if key in before)
            return x, merged

    x, merged = (np.array(each, dtype=np.float64) for each in zip(*run_islands(3, island), strict=True))
    kept = np.mean([start_of(node).numpy().astype(np.float64) for node in range(3)], axis=0)
    allowed = 16 * U * 3 * max(float(start_of(node).abs().max()) for node in range(3))  # as of a merge
    assert np.abs(merged - kept).max() <= allowed
    assert np.abs(x.mean(axis=0) - kept).max() > 100 * allowed, "it matters"


def test_a_withdrawal_that_nobody_hears_is_waited_for_up_to_the_limit() -> None:
    """As where the meeting point is silent, or an island was killed between its number and its word."""
    over = threading.Event()

    def island(connection: Connection) -> str:
        watched = Watched(connection.membership)
        watched.words = Stuck()
        sync, step, _ = loop(replace(connection, timeout_s=1.0, membership=watched), **RING)
        try:
            if connection.node == 1:
                assert over.wait(LONG_S)
                return ""
            step()
            sync.settle()
        except PeerLost as e:
            return str(e)
        finally:
            over.set()
            sync.close(failed=True)
        return "it was withdrawn"

    assert run_islands(2, island)[0] == "lost island 1: nothing came through the meeting point for 1 s"

"""What does the launcher do when islands end?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.launch.decide import TOGETHER_S, Done, Restart, Seen, Stop, decide

RUNNING = Seen(0, "running", says_state=True)
WAITS = Seen(0, "running", says_state=True, waiting_for=(1,))
KILLED = Seen(1, "failed", "bug", "it left no message", failed_for_s=TOGETHER_S, restarts_left=1)


def decided(*islands: Seen, trained: bool = True, script: bool = False) -> Done | Restart | Stop | None:
    return decide(islands, trained=trained, script=script)


def test_it_waits_for_the_last_island() -> None:
    assert decided(RUNNING, Seen(1, "done")) is None
    assert decided(Seen(0, "done"), Seen(1, "done")) == Done()


def test_a_killed_island_starts_again_once_the_others_stand_still() -> None:
    assert decided(RUNNING, KILLED) is None
    assert decided(WAITS, KILLED) == Restart((1,))
    assert decided(Seen(0, "running"), KILLED) == Restart((1,)), "a script that says no state is not waited for"


def test_no_time_is_long_enough_to_set_the_run_back_under_an_island_that_trains() -> None:
    long_ago = replace(KILLED, failed_for_s=1e6)
    assert decided(RUNNING, long_ago) is None
    other = Seen(2, "running", says_state=True)
    assert decided(WAITS, long_ago, other) is None, "island 2 still trains"
    assert decided(WAITS, long_ago, replace(other, waiting_for=(1,))) == Restart((1,))


def test_islands_of_a_ring_wait_behind_those_that_wait() -> None:
    ring = [Seen(i, "running", says_state=True, waiting_for=((i - 1) % 5,)) for i in range(5)]
    ring[1] = KILLED
    assert decided(*ring) == Restart((1,))
    ring[4] = replace(ring[4], waiting_for=())
    assert decided(*ring) is None
    ring[4] = replace(ring[4], waiting_for=(0,))
    assert decided(*ring) is None, "0 and 4 wait for each other, as islands of a slow link do, and not for the lost one"


def test_islands_that_were_killed_together_start_together() -> None:
    just_now = Seen(0, "failed", "bug", failed_for_s=0.1, restarts_left=1)
    assert decided(just_now, KILLED) is None
    assert decided(Seen(0, "failed", "bug", failed_for_s=9.0, restarts_left=1), KILLED) == Restart((0, 1))


def test_without_restarts_the_others_wait_until_they_give_up() -> None:
    for_good = Seen(1, "failed", "bug", failed_for_s=60.0, restarts_left=0)
    assert decided(WAITS, for_good) is None
    gave_up = Seen(0, "failed", "resumable", "lost island 1: nothing for 300 s", failed_for_s=0.1)
    assert decided(gave_up, for_good) == Stop(75, "island 0: lost island 1: nothing for 300 s", show=1)
    assert decided(gave_up, WAITS) == Stop(75, "island 0: lost island 1: nothing for 300 s"), "nobody's log says more"


@pytest.mark.parametrize(("kind", "exit_status"), [("user", 2), ("resumable", 75)])
def test_an_error_that_explains_itself_ends_the_run_at_once(kind: str, exit_status: int) -> None:
    assert decided(RUNNING, Seen(1, "failed", kind, "why")) == Stop(exit_status, "island 1: why")  # pyright: ignore[reportArgumentType]


def test_an_error_of_a_script_is_shown_with_where_it_was_raised() -> None:
    assert decided(Seen(0, "failed", "user", "bad shape"), script=True) == Stop(2, "island 0: bad shape", show=0)


def test_a_users_error_goes_before_its_echo_on_the_other_island() -> None:
    echo, cause = Seen(0, "failed", "resumable", "lost island 1"), Seen(1, "failed", "user", "no such file")
    assert decided(echo, cause) == Stop(2, "island 1: no such file")


def test_when_nothing_ever_ran_the_log_is_shown() -> None:
    other = Seen(0, "failed", "bug", failed_for_s=9.0, restarts_left=1)
    assert decided(other, KILLED, trained=False) == Stop(1, "islands 0, 1 failed before the first step", show=0)
    assert decided(other, KILLED, trained=True) == Restart((0, 1))


def test_a_loss_after_another_island_has_finished_cannot_be_regrouped() -> None:
    stop = decided(Seen(0, "done"), KILLED)
    assert isinstance(stop, Stop)
    assert stop.exit_status == 75

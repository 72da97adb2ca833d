"""Is the runtime model what its equations say of islands in step? Steps by hand. (Of late ones: test_plan_lateness.py.)"""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.plan.company import LinkSpeed, everyone
from dtrain.plan.lateness import When
from dtrain.plan.model import Island, step_time
from dtrain.plan.sent import Exchange, Flown, Phase, Sent

T = 0.1
QUIET = Island(step_s=T, jitter_s=0.0, memory_bytes_per_s=1e9)
LINK = LinkSpeed(far_bits_per_s=8e6, rtt_s=0.04)
"""A megabyte a second; 20 ms one way."""


def flown(*megabytes: float, fragment: int = 0, near: float = 0.0, work: int = 0, wires: int = 1) -> Flown:
    """A flight that posts so much in each phase."""
    near_bytes = round(near * 1e6)
    return Flown(fragment, tuple(Phase(work, round(m * 1e6), near_bytes, wires, 0) for m in megabytes), work)


def of(*rounds: Exchange) -> Sent:
    return Sent(rounds, mean_round_bytes=0, state_bytes=0, wire_bytes=0, company=everyone(2, 1))


def rounds(*flights: Flown) -> Exchange:
    return Exchange((), flights)


@pytest.mark.parametrize(
    ("flights", "when", "per_step_s"),
    [
        # One phase: 0.05 s to leave, 0.02 s on the way. Waited for, hidden, hidden in part, and behind two buckets in one uplink.
        ((flown(0.05),), When(1, 0), T + 0.07),
        ((flown(0.05),), When(1, 1), T),
        ((flown(0.15),), When(1, 1), T + (0.17 - T)),
        ((flown(0.05), flown(0.05)), When(1, 0), T + 0.12),
        # A round every 4 steps: what is waited for is shared by 4; two steps hide 0.2 s of 0.52.
        ((flown(0.5),), When(4, 0), T + 0.52 / 4),
        ((flown(0.5),), When(4, 2), T + (0.52 - 2 * T) / 4),
        # Three phases: each leaves, then flies.
        ((flown(0.01, 0.02, 0.03),), When(1, 0), T + 0.06 + 3 * 0.02),
        # Two buckets of two phases: the second phase of the first bucket is posted at 0.03, when it is here, behind the second
        # bucket's first, which left at 0.02; it has left at 0.04, the other's, posted at 0.04, at 0.05, and is there at 0.07.
        ((flown(0.01, 0.01), flown(0.01, 0.01)), When(1, 0), T + 0.07),
        # Two fragments in turn, each every 2 steps and landing after one: each is hidden but for 0.12 - T.
        ((flown(0.1), flown(0.1, fragment=1)), When(2, 1, 2), T + 0.02),
        # Nothing is posted by an island that sits out.
        ((Flown(0, (), 0),), When(1, 0), T),
    ],
)
def test_steps_by_hand(flights: tuple[Flown, ...], when: When, per_step_s: float) -> None:
    found = step_time(of(rounds(*flights)), when, QUIET, LINK)
    assert found.step_s == pytest.approx(per_step_s, rel=1e-9)
    assert found.link_s == pytest.approx(per_step_s - T, abs=1e-9)
    assert found.waits == pytest.approx(1 - T / per_step_s, abs=1e-9)


def test_a_round_that_flies_longer_than_its_period_is_bound_by_the_link() -> None:
    """0.62 s a round every 2 steps of 0.1 s, a period late: the link is never idle but for the way."""
    found = step_time(of(rounds(flown(0.6))), When(2, 2), QUIET, LINK)
    assert found.step_s == pytest.approx(0.62 / 2)


def test_gradients_are_waited_for_each_step_and_parameters_fly_behind_them() -> None:
    """The parameters, posted at the step's end, leave in 0.05 s, and gradients at its end a step later in 0.01 s: 0.03 s are
    waited for, the parameters for nothing."""
    both = Exchange((flown(0.01),), (flown(0.05),))
    assert step_time(of(both), When(1, 1), QUIET, LINK).step_s == pytest.approx(T + 0.03)
    # 0.3 s of parameters are waited for first, 0.32 - T; only then the gradients are posted.
    both = Exchange((flown(0.01),), (flown(0.3),))
    assert step_time(of(both), When(1, 1), QUIET, LINK).step_s == pytest.approx(0.32 + 0.03)


def test_rounds_of_a_period_take_turns_and_near_wires_have_their_own_link() -> None:
    """Far 0.05 + 0.02 s; near 0.1 MB at ten times the rate, 0.01 s, and nothing on the way."""
    far, near = rounds(flown(0.05)), rounds(flown(0.0, near=0.1))
    link = LinkSpeed(8e6, 0.04, near_bits_per_s=8e7)
    assert step_time(of(far, near), When(1, 0), QUIET, link).step_s == pytest.approx(T + (0.07 + 0.01) / 2)
    assert step_time(of(far, near), When(1, 0), QUIET, LinkSpeed(None, 0.04)).step_s == pytest.approx(T + 0.02 / 2)


def test_encoding_is_never_hidden_and_carrying_is_not_where_cores_are_shared() -> None:
    """1 MB encoded and 1 MB landed at 1 GB/s: 2 ms. Carrying a wire of 0.01 MB takes 0.6 + 0.4 + 0.1 ms, twice that of a core
    shared by two; all is hidden in time, and none of it in work. Encoding too takes twice as long there."""
    one = of(rounds(flown(0.01, work=1_000_000)))
    assert step_time(one, When(1, 1), QUIET, LINK).step_s == pytest.approx(T + 0.002)
    crowded = Island(T, 0.0, 1e9, phase_s=6e-4, wire_s=4e-4, wire_s_per_byte=1e-8, crowd=2.0)
    found = step_time(one, When(1, 1), crowded, LINK)
    assert found.step_s == pytest.approx(T + 2 * 0.002 + 2 * 0.0011)
    assert found.work_s == pytest.approx(2 * 0.002 + 2 * 0.0011)
    # Waited for, carrying is a part of the flight, and counted once.
    waited = step_time(one, When(1, 0), crowded, LINK)
    assert waited.step_s == pytest.approx(T + 2 * 0.002 + 0.03 + 2 * 0.0011)
    assert waited.link_s == pytest.approx(0.03 + 2 * 0.0011)


def test_who_hears_more_than_it_sends_waits_for_its_downlink() -> None:
    """A wire of 0.05 MB goes and three come, 0.15 s at a megabyte a second, while one goes."""
    hears = Exchange((), (Flown(0, (Phase(0, 50_000, 0, 1, heard_bytes=150_000),), 0),))
    assert step_time(of(hears), When(1, 0), QUIET, LINK).step_s == pytest.approx(T + 0.15 + 0.02)
    near = Exchange((), (Flown(0, (Phase(0, 50_000, 0, 1, heard_bytes=150_000, near_heard_bytes=100_000),), 0),))
    assert step_time(of(near), When(1, 0), QUIET, LinkSpeed(8e6, 0.04, 8e6)).step_s == pytest.approx(T + 0.1)


def test_ranks_share_an_islands_work_and_then_give_each_other_what_landed() -> None:
    """Two buckets of 1 MB that two ranks encode and land at 1 GB/s at the same time, 1 ms each; then each gets the other's
    megabyte in 1 ms. The uplink is one: 0.01 MB and 0.01 MB leave in 0.02 s, behind the first millisecond."""
    first, second = (Flown(0, (Phase(1_000_000, 10_000, 0, 1, 0),), 1_000_000, k, 1_000_000) for k in range(2))
    both = of(rounds(first, second))
    island = Island(T, 0.0, 1e9, num_ranks=2, intra_bytes_per_s=1e9)
    for when, waits_s in ((When(1, 1), 0.0), (When(1, 0), 0.02 + 0.02)):
        found = step_time(both, when, island, LINK)
        assert found.work_s == pytest.approx(3e-3)
        assert found.step_s == pytest.approx(T + 3e-3 + waits_s)
    one = replace(island, num_ranks=1)
    alone = of(rounds(replace(first, rank=0), replace(second, rank=0)))
    assert step_time(alone, When(1, 1), one, LINK).step_s == pytest.approx(T + 4e-3)


def test_the_wires_of_many_buckets_are_carried_one_after_another() -> None:
    """Ten buckets of 100 wires, each of 0.1 ms of a core: 0.1 s, however fast the link is."""
    many = of(rounds(*(Flown(0, (Phase(0, 1, 0, 100, 1),), 0) for _ in range(10))))
    found = step_time(many, When(1, 0), Island(T, 0.0, 1e9, wire_s=1e-4), LinkSpeed(None, 0.0))
    assert found.step_s == pytest.approx(T + 0.1)


@pytest.mark.parametrize(
    ("megabytes", "phases", "under_way", "more_s"),
    [
        # 20 waves of 0.5 ms of bytes, two of which fly at once: ten trips, 9 of which wait for the way but for another's bytes.
        (0.0005, 1, 2 / 20, 9 * (0.02 - 0.0005)),
        (0.0005, 2, 2 / 20, 9 * (0.04 - 0.001)),  # the way twice, and the bytes
        (0.0005, 1, 5 / 20, 3 * (0.02 - 4 * 0.0005)),
        (0.0005, 1, 6 / 20, 3 * (0.02 - 5 * 0.0005)),  # the last of four trips has two waves
        (0.05, 1, 2 / 20, 0.0),  # another's bytes hide the way
        (0.0005, 1, 1.0, 0.0),
    ],
)
def test_waves_that_wait_for_others_to_land_make_a_trip_each_few(
    megabytes: float, phases: int, under_way: float, more_s: float
) -> None:
    waves = rounds(*(flown(*[megabytes] * phases) for _ in range(20)))
    at_once = of(waves)
    few = replace(at_once, at_hand=1 / 20, under_way=under_way)
    one, other = (step_time(sent, When(1, 0), QUIET, LINK) for sent in (at_once, few))
    assert other.link_s - one.link_s == pytest.approx(more_s, abs=1e-9)
    assert other.step_s - one.step_s == pytest.approx(more_s, abs=1e-9)


def test_landing_and_encoding_hide_the_way_of_waves_and_fragments_have_fewer_of_them() -> None:
    """20 waves of 1 ms of work at either end; two fragments in turn, of ten each."""
    busy = rounds(*(flown(0.0005, work=10**6) for _ in range(20)))
    few = replace(of(busy), at_hand=1 / 20, under_way=2 / 20)
    # All leave while the others are encoded, the last at 20.5 ms; with 20 ms of landing that is 2.025 ms a wave.
    more_s = step_time(few, When(1, 0), QUIET, LINK).link_s - step_time(of(busy), When(1, 0), QUIET, LINK).link_s
    assert more_s == pytest.approx(9 * (0.02 - 0.0405 / 20), abs=1e-9)
    halves = rounds(*(flown(0.0005, fragment=k // 10) for k in range(20)))
    two = replace(of(halves), at_hand=1 / 20, under_way=2 / 20)
    more_s = step_time(two, When(2, 0, 2), QUIET, LINK).link_s - step_time(of(halves), When(2, 0, 2), QUIET, LINK).link_s
    assert more_s == pytest.approx(4 * (0.02 - 0.0005), abs=1e-9)
    late = [step_time(sent, When(1, 1), QUIET, LINK) for sent in (of(busy), few)]
    assert late[0] == late[1], "of a round that is not waited for all are launched"

"""After which steps are checkpoints written? Beside the steps at which rounds really land, as the core notes them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from dtrain.assemble import assemble
from dtrain.bucket import flatten, make_buckets
from dtrain.core import Core
from dtrain.link import Peers
from dtrain.recipes import resolve
from dtrain.saves import Saves
from dtrain.schedule import Control

STEPS = 50


def core(name: str, axes: Mapping[str, object]) -> Core:
    recipe = resolve(name, axes, 4)
    flat = flatten([("x", nn.Parameter(torch.zeros(64, 64)))])
    buckets = make_buckets(flat, num_fragments=recipe.fragments, bucket_bytes=None, num_ranks=1, with_grad=False)
    return Core(assemble(recipe, 0, 4), buckets, Peers(0, 4))


def saved(cores: list[Core], every: int, begun: int = 0) -> dict[int, int]:
    """The steps that are saved, and how many updates after the next the last of what flies there lands."""
    saves, found = Saves(cores, every=every, last=STEPS), dict[int, int]()
    for step in range(begun + 1, STEPS + 1):
        for one in cores:
            for lane in [*one.due(step)]:
                lane.flight, lane.land_step = None, -1
            one.step = step
            one.start_rounds()
            if one.delay_steps == 0:
                for lane in [*one.due(step)]:
                    lane.flight, lane.land_step = None, -1
        if saves.after(step):
            flying = [lane.land_step for one in cores for lane in one.in_flight()]
            found[step] = max([0, *(land - 1 - step for land in flying)])
    return found


@pytest.mark.parametrize(
    ("name", "axes", "every", "steps"),
    [
        ("diloco", {"every": 10, "delay": "round"}, 10, [19, 29, 39, 49, 50]),
        ("diloco", {"every": 10, "delay": "round"}, 25, [29, 50]),
        ("diloco", {"every": 10, "delay": 4}, 20, [23, 43, 50]),
        ("diloco", {"every": 10, "delay": 4}, 16, [16, 33, 48, 50]),
        ("diloco", {"every": 10, "delay": 0}, 20, [20, 40, 50]),
        ("diloco", {"every": 10, "delay": "round"}, 1, [*range(1, 51)]),
        ("diloco", {"every": 10, "delay": "round"}, 0, []),
        ("diloco", {"every": 10, "delay": 5, "fragments": 2}, 20, [24, 44, 50]),
        ("dpsgd", {"every": 1, "delay": 1}, 20, [20, 40, 50]),
        ("a2cid2", {"schedule": "ready"}, 20, [20, 40, 50]),
    ],
)
def test_a_save_waits_for_no_more_than_the_next_update_does(
    name: str, axes: Mapping[str, object], every: int, steps: list[int]
) -> None:
    found = saved([core(name, axes)], every)
    assert list(found) == steps
    if every != 1 and "schedule" not in axes:
        assert not any(wait for step, wait in found.items() if step != STEPS)


def test_where_fragments_always_fly_it_waits_as_little_as_it_can() -> None:
    """They start each 5 steps and land 8 later: of what flies, the last has 3 updates to go at best."""
    assert saved([core("diloco", {"every": 10, "delay": 8, "fragments": 2})], 20) == {24: 3, 44: 3, 50: 7}


def test_of_two_levels_both_are_to_land() -> None:
    """Near rounds land 2 steps after each 4th, far ones 9 after each 12th: before 21, when a near one has just started, and
    that has landed before 22; so after 21, 33 and 45."""
    near, far = core("dpsgd", {"every": 4, "delay": 2, "topology": "ring"}), core("diloco", {"every": 12, "delay": 9})
    assert saved([near, far], 12) == {21: 0, 33: 0, 45: 0, 50: 6}


def test_where_h_has_become_shorter_a_save_comes_as_its_round_ends() -> None:
    """H was 10, and is 6 of the round after step 16, as all islands know by then: it lands before update 22."""
    adapts = core("dilocox", {"every": "adaptive:10", "rank": "adaptive:8", "delay": "round"})
    saves = Saves([adapts], every=17, last=STEPS)
    since = {10: 10, 16: 6, 22: 6, 28: 6, 34: 5}
    found: list[int] = []
    for step in range(1, STEPS):
        if step in since:
            adapts.control = Control(since[step], step)
        if saves.after(step):
            found.append(step)
    assert found == [21, 38]


@pytest.mark.parametrize("delay", [4, "round"])
def test_a_run_that_goes_on_saves_where_it_would_have(delay: object) -> None:
    whole = [core("diloco", {"every": 10, "delay": delay})]
    steps = list(saved(whole, 20))
    before, after = (core("diloco", {"every": 10, "delay": delay}) for _ in range(2))
    for step in range(1, steps[0] + 1):
        for lane in before.due(step):
            lane.flight, lane.land_step = None, -1
        before.step = step
        before.start_rounds()
    after.load_state_dict(before.state_dict())
    assert list(saved([after], 20, begun=steps[0])) == steps[1:]

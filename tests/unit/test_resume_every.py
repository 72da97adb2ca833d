"""May a run go on with rounds of another spacing? Where none of them would start while one of its bucket still flies."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

import dtrain
from dtrain.assemble import assemble
from dtrain.bucket import flatten, make_buckets
from dtrain.connect import connect_local
from dtrain.core import Core
from dtrain.link import Peers
from dtrain.recipes import resolve
from dtrain.rounds import Level


def core(
    every: int, delay: int = 4, *, island_sum: Callable[[Sequence[float]], Sequence[float]] = tuple, has_bucket: bool = True
) -> Core:
    flat = flatten([("x", nn.Parameter(torch.zeros(6)))])
    buckets = make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=False)
    recipe = resolve("dpsgd", {"topology": "ring", "every": every, "delay": delay}, 4)
    return Core(assemble(recipe, 0, 4), buckets if has_bucket else [], Peers(0, 4), island_sum)


def in_flight_at(step: int) -> dict[str, torch.Tensor]:
    """Of rounds after every 10th step that land before the update 4 steps later."""
    flying = core(10)
    flying.step = 10
    flying.start_rounds()
    flying.step = step
    return flying.state_dict()


@pytest.mark.parametrize(("saved_at", "every"), [(10, 10), (11, 14), (11, 7), (13, 12), (12, 12)])
def test_a_round_that_lands_in_time_goes_on(saved_at: int, every: int) -> None:
    resumed = core(every)
    resumed.load_state_dict(in_flight_at(saved_at))
    for step in range(saved_at + 1, 21):
        for lane in resumed.due(step):
            lane.flight, lane.land_step = None, -1
        resumed.step = step
        resumed.start_rounds()


@pytest.mark.parametrize(("saved_at", "every", "starts"), [(10, 12, 12), (11, 12, 12), (11, 4, 12), (12, 13, 13)])
def test_one_that_would_be_crossed_is_refused(saved_at: int, every: int, starts: int) -> None:
    resumed = core(every)
    said = re.escape(f"lands before update 14, and sync.every = {every} starts the next after step {starts};")
    with pytest.raises(ValueError, match=said):
        resumed.load_state_dict(in_flight_at(saved_at))
    assert resumed.step == 0
    assert not resumed.in_flight()


@pytest.mark.parametrize(
    ("every", "delay", "lands"), [(10, 4, [14, 24, 34]), (14, 4, [14, 18, 32]), (10, 3, [14, 23, 33]), (10, 9, [14, 29])]
)
def test_all_ranks_of_an_island_know_when_it_lands_though_one_carries_it(every: int, delay: int, lands: list[int]) -> None:
    """One that has no part in what flew lands it too: it takes the new values from who has. A round of this run lands ``delay``
    later than it starts."""
    sums = list[Sequence[float]]()

    def first(values: Sequence[float]) -> Sequence[float]:
        sums.append(values)
        return values

    carrying = core(every, delay, island_sum=first)
    carrying.load_state_dict(in_flight_at(11))
    other = core(every, delay, island_sum=lambda values: [a + b for a, b in zip(sums[0], values, strict=True)], has_bucket=False)
    other.load_state_dict({"step": torch.tensor(11)} | {k: v for k, v in in_flight_at(11).items() if "bucket" not in k})
    ranks, landed = [Level(each, []) for each in (carrying, other)], list[int]()
    for step in range(12, 36):
        alone = ranks[0].fragments_due(step, 1)
        assert [level.fragments_due(step, 2) for level in ranks] == [alone, alone], step
        landed += [step] * len(alone)
        for lane in carrying.due(step):
            lane.flight, lane.land_step = None, -1
        for level in ranks:
            level.core.step = step
            level.core.start_rounds()
    assert landed == lands


def test_what_flew_lands_at_the_end_of_a_run_of_a_shorter_delay() -> None:
    def joined(delay: int) -> dtrain.Sync:
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return dtrain.join(model, optimizer, recipe="fedavg", every=10, delay=delay, link=connect_local(1)[0])

    with joined(8) as sync:
        for _ in range(11):
            sync.before_update()
            sync.after_update()
        state = {key: value.clone() for key, value in sync.state_dict().items()}
    with joined(2) as sync:
        sync.load_state_dict(state)
        assert [lane.land_step for lane in sync.core.in_flight()] == [18]
        sync.drain()
        assert not sync.core.in_flight()


def pairs(schedule: str) -> Core:
    flat = flatten([("x", nn.Parameter(torch.zeros(6)))])
    buckets = make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=False)
    return Core(assemble(resolve("a2cid2", {"schedule": schedule}, 4), 0, 4), buckets, Peers(0, 4))


@pytest.mark.parametrize(("of", "to"), [("every", "ready"), ("ready", "every")])
@pytest.mark.parametrize("before_the_key", [False, True])
def test_rounds_at_steps_do_not_go_on_as_meetings_of_who_is_ready_nor_the_other_way(
    of: str, to: str, before_the_key: bool
) -> None:
    """The tensors of one are among those of the other. A state without the key says by its tensors which it is."""
    state = {key: value for key, value in pairs(of).state_dict().items() if key != "ready" or not before_the_key}
    pairs(of).load_state_dict(state)
    said = "is of another recipe," if before_the_key and of == "ready" else f'sync.schedule = "{to}" has'
    with pytest.raises(ValueError, match=rf"^the saved state .*{said} .*; resume with ") as e:
        pairs(to).load_state_dict(state)
    assert "\n" not in str(e.value)


def test_a_meeting_that_flies_crosses_no_round_whatever_the_rows_delay() -> None:
    """A row of one's own may say a delay of 4: no step of a ready pair is 4 after another."""
    ready = pairs("ready")
    plan = dataclasses.replace(ready.plan, delay_steps=4)
    cores = [Core(plan, [lane.bucket for lane in ready.lanes], Peers(0, 4)) for _ in range(2)]
    cores[0].step = 10
    cores[0].start_rounds()
    cores[1].load_state_dict(cores[0].state_dict())
    assert cores[1].in_flight()

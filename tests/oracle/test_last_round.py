"""Is the last round of eager and pure in the exact average? As an outer optimizer has it that is given all rounds in time.

The renderings run in float64 and keep all deltas: what the islands are averaged to is torch's SGD on the means of these, and
on top the mean of what the islands have done since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.connect import Connection
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, LR, Problem, Settings, axes_of, bound, outer_sgd, problem, size_of
from tests.oracle.test_dropped import begun, sent_and_lost

EAGER = Settings(every=5, steps=18, outer_lr=0.4, outer_momentum=0.6)
PURE = Settings(every=5, steps=18, outer_lr=0.25, outer_momentum=0.8)
PLAIN = Settings(every=5, steps=18, outer_lr=0.4, outer_momentum=0.0)
DELAY = 2
"""Steps: a round has landed for three steps before it is applied."""
LOOKS = (8, 9, 18)
"""The steps after which an average is looked at."""


def in_time(p: Problem, s: Settings, deltas: Sequence[Tensor]) -> Tensor:
    return outer_in_time(p, s, deltas)[0]


def outer_in_time(p: Problem, s: Settings, deltas: Sequence[Tensor]) -> tuple[Tensor, torch.optim.Optimizer]:
    theta = p.start.clone()
    outer = outer_sgd(theta, s)
    for delta in deltas:
        theta.grad = delta.clone()
        outer.step()
    return theta, outer


def eager(p: Problem, n: int, s: Settings, steps: int, merges: Sequence[int] = ()) -> Tensor:
    """The average after so many steps, all rounds landed; ``merges``: after which steps it took the parameters' place."""
    thetas = [p.start.clone() for _ in range(n)]
    outers = [outer_sgd(theta, s) for theta in thetas]
    x, late, means = [p.start.clone() for _ in range(n)], [torch.zeros_like(p.start)] * n, []
    for t in range(1, steps + 1):
        x = [x_i - LR * (a * (x_i - c)) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if t % s.every == 0:
            deltas = [theta - x_i for theta, x_i in zip(thetas, x, strict=True)]
            for theta, outer, delta, late_i in zip(thetas, outers, deltas, late, strict=True):
                theta.grad = late_i + delta / n
                outer.step()
            means.append(torch.stack(deltas).mean(dim=0))
            late = [means[-1] - d / n for d in deltas]
            x = [theta.clone() for theta in thetas]
        if t in merges:
            since = torch.stack([x_i - theta for x_i, theta in zip(x, thetas, strict=True)]).mean(dim=0)
            thetas, outers = map(list, zip(*(outer_in_time(p, s, means) for _ in range(n)), strict=True))
            late, x = [torch.zeros_like(p.start)] * n, [thetas[0] + since] * n
    since = torch.stack([x_i - theta for x_i, theta in zip(x, thetas, strict=True)]).mean(dim=0)
    return in_time(p, s, means) + since


def pure(p: Problem, n: int, s: Settings, steps: int) -> Tensor:
    """Of every round the next one begins from what the rounds before the last make."""
    x, starts, means = [p.start.clone() for _ in range(n)], [p.start.clone() for _ in range(n)], []
    for t in range(1, steps + 1):
        x = [x_i - LR * (a * (x_i - c)) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if t % s.every == 0:
            mean = torch.stack([b - x_i for b, x_i in zip(starts, x, strict=True)]).mean(dim=0)
            if means:
                x = [in_time(p, s, means)] * n
            starts = x
            means.append(mean)
    since = torch.stack([x_i - b for x_i, b in zip(x, starts, strict=True)]).mean(dim=0)
    return in_time(p, s, means) + since


class Seen(NamedTuple):
    x: Tensor
    """(steps, width): after each step."""
    looked: dict[int, Tensor]
    """The average, by the step after which it was looked at."""
    merged: Tensor


def run(p: Problem, n: int, s: Settings, look: Sequence[int] = (), **axes: Any) -> list[Seen]:
    def island(connection: Connection) -> Seen:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        x, looked = [], {}
        with dtrain.join(model, optimizer, recipe="diloco", link=connection, **axes_of(s), **axes) as sync:
            for step in range(1, s.steps + 1):
                sgd_step(model, optimizer)
                if step in look:
                    with sync.merged():
                        looked[step] = model.flat()
                x.append(model.flat())
            sync.merge()
        return Seen(torch.stack(x), looked, model.flat())

    return run_islands(n, island)


def limit_of(p: Problem, n: int, s: Settings, landing: str, seen: Sequence[Seen]) -> float:
    """An average is rounded as a round's mean, and what is applied before it as one more outer step; gains as in test_diloco."""
    one_more = s._replace(steps=s.steps + s.every)
    gain = 1 + 2 / n if landing == "eager" and n > 1 else 1.0
    limit = bound(one_more, size_of(torch.stack([each.x for each in seen]), p), gain)
    assert limit < 1e-3
    return limit


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("landing", "s"), [("eager", EAGER), ("eager", PLAIN), ("pure", PURE), ("pure", PLAIN)])
def test_the_average_has_every_delta_as_if_in_time(landing: str, s: Settings, n: int) -> None:
    """At the end and on the way, where looking changes nothing after."""
    p, rendering = problem(n), {"eager": eager, "pure": pure}[landing]
    unseen = run(p, n, s, delay=DELAY, landing=landing)
    looking = run(p, n, s, look=LOOKS, delay=DELAY, landing=landing)
    limit = limit_of(p, n, s, landing, unseen)
    for one, other in zip(unseen, looking, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.merged, other.merged)
        for step, average in (*other.looked.items(), (s.steps, one.merged)):
            assert float((average.double() - rendering(p.double(), n, s, step)).abs().max()) <= limit
    last = torch.stack([seen.x[-1] for seen in unseen]).mean(dim=0)
    assert (n == 1 and landing == "eager") or float((unseen[0].merged - last).abs().max()) > 100 * limit, "a plain mean is off"


@pytest.mark.parametrize("merged_at", [8, 11])
def test_training_goes_on_from_a_merge_as_if_nothing_had_been_late(merged_at: int) -> None:
    p, n, s = problem(3), 3, EAGER._replace(steps=13)

    def island(connection: Connection) -> tuple[Tensor, Tensor]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=LR), []
        with dtrain.join(model, optimizer, recipe="diloco", delay=DELAY, landing="eager", link=connection, **axes_of(s)) as sync:
            for step in range(1, s.steps + 1):
                sgd_step(model, optimizer)
                if step == merged_at:
                    sync.merge()
                x.append(model.flat())
            sync.merge()
        return torch.stack(x), model.flat()

    for x, merged in run_islands(n, island):
        limit = limit_of(p, n, s._replace(steps=s.steps + s.every), "eager", [Seen(x, {}, merged)])
        assert float((merged.double() - eager(p.double(), n, s, s.steps, [merged_at])).abs().max()) <= limit


@pytest.mark.parametrize("landing", ["eager", "pure"])
def test_a_round_that_flies_for_its_whole_period_lands_before_the_merge(landing: str) -> None:
    p, n, s = problem(3), 3, PLAIN
    rendering = {"eager": eager, "pure": pure}[landing]
    seen = run(p, n, s, delay="round", landing=landing)
    assert float((seen[0].merged.double() - rendering(p.double(), n, s, s.steps)).abs().max()) <= limit_of(p, n, s, landing, seen)


@pytest.mark.parametrize("landing", ["eager", "pure"])
def test_a_round_that_was_dropped_leaves_nothing_to_apply(landing: str) -> None:
    x = torch.zeros(4)
    algorithm, bucket, state = begun(landing, x)
    for _ in range(2):
        x.sub_(8.0)
        sent_and_lost(algorithm, bucket, state)
    before = {key: value.clone() for key, value in state.items()}
    as_it_was = x.clone()
    assert algorithm.rest is not None
    algorithm.rest(bucket, state)
    assert torch.equal(x, as_it_was)
    assert all(torch.equal(before[key], state[key]) for key in state)


@pytest.mark.parametrize("landing", ["eager", "pure"])
def test_nothing_is_applied_twice(landing: str) -> None:
    """A second merge finds nothing to apply, and the islands alike."""
    p, n, s = problem(2), 2, PLAIN

    def island(connection: Connection) -> tuple[Tensor, Tensor]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="diloco", delay=DELAY, landing=landing, link=connection, **axes_of(s)) as sync:
            for _ in range(2 * s.every + DELAY):
                sgd_step(model, optimizer)
            sync.merge()
            once = model.flat()
            sync.merge()
        return once, model.flat()

    for once, twice in run_islands(n, island):
        assert torch.equal(once, twice)

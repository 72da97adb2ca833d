"""Do islands of unequal speed train in as many steps as DyLU says, count by them, and follow delayed Nesterov by arrivals?

The rendering is plain torch in float64, on one vector an island, and applies what arrives one island after another (Liu et al.
2024, arXiv 2401.09135)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.bucket import Layout, Span
from dtrain.codec import by_name
from dtrain.connect import Connection
from dtrain.link import Peers
from dtrain.low_rank import low_rank
from dtrain.recipes import resolve, with_speeds
from dtrain.reduce import Reduce, all_to_all, gather
from dtrain.slots import Pace, local_steps
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, LR, Problem, U, problem
from tests.oracle.test_reduce import exchange

EVERY, STEPS = 6, 27
SPEEDS = (1.0, 0.6, 0.35)
TRAINS = ({1, 2, 3, 4, 5, 6}, {1, 3, 5}, {1, 4})
"""In which of EVERY steps: floor(6), floor(3.6) and floor(2.1)."""
ALL = (TRAINS[0],) * 3
OUTER_LR, MU = 0.7, 0.6


class Run(NamedTuple):
    x: Tensor
    """(steps + 1, n, width): after each step, and after the drain."""
    trained: list[list[int]]
    """Of each island, the steps."""


def run(p: Problem, speeds: tuple[float, ...], **axes: Any) -> Run:
    def island(connection: Connection) -> tuple[Tensor, list[int]]:
        node = connection.node
        model = Quadratic(p.start, p.a[node], p.c[node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen, trained = [], []
        with dtrain.join(model, optimizer, link=connection, speeds=speeds, **axes) as sync:
            while sync.step < STEPS:
                if sync.idle:
                    sync.sit_out()
                else:
                    sgd_step(model, optimizer)
                    trained.append(sync.step)
                seen.append(model.flat())
        return torch.stack([*seen, model.flat()]), trained

    each = run_islands(3, island)
    return Run(torch.stack([x for x, _ in each], dim=1), [trained for _, trained in each])


def arrivals(p: Problem, trains: tuple[set[int], ...], delay: int) -> Tensor:
    theta, m = p.start.clone(), torch.zeros_like(p.start)
    total = sum(len(slots) for slots in trains)
    weights = [len(slots) / total for slots in trains]
    x, seen = [p.start.clone() for _ in trains], []
    flight: tuple[int, list[Tensor], list[Tensor]] | None = None

    def land(sent: list[Tensor], deltas: list[Tensor]) -> None:
        nonlocal theta, m
        buffer = torch.zeros_like(theta)
        for w, delta in zip(weights[:-1], deltas[:-1], strict=True):
            buffer += w * delta
            theta = theta - OUTER_LR * w * delta
        m = MU * m + buffer + weights[-1] * deltas[-1]
        theta = theta - OUTER_LR * (MU * m + weights[-1] * deltas[-1])
        x[:] = [x_i - sent_i + theta for x_i, sent_i in zip(x, sent, strict=True)]

    for t in range(1, STEPS + 1):
        steps = [LR * a * (x_i - c) * ((t - 1) % EVERY + 1 in s) for x_i, a, c, s in zip(x, p.a, p.c, trains, strict=True)]
        if flight and flight[0] == t:
            land(*flight[1:])
        x[:] = [x_i - step for x_i, step in zip(x, steps, strict=True)]
        if t % EVERY == 0:
            flight = (t + delay, list(x), [theta - x_i for x_i in x])
            if delay == 0:
                land(*flight[1:])
        seen.append(torch.stack(x))
    if flight and flight[0] > STEPS:
        land(*flight[1:])
    return torch.stack([*seen, torch.stack(x)])


@pytest.mark.parametrize(("delay", "reduce"), [(0, "all_to_all"), (0, "gather"), (4, "all_to_all"), ("round", "all_to_all")])
@pytest.mark.parametrize(("speeds", "trains"), [((), ALL), (SPEEDS, TRAINS)])
def test_it_is_delayed_nesterov_one_arrival_after_another(
    speeds: tuple[float, ...], trains: tuple[set[int], ...], delay: Any, reduce: str
) -> None:
    """fp32 beside fp64: a step rounds 4 times, a round 12, of numbers below 4; momentum and outer steps carry that on, 3 times at
    most."""
    p = problem(3)
    axes = {"recipe": "async_diloco", "every": EVERY, "delay": delay, "reduce": reduce}
    got = run(p, speeds, **axes, outer_lr=OUTER_LR, outer_momentum=MU)
    want = arrivals(p.double(), trains, EVERY if delay == "round" else delay)
    bound = 3 * (4 * STEPS + 12 * (STEPS // EVERY)) * 4 * U
    assert float((got.x.double() - want).abs().max()) <= bound < 1e-3
    assert [{(t - 1) % EVERY + 1 for t in steps} for steps in got.trained] == [set(s) for s in trains]
    assert [len(steps) for steps in got.trained] == [sum((t - 1) % EVERY + 1 in s for t in range(1, STEPS + 1)) for s in trains]
    if speeds:
        alike = arrivals(p.double(), ALL, 0)
        assert float((want - alike).abs().max()) > 0.01, "so that weights and idle steps are seen"


def test_one_speed_for_all_is_none_and_its_outer_step_nesterovs() -> None:
    p, axes = problem(3), {"every": EVERY, "delay": 2, "outer_momentum": MU, "outer_lr": OUTER_LR}
    plain = run(p, (), recipe="diloco", **axes).x
    assert torch.equal(run(p, (1.0, 1.0, 1.0), recipe="diloco", **axes).x, plain)
    assert torch.equal(run(p, (), recipe="async_diloco", **axes).x, plain)


def test_eager_applies_its_own_share_at_once() -> None:
    """w_i of its own delta, and of those before it the others'."""
    p = problem(3).double()
    got = run(problem(3), SPEEDS, recipe="eager_diloco", every=EVERY, outer="sgd", outer_lr=0.25)
    weights = [len(s) / 11 for s in TRAINS]
    thetas, late = [p.start.clone() for _ in TRAINS], [torch.zeros_like(p.start) for _ in TRAINS]
    x = [p.start.clone() for _ in TRAINS]
    for t in range(1, STEPS + 1):
        for i, s in enumerate(TRAINS):
            x[i] = x[i] - LR * p.a[i] * (x[i] - p.c[i]) * ((t - 1) % EVERY + 1 in s)
        if t % EVERY == 0:
            own = [theta - x_i for theta, x_i in zip(thetas, x, strict=True)]
            thetas = [th - 0.25 * (w * d + o) for th, w, d, o in zip(thetas, weights, own, late, strict=True)]
            mean = sum((w * d for w, d in zip(weights, own, strict=True)), torch.zeros_like(p.start))
            late, x = [mean - w * d for w, d in zip(weights, own, strict=True)], list(thetas)
        assert float((got.x[t - 1].double() - torch.stack(x)).abs().max()) <= 3 * (4 * STEPS + 48) * 4 * U, t


@pytest.mark.parametrize("path", ["gather", "all_to_all", "low_rank"])
def test_each_path_weighs_by_shares(path: str) -> None:
    """Whole numbers and eighths: exact. Of full rank the product is the mean but for rounding, 1e-5 of numbers up to 8."""
    layout = Layout((Span("m", (6, 5), 0, 0, 30), Span("v", (130,), 30, 30, 160)))
    codec, shares = by_name("identity", error_feedback=False), (4, 1, 3)
    paths: dict[str, Reduce] = {
        "gather": gather(codec), "all_to_all": all_to_all(codec),
        "low_rank": low_rank(codec, lambda s: 5 * (len(s.shape) == 2), feedback_decay=None),
    }  # fmt: skip
    bound = [paths[path](layout, Peers(node, 3, shares)) for node in range(3)]
    xs = [torch.randint(-8, 9, (160,), generator=torch.Generator().manual_seed(i)).float() for i in range(3)]
    outs, _ = exchange(bound, xs, [b.init(torch.device("cpu")) for b in bound])
    want = sum((s * x / 8 for s, x in zip(shares, xs, strict=True)), torch.zeros(160))
    for out in outs:
        assert torch.equal(out[30:], want[30:])
        assert torch.equal(out[:30], want[:30]) if path != "low_rank" else torch.allclose(out[:30], want[:30], atol=1e-4)


def test_idle_steps_are_spread_evenly_and_every_period_has_as_many() -> None:
    for every in (*range(1, 13), 50):
        for steps in range(1, every + 1):
            pace = Pace(every, (steps,))
            slots = [t for t in range(1, 3 * every + 1) if pace.trains(0, t)]
            assert slots[0] == 1
            assert [sum(a < t <= a + every for t in slots) for a in range(2 * every + 1)] == [steps] * (2 * every + 1)
            gaps = {b - a for a, b in pairwise(slots)}
            assert gaps <= {every // steps, -(-every // steps)}
            assert [pace.trained(0, t) for t in range(3 * every)] == [sum(s <= t for s in slots) for t in range(3 * every)]
    assert local_steps(0.29, 100) == 29, "28.999999999999996 in floating point"
    assert local_steps(0.999, 50) == 49
    assert Pace(50, (50, 25, 10)).shares == (10, 5, 2)


@pytest.mark.parametrize(
    ("recipe", "overrides", "speeds", "said"),
    [
        ("diloco", {}, [1.0, 0.5], "names 2 islands, and there are 3; give a speed for each"),
        ("diloco", {}, [1.0], "names 1 island, and there are 3; give a speed for each"),
        ("diloco", {}, [1.0, 0.0, 0.5], "island 1 would never train; use numbers above 0, and 1 for the fastest"),
        ("diloco", {}, [1.0, 0.5, -0.5], "island 2 would never train; use numbers above 0, and 1 for the fastest"),
        ("diloco", {}, [2.0, 1.0, 0.5], "divide each by the largest"),
        ("diloco", {}, [0.5, 0.5, 0.5], "divide each by the largest"),
        ("diloco", {"every": 9}, [1.0, 0.1, 0.5], "island 1 would train in none of sync.every = 9 steps; use every = 10 or more"),
        ("allreduce", {}, [1.0, 1.0, 0.5], 'has sync.every = 1 with sync.schedule = "every"; leave it out, or use sync.recipe'),
        ("dpsgd", {}, [1.0, 1.0, 0.5], "is for rounds that are many steps apart"),
        ("diloco", {"schedule": "budget:10"}, [1.0, 1.0, 0.5], "is for rounds that are many steps apart"),
        *(
            (name, {"every": 10}, [1.0, 1.0, 0.5], 'in those of sync.reduce = "neighbours" none would count less; leave it')
            for name in ("noloco", "dpsgd", "choco", "push_sum", "a2cid2")
        ),
        (
            "dilocox", {"rank": "adaptive:32", "every": "adaptive:20"}, [1.0, 1.0, 0.5],
            'and sync.every = "adaptive:20" brings them nearer; leave it out, or use sync.every = 20',
        ),
        (
            "eager_diloco", {"outer_momentum": 0.9, "outer_lr": 0.42}, [1.0, 1.0, 0.1],
            "of 3 islands, of which the slowest has 1 / 21 of each mean",
        ),
    ],
)  # fmt: skip
def test_speeds_that_do_not_fit_are_refused(recipe: str, overrides: dict[str, Any], speeds: list[float], said: str) -> None:
    row = resolve(recipe, overrides, 3)
    with pytest.raises(ValueError, match=r"^(islands\.speeds|sync\.outer_lr)") as refused:
        with_speeds(row, speeds, 3)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert with_speeds(row, [1.0, 1.0, 1.0], 3) == with_speeds(row, [], 3) == row


def test_a_loop_that_trains_in_an_idle_step_is_told_how() -> None:
    def island(connection: Connection) -> None:
        model = Quadratic(torch.zeros(4), torch.ones(4), torch.ones(4), 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, link=connection, recipe="fedavg", every=2, speeds=[1.0, 0.5]) as sync:
            with pytest.raises(ValueError, match="step 1 is not idle on island"):
                sync.sit_out()
            sgd_step(model, optimizer)
            before = model.flat()
            if connection.node == 1:
                with pytest.raises(ValueError, match=r"^island 1 is idle in step 2, as its speed says; .*sync\.sit_out\(\)"):
                    sgd_step(model, optimizer)
                assert torch.equal(model.flat(), before), "refused before anything moves"
                sync.sit_out()
            else:
                sgd_step(model, optimizer)
            assert sync.step == 2

    run_islands(2, island)

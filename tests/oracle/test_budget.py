"""Does a budget spend just the rounds that it has, ever faster, and is a run by it the matrix recursion of its steps?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import dtrain
from dtrain.connect import Connection
from dtrain.recipes import of_join, of_section, resolve, with_steps
from dtrain.schedule import Budget, Control, check_budget, parse, spent
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, LR, Matrix, U, largest, problem
from tests.oracle.test_topology import w_of

CONTROL = Control(every=1)
BUDGETS = [("budget:1", 7), ("budget:7", 100), ("budget:20%", 100), ("budget:20%:0", 101), ("budget:50", 100), ("budget:9:3", 64)]


def starts(budget: Budget, total: int, fragment: int = 0, fragments: int = 1) -> list[int]:
    when = spent(budget, fragments, total)
    return [t for t in range(1, total + 50) if when(t, fragment, CONTROL)]


def of(name: str) -> Budget:
    budget = parse(name)
    assert budget is not None
    return budget


@pytest.mark.parametrize("fragment", [0, 1, 2])
@pytest.mark.parametrize(("name", "total"), BUDGETS)
def test_just_so_many_rounds_start_and_none_after_the_end(name: str, total: int, fragment: int) -> None:
    for fragments in (1, 3):
        if fragment < fragments:
            rounds = starts(of(name), total, fragment, fragments)
            assert len(rounds) == of(name).rounds(total)
            assert 1 <= rounds[0] <= rounds[-1] <= total


@pytest.mark.parametrize(("name", "total"), BUDGETS)
def test_the_kth_round_comes_where_the_integral_of_the_density_says(name: str, total: int) -> None:
    """A density of R (p + 1) t^p / T^(p+1) spends its kth round at t = T (k / R)^(1 / (p+1)): in the first whole step from there,
    where floating point knows which that is (it is off by 1e-12 T at most, and now and then the point is a whole step)."""
    budget = of(name)
    rounds = starts(budget, total)
    for k, t in enumerate(rounds, 1):
        exact = total * (k / len(rounds)) ** (1 / (budget.growth + 1))
        assert t in {int(np.ceil(exact - 1e-9)), int(np.ceil(exact + 1e-9))}
    assert rounds[-1] == total, "the last round is behind the last step"


def test_twenty_percent_of_a_hundred_steps() -> None:
    """t = 100 sqrt(k / 20), rounded up, by hand; p = 0 is every fifth step."""
    by_hand = [23, 32, 39, 45, 50, 55, 60, 64, 68, 71, 75, 78, 81, 84, 87, 90, 93, 95, 98, 100]
    assert starts(Budget(20, True, 1), 100) == by_hand
    assert starts(Budget(20, True, 0), 100) == list(range(5, 101, 5))
    assert [starts(Budget(5, False, 0), 60, f, 4) for f in range(4)] == [list(range(12 - 3 * f, 61, 12)) for f in range(4)]


@pytest.mark.parametrize(("growth", "fragments"), [(0, 1), (1, 1), (2, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("delay", [0, 1, 2, 5])
def test_what_is_let_through_lands_before_it_starts_again(growth: int, fragments: int, delay: int) -> None:
    """And one round more than the most that is said to be possible is refused."""
    total = 60
    allowed = [r for r in range(1, total + 1) if is_allowed(f"budget:{r}:{growth}", total, delay)]
    assert allowed == list(range(1, len(allowed) + 1))
    for rounds in {1, allowed[-1] // 2, allowed[-1]} - {0}:
        for fragment in range(fragments):
            begun = starts(Budget(rounds, False, growth), total, fragment, fragments)
            assert len(begun) == rounds
            assert all(b - a >= max(1, delay) for a, b in pairwise(begun))
    assert allowed[-1] >= total / (max(1, delay) * (growth + 1)) - 1, "no less than one over the last density"


def is_allowed(name: str, total: int, delay: int) -> bool:
    try:
        check_budget(name, of(name), total, delay)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "total", "said"),
    [
        ("budget:51", 100, "is 51 rounds in 100 steps, and a round must land before the next starts: with sync.delay = 1 use 50"),
        ("budget:1%", 20, "is not one round in 20 steps"),
        ("budget:5", 0, "total_steps = 0 is not allowed; use a whole number, 1 or more"),
        ("budget:5", None, "give join its length: total_steps="),
    ],
)
def test_a_budget_that_does_not_fit_the_run_is_one_line(name: str, total: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        with_steps(resolve("dpsgd", {"schedule": name}, 2), total)
    assert said in str(caught.value)


def test_a_job_binds_its_budget_to_its_steps() -> None:
    assert of_section({"recipe": "single_merge"}, 2, 100).total_steps == 100
    assert of_section({"recipe": "dpsgd"}, 2, 100).total_steps is None, "islands that need no length agree without one"
    with pytest.raises(ValueError, match="is not one round in 2 steps"):
        of_section({"recipe": "single_merge"}, 2, 2)


WRONG = ["late", "budget", "budget:", "budget:0", "budget:x", "budget:5%%", "budget:5:9", "budget:5:1:1", "budget:-1"]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_schedule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match='is not known; use "every", or "budget:R"'):
        parse(name)


STEPS, ISLANDS, BUDGET = 24, 4, "budget:25%"


def recursion() -> tuple[Matrix, list[int]]:
    """X before and after the merge, with rounds that land a step late at steps ceil(24 sqrt(k / 6))."""
    p = problem(ISLANDS)
    begun = [int(np.ceil(STEPS * (k / 6) ** 0.5)) for k in range(1, 7)]
    X = np.tile(p.start.astype(np.float64), (ISLANDS, 1))
    flying = np.zeros_like(X)
    for t in range(1, STEPS + 1):
        X = X + flying - LR * p.gradient(X)
        index = begun.index(t) if t in begun else None
        flying = np.zeros_like(X) if index is None else (w_of("random_pairs", None, index, ISLANDS) - np.eye(ISLANDS)) @ X
    return X + flying, begun


class Stands(NamedTuple):
    x: torch.Tensor
    state: dict[str, torch.Tensor]
    rounds: list[int]
    """Steps after which one started."""


def islands(first: int, last: int, saved: list[Stands] | None, *, merge: bool = False) -> list[Stands]:
    p = problem(ISLANDS)
    axes = {"recipe": "single_merge", "schedule": BUDGET, "total_steps": STEPS, "bucket_bytes": BUCKET_BYTES}

    def island(connection: Connection) -> Stands:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        rounds = []
        with dtrain.join(model, optimizer, **axes, link=connection) as sync:
            if saved is not None:
                model.set_flat(saved[connection.node].x)
                sync.load_state_dict(saved[connection.node].state)
            for step in range(first + 1, last + 1):
                before = sync.core.lanes[0].round
                sgd_step(model, optimizer)
                rounds += [step] * (sync.core.lanes[0].round - before)
            state = {k: v.clone() for k, v in sync.state_dict().items()}
            if merge:
                sync.merge()
            elif last == STEPS:
                sync.drain()
            x = model.flat().clone()
        return Stands(x, state, rounds)

    return run_islands(ISLANDS, island)


def test_single_merge_follows_its_recursion_and_goes_on_as_if_never_stopped() -> None:
    """Six rounds at the steps that the closed form says; a resume between two of them keeps both the past and the future ones."""
    want, begun = recursion()
    got = islands(0, STEPS, None)
    assert [rounds for _, _, rounds in got] == [begun] * ISLANDS
    M = max(largest(want), 1.0)
    # As D-PSGD in test_gossip: 20 u M a step, which do not grow.
    for node, (x, _, _) in enumerate(got):
        assert largest(x.numpy() - want[node]) <= 20 * (STEPS + 1) * U * M
    at = begun[3]
    again = islands(at, STEPS, islands(0, at, None))
    assert [rounds for _, _, rounds in again] == [begun[4:]] * ISLANDS
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, again, strict=True))


def test_it_ends_in_the_exact_mean() -> None:
    want = recursion()[0].mean(axis=0)
    merged = islands(0, STEPS, None, merge=True)
    assert all(torch.equal(x, merged[0][0]) for x, _, _ in merged)
    assert largest(merged[0][0].numpy() - want) <= 20 * (STEPS + 2) * U * max(largest(want), 1.0)


def test_islands_with_runs_of_different_length_are_refused() -> None:
    def island(connection: Connection) -> None:
        model = problem(2).model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        dtrain.join(model, optimizer, recipe="single_merge", total_steps=100 + 10 * connection.node, link=connection)

    with pytest.raises(ValueError, match="has another recipe than island 0"):
        run_islands(2, island)


LONGER = {"schedule": BUDGET, "total_steps": 36}


@pytest.mark.parametrize(
    ("recipe", "of", "to", "said"),
    [
        ("dpsgd", BUDGET, LONGER, f'over 24 steps, and sync.schedule = "{BUDGET}" spreads them over 36 '),
        ("diloco", BUDGET, LONGER, f'over 24 steps, and sync.schedule = "{BUDGET}" spreads them over 36 '),
        ("dpsgd", BUDGET, {}, 'over 24 steps, and sync.schedule = "every" spreads them over every so many steps'),
        ("dpsgd", "every", {"schedule": BUDGET, "total_steps": 24}, f'every so many steps, and sync.schedule = "{BUDGET}"'),
    ],
)
def test_what_flies_at_the_end_is_not_taken_into_another_schedule(recipe: str, of: str, to: dict[str, Any], said: str) -> None:
    """The last round lands after step 25 of 24. By another budget nothing would know when."""

    def island(connection: Connection) -> int:
        def joined(axes: dict[str, Any]) -> tuple[Quadratic, torch.optim.Optimizer, dtrain.Sync]:
            model = problem(2).model(connection.node)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            return model, optimizer, dtrain.join(model, optimizer, recipe=recipe, delay=1, **axes, link=connection)

        began = {"schedule": of} | ({"total_steps": STEPS} if of == BUDGET else {})
        model, optimizer, sync = joined(began)
        for _ in range(STEPS):
            sgd_step(model, optimizer)
        saved = {k: v.clone() for k, v in sync.state_dict().items()}
        sync.close()
        _, _, again = joined(to)
        with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
            again.load_state_dict(saved)
        assert said in str(caught.value)
        again.close()
        return int(saved["bucket0.land_step"])

    assert run_islands(2, island) == [25 if of == BUDGET or recipe == "dpsgd" else -1] * 2


def test_a_loop_longer_than_its_budget_is_told() -> None:
    def island(connection: Connection) -> int:
        model = problem(2).model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="dpsgd", schedule="budget:50%", total_steps=4, link=connection) as sync:
            for _ in range(4):
                sgd_step(model, optimizer)
            with pytest.raises(ValueError, match=r"^step 5 is past total_steps = 4, .*; give join the whole run's length$"):
                sgd_step(model, optimizer)
            return sync.step

    assert run_islands(2, island) == [4, 4]


@pytest.mark.parametrize("total", [0, -3, True, 20.0, "20"])
def test_a_length_is_a_whole_number(total: Any) -> None:
    with pytest.raises(ValueError, match=r"^total_steps = .* is not allowed; use a whole number, 1 or more$"):
        of_join(resolve("dpsgd", {"schedule": "budget:25%"}, 2), total)


def test_a_length_that_no_budget_needs_is_refused_in_a_loop_and_not_in_a_job() -> None:
    with pytest.raises(ValueError, match=r'^total_steps = 20 has no effect with sync.schedule = "every"; leave it out, or'):
        of_join(resolve("dpsgd", {}, 2), 20)
    assert of_join(resolve("dpsgd", {}, 2), None).total_steps is None

"""Which outer learning rates do DiLoCo's landings bear? The model of ``dtrain/stability.py`` beside closed forms and islands.

The islands are the real ones, of SGD on a quadratic loss with its minimum at 0: of curvature 1 - r a step of lr = 1 leaves r."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from dtrain.landing_fits import loop_of
from dtrain.recipes import RECIPES, resolve
from dtrain.stability import Landing, Loop, is_stable, largest_outer_lr, round_matrices
from tests.islands import Quadratic, run_islands, sgd_step

TABLE = {
    0.9: (1.35, 0.77, 0.41, 0.25, 1.09),
    0.8: (1.38, 0.86, 0.51, 0.34, 1.16),
    0.6: (1.45, 1.07, 0.67, 0.49, 1.30),
    0.5: (1.50, 1.18, 0.76, 0.56, 1.37),
    0.3: (1.62, 1.46, 0.96, 0.71, 1.56),
    0.0: (2.0, 2.0, 1.33, 1.0, 2.0),
}
"""Of a momentum: in time, eager of 2 and of 4 islands, pure, keep for a whole round. Cut off, or rounded, after two digits."""


@pytest.mark.parametrize("momentum", TABLE)
def test_the_largest_stable_learning_rates_are_those_of_the_table(momentum: float) -> None:
    loops = (
        *(Loop("keep", momentum), Loop("eager", momentum, num_islands=2), Loop("eager", momentum, num_islands=4)),
        *(Loop("pure", momentum), Loop("keep", momentum, every=28, delay=28)),
    )
    assert [largest_outer_lr(loop) for loop in loops] == pytest.approx(TABLE[momentum], abs=0.01)


@pytest.mark.parametrize("momentum", TABLE)
def test_the_bounds_are_those_that_have_a_closed_form(momentum: float) -> None:
    """In time: a root comes to z = -1. Pure without momentum: z^2 - z + lr s, and |z|^2 = lr s. Eager of n: the product of the
    roots is (1 - 1 / n) lr s. keep, and blend, that land before a round's last steps: as in time."""
    in_time = 2 * (1 + momentum) / (1 + 2 * momentum)
    assert largest_outer_lr(Loop("keep", momentum)) == pytest.approx(in_time, abs=1e-6)
    assert largest_outer_lr(Loop("eager", momentum)) == pytest.approx(in_time, abs=1e-6)
    assert largest_outer_lr(Loop("keep", momentum, every=28, delay=6)) == pytest.approx(in_time, abs=1e-6)
    assert largest_outer_lr(Loop("blend", momentum, every=25, delay=5, alpha=0.5)) == pytest.approx(in_time, abs=1e-6)
    if momentum == 0:
        assert largest_outer_lr(Loop("pure", momentum)) == pytest.approx(1, abs=1e-6)
        assert largest_outer_lr(Loop("eager", momentum, num_islands=8)) == pytest.approx(8 / 7, abs=1e-6)


@pytest.mark.parametrize("loop", [Loop("pure", 0.9), Loop("eager", 0.6, 4), Loop("keep", 0.9, every=28, delay=28)])
def test_below_the_bound_all_is_stable_and_above_nothing(loop: Loop) -> None:
    most = largest_outer_lr(loop)
    assert all(is_stable(loop, most * share) for share in (0.01, 0.3, 0.6, 0.9, 0.999))
    assert not any(is_stable(loop, most * share) for share in (1.001, 1.5, 3.0))


# ---- islands


class Case(NamedTuple):
    landing: Landing
    islands: int
    every: int
    delay: int | Literal["round"]
    alpha: float = 0.5

    def axes(self, lr: float, momentum: float) -> dict[str, Any]:
        alpha = {"alpha": self.alpha} if self.landing == "blend" else {}
        said = {"landing": self.landing, "every": self.every, "delay": self.delay, "outer_lr": lr, "outer_momentum": momentum}
        return {"recipe": "diloco", "reduce": "gather", **said, **alpha}

    def loop(self, momentum: float) -> Loop:
        axes = self.axes(1e-3, momentum)
        return loop_of(resolve(axes.pop("recipe"), axes, self.islands), self.islands)


CASES = [
    Case("keep", 1, 1, 0),
    Case("keep", 1, 1, "round"),
    Case("keep", 2, 2, 1),
    Case("eager", 2, 1, 1),
    Case("eager", 3, 1, "round"),
    Case("pure", 1, 1, "round"),
    Case("pure", 2, 2, 1),
    Case("blend", 1, 3, 2),
    Case("blend", 2, 1, 0, 0.25),
]


DIRECTIONS = np.array([0.0, 0.1, 0.3, 0.6, 0.95])
"""What a step leaves; 0 is what most landings bear least."""


class Seen(NamedTuple):
    x: NDArray[np.float64]
    """(rounds, directions): behind the step after which each round starts, and behind what that moves."""
    anchor: NDArray[np.float64]
    """(rounds,): its largest value; where every round begins with x = 0 it may be large."""


def seen_by_islands(case: Case, lr: float, momentum: float, rounds: int) -> Seen:

    def island(connection: Connection) -> tuple[list[NDArray[np.float32]], list[float]]:
        width = len(DIRECTIONS)
        curvature = torch.tensor(1 - DIRECTIONS, dtype=torch.float32)
        model = Quadratic(torch.ones(width), curvature, torch.zeros(width), 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        seen: list[NDArray[np.float32]] = []
        anchors: list[float] = []
        with dtrain.join(model, optimizer, link=connection, **case.axes(lr, momentum)) as sync:
            for step in range(1, rounds * case.every + 1):
                sgd_step(model, optimizer)
                if step % case.every == 0:
                    seen.append(model.flat().numpy().copy())
                    anchors.append(max(float(lane.state["anchor"].abs().max()) for lane in sync.core.lanes))
        return seen, anchors

    x, anchors = run_islands(case.islands, island)[0]
    return Seen(np.array(x, dtype=np.float64), np.array(anchors))


@pytest.mark.parametrize("case", CASES)
def test_a_round_of_islands_is_its_matrix(case: Case) -> None:
    """What is linear in a state obeys the characteristic polynomial of its rounds (Cayley and Hamilton), whatever it began with:
    x_t+3 + c_2 x_t+2 + c_1 x_t+1 + c_0 x_t = 0. pure's first round is left out, which has none before it."""
    lr, momentum = 0.2, 0.5
    seen = seen_by_islands(case, lr, momentum, 14).x[1:]
    matrices = round_matrices(case.loop(momentum), lr, 1 - DIRECTIONS**case.every)
    assert np.abs(seen[-4:]).max() > 1e-3, "not all is 0 yet"
    for direction, matrix in enumerate(matrices):
        x, c = seen[:, direction], np.poly(matrix)
        left = sum(c[k] * x[3 - k : len(x) - k] for k in range(4))
        # An x is off by some roundings of its round, 2^-24 each of values up to 1, and the coefficients' sum is below 8.
        assert np.abs(left).max() <= 8 * 20 * 2.0**-24


@pytest.mark.parametrize("case", CASES)
def test_islands_settle_just_below_the_bound_and_leave_just_above(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 % beside it a round makes x 1.2 % smaller, or 1.7 % larger, at least: of 50 rounds 0.55 and 2.3."""
    monkeypatch.setattr("dtrain.recipe_fits.check_stable", lambda recipe, num_islands: None)
    momentum = 0.6
    most = largest_outer_lr(case.loop(momentum))
    for share, least, largest in ((0.95, 0.0, 0.7), (1.05, 1.7, np.inf)):
        sizes = seen_by_islands(case, share * most, momentum, 90).anchor
        assert least <= sizes[60:].max() / sizes[10:40].max() <= largest


# ---- recipes


@pytest.mark.parametrize("num_islands", [1, 2, 3, 4, 8, 64, 1024])
@pytest.mark.parametrize("name", [row.name for row in RECIPES.values() if row.algorithm == "diloco"])
def test_every_row_is_stable_with_any_number_of_islands(name: str, num_islands: int) -> None:
    assert resolve(name, {}, num_islands) == RECIPES[name]


NESTEROV = "sync.outer_lr = {} with sync.outer_momentum = 0.9"


@pytest.mark.parametrize(
    ("changes", "what", "late", "times", "remedy"),
    [
        ({"landing": "pure", "delay": "round"}, NESTEROV.format(0.7), "pure", 1.28, "an outer_lr below 0.253, or less momentum"),
        ({"landing": "eager", "delay": 9}, NESTEROV.format(0.7), "eager", 1.14, "an outer_lr below 0.415, or less momentum"),
        ({"outer_lr": 1.5}, NESTEROV.format(1.5), "waited", 1.3, "an outer_lr below 1.357, or less momentum"),
        ({"outer_lr": 1.2, "delay": 100}, NESTEROV.format(1.2), "keep", 1.08, "an outer_lr below 1.086, or less momentum"),
        ({"outer": "copy", "landing": "pure", "delay": 1}, 'sync.outer = "copy"', "pure", 1,
         'outer = "sgd" with an outer_lr below 0.999'),
        ({"outer": "sgd", "outer_lr": 2.5, "landing": "blend", "delay": 5}, "sync.outer_lr = 2.5", "blend", 1.5,
         "an outer_lr below 1.999"),
    ],
)  # fmt: skip
def test_what_a_landing_does_not_bear_is_refused_with_what_it_does(
    changes: dict[str, Any], what: str, late: str, times: float, remedy: str
) -> None:
    lands = "rounds that are waited for" if late == "waited" else f'sync.landing = "{late}"'
    whose = " of 4 islands" if late == "eager" else ""
    said = f"{what} is not stable with {lands}{whose}: on a quadratic loss it grows {times} times a round; use {remedy}"
    with pytest.raises(ValueError, match=r"is not stable with") as caught:
        resolve("diloco", changes, 4)
    assert str(caught.value) == said


def test_what_is_said_to_be_stable_is_allowed() -> None:
    for landing, lr, momentum in product(("pure", "eager"), (0.25,), (0.9, 0.6, 0.0)):
        resolve("diloco", {"landing": landing, "delay": "round", "outer_lr": lr, "outer_momentum": momentum}, 64)

"""For which gamma does mixing bring islands together? I + gamma (W - I) has the eigenvalues 1 - gamma (1 - lambda).

So mixing is stable for 0 < gamma < 2 / (1 - lambda_n), lambda_n the least eigenvalue of W. No lambda_n is below -1: gamma <= 1 is
what is stable for every W, and what a recipe may have. A round lands before the next of its bucket starts, so no delay makes this
range smaller, nor do public copies: CHOCO's are x itself wherever nothing is lost. Training in flight does, and how is below."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from dtrain.recipes import RECIPES, resolve
from dtrain.topology import STATIC
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_gossip import CUT, WIDTH, Matrix, U, largest
from tests.oracle.test_topology import ASYMMETRIC, SYMMETRIC, chebyshev_matrix, w_of

STILL = [case for case in SYMMETRIC if case[0] in STATIC and 1 < case[2] <= 16]
GAMMAS = np.linspace(0.23, 2.31, 9)
"""None of them within 1e-3 of a bound below, where a radius of 1 would be rounding's to decide."""


def choco_step(state: Matrix, w: Matrix, gamma: float, *, late: bool) -> Matrix:
    """(x, xhat, s, heard), each a column, of CHOCO's textbook lines with the identity codec, by themselves: no optimizer."""
    x, xhat, s, heard = state.reshape(4, len(w))
    own = np.diag(np.diag(w))
    if late:
        s = s + heard
        x = x + gamma * (s - xhat)
    q = x - xhat
    xhat, s, heard = xhat + q, s + own @ q, (w - own) @ q
    if not late:
        s, heard = s + heard, np.zeros_like(heard)
        x = x + gamma * (s - xhat)
    return np.concatenate((x, xhat, s, heard))


def choco_radius(w: Matrix, gamma: float, *, late: bool) -> float:
    """Of its matrix, on the states where s is W xhat once ``heard`` is taken in, as it begins; a step keeps that."""
    n = len(w)
    apart = np.linalg.svd(np.full((1, n), 1.0))[2][1:]
    """An orthonormal basis of the islands' disagreements."""
    own, zero = np.diag(np.diag(w)), np.zeros(n)
    if late:  # behind a send: xhat = x, s and heard add up to W x
        starts = [np.concatenate((d, d, own @ d, (w - own) @ d)) for d in apart]
        starts += [np.concatenate((zero, zero, e, -e)) for e in np.eye(n)]
    else:
        starts = [np.concatenate((d, d, w @ d, zero)) for d in apart]
        starts += [np.concatenate((d, zero, zero, zero)) for d in apart]
    ends = [choco_step(start, w, gamma, late=late) for start in starts]
    step = np.linalg.lstsq(np.array(starts).T, np.array(ends).T, rcond=None)[0]
    assert largest(np.array(starts).T @ step - np.array(ends).T) < 1e-9
    return float(np.abs(np.linalg.eigvals(step)).max())


@pytest.mark.parametrize(("name", "graph", "n"), STILL)
def test_it_is_stable_below_two_over_one_less_the_least_eigenvalue(name: str, graph: str | None, n: int) -> None:
    w = w_of(name, graph, 0, n)
    bound = 2 / (1 - np.linalg.eigvalsh(w)[0])
    assert bound > 1 + 1e-9, "every gamma that a recipe may have"
    for gamma in (*GAMMAS[np.abs(GAMMAS - bound) > 1e-3], 1.0):
        apart = np.eye(n) - 1 / n
        radius = np.abs(np.linalg.eigvals(((1 - gamma) * np.eye(n) + gamma * w) @ apart)).max()
        assert (radius < 1) == (gamma < bound)
        for late in (False, True):
            assert (choco_radius(w, gamma, late=late) < 1) == (gamma < bound)


@pytest.mark.parametrize(("name", "graph", "n"), [c for c in (*SYMMETRIC, *ASYMMETRIC) if c[0] not in (*STATIC, "directed")])
def test_no_round_of_a_changing_topology_drives_islands_apart(name: str, graph: str | None, n: int) -> None:
    """A product of rounds has no radius of its own to go by; none of its factors is larger than 1 in the 2-norm."""
    for index in range(12):
        for gamma in (0.1, 0.5, 1.0):
            m = np.eye(n) + gamma * (w_of(name, graph, index, n) - np.eye(n))
            assert np.linalg.norm(m @ (np.eye(n) - 1 / n), 2) <= 1 + 1e-12


@pytest.mark.parametrize("gamma", [0.0, -0.5, 1.0001, float("nan")])
def test_what_some_topology_would_not_bear_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"use more than 0 and at most 1: .* for whatever W") as caught:
        resolve("choco", {"gamma": gamma}, 4)
    assert "\n" not in str(caught.value)


# ---- training in flight


def disagreements(direction: Matrix, curvature: float, rounds: int, axes: dict[str, Any]) -> list[NDArray[np.float64]]:
    """The largest |x - mean| where each round starts, of islands that all have the loss curvature / 2 |x|^2 and SGD's lr = 1, and
    begin along ``direction``. A round lands where the next one starts, unless ``axes`` say a delay."""

    def island(connection: Connection) -> list[NDArray[np.float32]]:
        model = Quadratic(torch.zeros(WIDTH), torch.full((WIDTH,), curvature), torch.zeros(WIDTH), CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        seen = []
        with dtrain.join(model, optimizer, codec="identity", link=connection, **{"delay": "round", **axes}):
            model.set_flat(torch.full((WIDTH,), float(direction[connection.node])))
            for step in range(1, rounds * axes["every"] + 1):
                sgd_step(model, optimizer)
                if step % axes["every"] == 0:
                    seen.append(model.flat().numpy().copy())
        return seen

    each = np.array(run_islands(len(direction), island), dtype=np.float64)
    return list(np.abs(each - each.mean(axis=0)).max(axis=(0, 2)))


def period_factor(r: float, every: int, delay: int, moved: float) -> float:
    """Of disagreement over a period, in a direction of which training leaves r a step and mixing takes ``moved`` of it."""
    return r ** (every - delay) * (r**delay - moved)


CASES: list[tuple[int, float, dict[str, Any]]] = [
    (4, 0.9, {"recipe": "dpsgd", "topology": "ring", "every": 3}),
    (4, 0.3, {"recipe": "dpsgd", "topology": "ring", "every": 2}),
    (4, 0.75, {"recipe": "deepsqueeze", "gamma": 0.75, "topology": "ring", "every": 1}),
    (5, 0.5, {"recipe": "choco", "gamma": 1.0, "topology": "ring", "every": 2}),
    (16, 0.5, {"recipe": "chebyshev", "topology": "ring", "every": 4}),
    (16, 0.5, {"recipe": "chebyshev", "topology": "ring", "every": 4, "delay": RECIPES["chebyshev"].delay}),
]


@pytest.mark.parametrize(("n", "curvature", "axes"), CASES)
def test_training_in_flight_takes_from_the_range(n: int, curvature: float, axes: dict[str, Any]) -> None:
    """Between a round's start and its landing disagreement shrinks to r^d by itself, r = 1 - lr a, and the mixing of what was
    sent comes on top: r^d - gamma (1 - lambda). Where a round flies for the whole of its period that is a round's factor: it is
    stable for gamma (1 - lambda_n) < 1 + r^d. For d = 1 that is the bound lr a < 1 + lambda_n of decentralized gradient descent
    (Yuan, Ling and Yin 2016), and mixing of which no eigenvalue is negative is stable whatever is done in flight. What is left of
    a period of H steps after the landing is r^(H - d) of that."""
    w = w_of("ring", None, 0, n)
    values, vectors = np.linalg.eigh(chebyshev_matrix(w, 4) if axes["recipe"] == "chebyshev" else w)
    moved = axes.get("gamma", 1.0) * (1 - values[0])
    factor = period_factor(1 - curvature, axes["every"], axes.get("delay", axes["every"]), moved)
    seen = disagreements(vectors[:, 0], curvature, 6, axes)
    ratios = np.array(seen[1:]) / np.array(seen[:-1])
    assert (ratios < 1).all() == (abs(factor) < 1)
    # Relative to x, which is all disagreement here, a step rounds 8 u and a mix 4 u a term: of 4 steps and 4 mixes of 3 terms, by
    # Chebyshev's weights below 2 and 1 / (1 - c) below 2, at most (32 + 4 * 48) u = 1.4e-5; of two ends of a round, twice.
    assert np.abs(ratios - abs(factor)).max() <= 2 * (32 + 4 * 48) * U


GROWS_IF_LATER = {"chebyshev": 8, "dfedsam": 4}
"""Rows that would not bear some learning rate if they flew for all of their period, and from how many islands on."""


@pytest.mark.parametrize("n", [3, 4, 8, 16, 64])
@pytest.mark.parametrize("name", [r.name for r in RECIPES.values() if r.every > 1 and r.reduce == "neighbours"])
def test_a_row_of_several_steps_bears_every_learning_rate_that_training_does(name: str, n: int) -> None:
    row = RECIPES[name]
    w = w_of(row.topology, row.graph, 0, n)
    mixed = chebyshev_matrix(w, row.gossip_steps) if row.algorithm == "chebyshev" else np.linalg.matrix_power(w, row.gossip_steps)
    moved = 1 - np.linalg.eigvalsh(mixed)
    curved = np.linspace(-0.999, 0.999, 1000)  # without 0, where a round of exact averages in flight is on the edge
    assert max(abs(period_factor(r, row.every, row.delay_steps, m)) for r in curved for m in moved if m > 1e-9) < 1
    if name in GROWS_IF_LATER and n >= GROWS_IF_LATER[name]:
        assert abs(period_factor(0.5, row.every, row.every, moved.max())) > 1

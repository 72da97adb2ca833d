"""Do gradient tracking and BEER follow their matrix recursions, and find the common optimum of islands with different data?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, Matrix, U, largest, problem
from tests.oracle.test_topology import w_of

ISLANDS, STEPS, LR = 4, 10, 0.05
LONG, LONG_LR = 160, 0.125


def trajectory(axes: dict[str, Any], steps: int, lr: float = LR) -> Matrix:
    """(steps + 1, n, width)."""
    p = problem(ISLANDS)

    def island(connection: Connection) -> list[NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        seen = []
        with dtrain.join(model, optimizer, **axes, bucket_bytes=BUCKET_BYTES, link=connection):
            for _ in range(steps):
                sgd_step(model, optimizer)
                seen.append(model.flat().numpy().copy())
        return [*seen, model.flat().numpy().copy()]

    return np.array(run_islands(ISLANDS, island), dtype=np.float64).swapaxes(0, 1)


def recursion(topology: str, delay: int, gamma: float, steps: int) -> tuple[Matrix, float]:
    """v <- M_t v + G(x) - G(x_before), then as D-PSGD with v for the gradient; M = I + gamma (W - I). And the largest v."""
    p = problem(ISLANDS)
    X = np.tile(p.start.astype(np.float64), (ISLANDS, 1))
    V, before = np.zeros_like(X), np.zeros_like(X)
    eye, most = np.eye(ISLANDS), 0.0

    def m(t: int) -> Matrix:
        return eye + gamma * (w_of(topology, None, t, ISLANDS) - eye)

    out = []
    for t in range(steps):
        gradient = p.gradient(X)
        V = m(t) @ V + gradient - before
        before, most = gradient, max(most, largest(V))
        X = m(t) @ (X - LR * V) if delay == 0 else (m(t - 1) @ X if t else X) - LR * V
        out.append(X)
    return np.array([*out, m(steps - 1) @ X if delay else X]), most


CASES = [
    *(("gradient_tracking", topology, delay, 1.0) for topology in ("ring", "one_peer_ring", "star") for delay in (0, 1)),
    ("beer", "ring", 1, 0.75),
    ("beer", "star", 1, 0.5),
]


@pytest.mark.parametrize(("recipe", "topology", "delay", "gamma"), CASES)
def test_it_follows_its_recursion(recipe: str, topology: str, delay: int, gamma: float) -> None:
    """BEER without loss: H = x and G = v after each exchange, so both mix with I + gamma (W - I)."""
    axes: dict[str, Any] = {"recipe": recipe, "topology": topology, "delay": delay, "codec": "identity"}
    if recipe == "beer":
        axes["gamma"] = gamma
    want, most = recursion(topology, delay, gamma, STEPS)
    got = trajectory(axes, STEPS)
    # A gradient rounds as D-PSGD's (8 u 2M, as a <= 2), v takes in two of them and a mix of n terms, x a mix and lr v: below
    # (16 + 8 n) u times the largest of v and 2M a step. Kept sums (BEER) carry what all steps before rounded.
    M = max(most, 2 * largest(want), 2 * largest(problem(ISLANDS).c.astype(np.float64)))
    bound = (16 + 8 * ISLANDS) * U * M * (STEPS + 1) * (STEPS if recipe == "beer" else 1)
    assert largest(got - want) <= bound
    assert largest(got - recursion("complete", delay, 1.0, STEPS)[0]) > 10 * bound, "another W would be seen"


@pytest.fixture(scope="module")
def plain() -> Matrix:
    """D-PSGD after as many steps with as large a learning rate: it stays apart from the optimum by O(lr)."""
    return trajectory({"recipe": "dpsgd", "topology": "ring", "delay": 1}, LONG, LONG_LR)[-1]


@pytest.mark.parametrize(("recipe", "codec"), [("gradient_tracking", "identity"), ("beer", "int4:64")])
def test_islands_with_different_data_agree_on_the_optimum(plain: Matrix, recipe: str, codec: str) -> None:
    """x* = sum a_i c_i / sum a_i on every island. The slowest direction shrinks by 1 - lr a, a >= 1/4 at least, a step: e^-5."""
    p = problem(ISLANDS)
    a, c = p.a.astype(np.float64), p.c.astype(np.float64)
    optimum = (a * c).sum(axis=0) / a.sum(axis=0)
    tracked = trajectory({"recipe": recipe, "topology": "ring", "delay": 1, "codec": codec}, LONG, LONG_LR)[-1]
    assert largest(tracked - optimum) < 0.1 * largest(plain - optimum)


@pytest.mark.parametrize(("recipe", "codec"), [("gradient_tracking", "int4:64"), ("beer", "int4:64"), ("beer", "e3m0:64")])
def test_the_mean_of_the_estimates_is_the_mean_gradient_whatever_the_codec_loses(recipe: str, codec: str) -> None:
    p = problem(ISLANDS)

    def island(connection: Connection) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe=recipe, topology="ring", codec=codec, link=connection) as sync:
            for _ in range(STEPS):
                sgd_step(model, optimizer)
            v, g = (torch.cat([lane.state[name] for lane in sync.core.lanes]).numpy().copy() for name in ("v", "g_before"))
        return v, g

    v, g = (np.array(each, dtype=np.float64) for each in zip(*run_islands(ISLANDS, island), strict=True))
    # As x's mean in test_gossip: 20 u M a step and island, and kept sums carry theirs.
    M = max(largest(v), largest(g))
    assert largest(v.mean(axis=0) - g.mean(axis=0)) <= 20 * STEPS * (STEPS + 1) / 2 * U * M
    assert largest(v - g) > 1e-2, "each estimate is another than the own gradient"

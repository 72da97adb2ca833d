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


def recursion(topology: str, delay: int, gamma: float, steps: int) -> Matrix:
    """v <- M_t v + G(x) - G(x_before), then as D-PSGD with v in place of the gradient; M = I + gamma (W - I)."""
    p = problem(ISLANDS)
    X = np.tile(p.start.astype(np.float64), (ISLANDS, 1))
    V, before = np.zeros_like(X), np.zeros_like(X)
    eye = np.eye(ISLANDS)

    def m(t: int) -> Matrix:
        return eye + gamma * (w_of(topology, None, t, ISLANDS) - eye)

    out = []
    for t in range(steps):
        gradient = p.gradient(X)
        V = m(t) @ V + gradient - before
        before = gradient
        X = m(t) @ (X - LR * V) if delay == 0 else (m(t - 1) @ X if t else X) - LR * V
        out.append(X)
    return np.array([*out, m(steps - 1) @ X if delay else X])


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
    want = recursion(topology, delay, gamma, STEPS)
    got = trajectory(axes, STEPS)
    p = problem(ISLANDS)
    # |v| <= 2 * 2M (a <= 2) and more by a factor of the steps at most, as differences of gradients add up: 4 T M. A step rounds
    # 8 + 8 n times a value up to that, in v and, times lr, in x; kept sums (BEER) carry what all steps before rounded.
    M = 4 * STEPS * max(largest(want), largest(p.c.astype(np.float64)))
    bound = (8 + 8 * ISLANDS) * U * M * STEPS * (STEPS if recipe == "beer" else 1)
    assert largest(got - want) <= bound
    plain = np.abs(got[-1] - recursion("complete", 0, 1.0, STEPS)[-1])
    assert plain.max() > 10 * bound, "another W would be seen"


@pytest.mark.parametrize(("recipe", "codec"), [("gradient_tracking", "identity"), ("beer", "int8:64"), ("beer", "int4:64")])
def test_islands_with_different_data_agree_on_the_optimum(recipe: str, codec: str) -> None:
    """D-PSGD with a constant learning rate stays apart by O(lr); tracking goes to x* = sum a_i c_i / sum a_i on every island."""
    p = problem(ISLANDS)
    a, c = p.a.astype(np.float64), p.c.astype(np.float64)
    optimum = (a * c).sum(axis=0) / a.sum(axis=0)
    steps = 400
    plain = trajectory({"recipe": "dpsgd", "topology": "ring", "delay": 1}, steps)[-1]
    tracked = trajectory({"recipe": recipe, "topology": "ring", "delay": 1, "codec": codec}, steps)[-1]
    assert largest(tracked - optimum) < 0.02 * largest(plain - optimum)

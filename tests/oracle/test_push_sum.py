"""Does push-sum follow its recursion on numerators and weights, and do its ratios agree on the mean?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, LR, STEPS, WIDTH, Matrix, U, largest, problem

ARCS = {3: "0 1\n0 2\n1 2\n2 0\n", 5: "0 1\n1 2\n2 3\n3 4\n4 0\n0 2\n0 3\n3 1\n"}


def columns(n: int) -> Matrix:
    """P_ij = 1 / (1 + outdeg_j) where j sends to i, and on the diagonal."""
    P = np.eye(n)
    for line in ARCS[n].splitlines():
        j, i = map(int, line.split())
        P[i, j] = 1.0
    return P / P.sum(axis=0)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("n", [3, 5])
def test_it_follows_numerators_and_weights(tmp_path_factory: pytest.TempPathFactory, n: int, delay: int) -> None:
    """The paper's order, delay 0: x <- P (x - lr G(x / w)). Delay 1: x <- P x - lr G(x / w), with the gradient at the z that is
    mixing meanwhile."""
    file = tmp_path_factory.mktemp("arcs") / "arcs.txt"
    file.write_text(ARCS[n])
    p, P = problem(n), columns(n)

    def island(connection: Connection) -> list[NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(
            model, optimizer, recipe="push_sum", graph=str(file), delay=delay, bucket_bytes=BUCKET_BYTES, link=connection
        ) as sync:
            for _ in range(STEPS):
                sgd_step(model, optimizer)
                seen.append(model.flat().numpy().copy())
            assert len(sync.core.lanes) == 2
        return [*seen, model.flat().numpy().copy()]

    got = np.array(run_islands(n, island), dtype=np.float64).swapaxes(0, 1)
    x, w = np.tile(p.start.astype(np.float64), (n, 1)), np.ones((n, 1))
    want = []
    for t in range(STEPS):
        update = LR * p.gradient(x / w)
        if delay and t:
            x, w = P @ x, P @ w
        x = x - update
        if not delay:
            x, w = P @ x, P @ w
        want.append(x / w)
    if delay:
        x, w = P @ x, P @ w
    want.append(x / w)
    M = max(largest(np.array(want)), largest(p.c.astype(np.float64)))
    # As D-PSGD's bound, with n terms a mix, and the division of progress by w >= w_min, which magnifies what was rounded.
    magnified = 1 / w_smallest(P)
    assert largest(got - np.array(want)) <= 20 * n * magnified * (STEPS + 1) * U * M


def w_smallest(P: Matrix) -> float:
    w, smallest = np.ones(len(P)), 1.0
    for _ in range(STEPS):
        w = P @ w
        smallest = min(smallest, w.min())
    return smallest


@pytest.mark.parametrize("codec", ["identity", "int8:64"])
def test_islands_agree_on_the_plain_mean(tmp_path_factory: pytest.TempPathFactory, codec: str) -> None:
    """With a learning rate of 0 the ratios all go to the mean of what they began with, not to the mean that P itself favours."""
    n, rounds = 5, 60
    file = tmp_path_factory.mktemp("arcs") / "arcs.txt"
    file.write_text(ARCS[n])
    apart = np.random.default_rng(1).uniform(-1, 1, (n, WIDTH)).astype(np.float32)
    p, P = problem(n), columns(n)

    def island(connection: Connection) -> NDArray[np.float32]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with dtrain.join(model, optimizer, recipe="push_sum", graph=str(file), codec=codec, delay=0, link=connection) as sync:
            model.set_flat(torch.from_numpy(apart[connection.node]))
            for lane in sync.core.lanes:
                lane.state["base"].copy_(lane.bucket.x)
            for _ in range(rounds):
                sgd_step(model, optimizer)
            return model.flat().numpy().copy()

    mixed = np.array(run_islands(n, island), dtype=np.float64)
    # A code is off by half a step of 1/127 of the largest value, 1 at most, and bf16's rounding of the scale: lost <= 1.02 / 254.
    # It moves sum w z by |w' - w| of it, so the mean by the sum over all rounds. fp32 adds 2^-24 for each of n + 3 roundings.
    lost = 0.0 if codec == "identity" else 1.02 / 254
    w, wander = np.ones(n), 0.0
    for _ in range(rounds):
        wander += np.abs(P @ w - w).sum() / n * lost
        w = P @ w
    rounding = rounds * (n + 3) * U / w.min()
    agreed = (w @ mixed) / n
    assert largest(agreed - apart.astype(np.float64).mean(axis=0)) <= wander + rounding
    # Two islands that hear each other's codes stop moving once those are equal: what is left are codes' steps, one an arc.
    assert largest(mixed - agreed) <= n * 2 * lost + rounding
    favoured = np.linalg.matrix_power(P, 200) @ np.ones(n) / n
    assert np.abs(favoured - 1 / n).max() > 0.05, "on this graph plain gossip would be wrong"


def test_a_merge_in_mid_run_leaves_no_weight_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    """After it all islands are equal, and a round between equal islands leaves them so, whatever the weights were before."""
    n = 5
    file = tmp_path_factory.mktemp("arcs") / "arcs.txt"
    file.write_text(ARCS[n])
    p = problem(n)

    def island(connection: Connection) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="push_sum", graph=str(file), delay=1, link=connection) as sync:
            for _ in range(5):
                sgd_step(model, optimizer)
            sync.merge()
            merged = model.flat().numpy().copy()
            optimizer.param_groups[0]["lr"] = 0.0
            for _ in range(3):
                sgd_step(model, optimizer)
        return merged, model.flat().numpy().copy()

    merged, after = (np.array(each, dtype=np.float64) for each in zip(*run_islands(n, island), strict=True))
    assert np.ptp(merged, axis=0).max() == 0.0
    assert largest(after - merged) <= 3 * (n + 3) * U * largest(merged)

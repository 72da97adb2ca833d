"""What is left of a gossip method's state where an exact average takes the parameters' place? Nothing that parts islands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import LR, WIDTH, U, largest, problem
from tests.oracle.test_push_sum import ARCS, columns

N = 4


@pytest.mark.parametrize(
    "axes",
    [
        {"recipe": "choco", "gamma": 0.09, "codec": "topk:4/64:8"},
        {"recipe": "beer", "gamma": 0.09, "codec": "topk:4/64:8"},
        {"recipe": "deepsqueeze", "gamma": 0.09, "codec": "topk:4/64:8"},
        {"recipe": "dpsgd", "codec": "topk:4/64:8"},
        {"recipe": "gradient_tracking", "codec": "int4:64"},
        {"recipe": "multi_gossip", "codec": "int4:64", "every": 1, "delay": 1},
    ],
    ids=lambda axes: axes["recipe"],
)
def test_equal_islands_stay_equal(axes: dict[str, Any]) -> None:
    """Top-k lags: behind 5 steps, copies and residuals hold what most elements were at the start. After a merge, and with a
    learning rate of 0, every island sends the same and lands on what it has, up to the rounding of a mix."""
    p = problem(N)

    def island(connection: Connection) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, link=connection, **axes) as sync:
            for _ in range(5):
                sgd_step(model, optimizer)
            assert sync.merge() > 1e-3
            merged = model.flat().numpy().copy()
            optimizer.param_groups[0]["lr"] = 0.0
            for _ in range(6):
                sgd_step(model, optimizer)
        return merged, model.flat().numpy().copy()

    merged, after = (np.array(each, dtype=np.float64) for each in zip(*run_islands(N, island), strict=True))
    assert np.ptp(merged, axis=0).max() == 0.0
    # 4 (n + 3) u M a mix of at most n terms, of up to 4 gossip steps a round and 6 rounds.
    assert largest(after - merged) <= 6 * 4 * 4 * (N + 3) * U * largest(merged)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("delay", [0, 1])
def test_push_sum_merges_into_the_mean_that_it_keeps(tmp_path: Path, rounds: int, delay: int) -> None:
    """lr 0: sum_i w_i z_i / n is what the islands began with, whatever the weights have come to; and a look at the average puts
    everything back."""
    n, file = 5, tmp_path / "arcs.txt"
    file.write_text(ARCS[n])
    apart = np.random.default_rng(1).uniform(-1, 1, (n, WIDTH)).astype(np.float32)
    p = problem(n)

    def island(connection: Connection) -> tuple[Any, ...]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with dtrain.join(model, optimizer, recipe="push_sum", graph=str(file), delay=delay, link=connection) as sync:
            model.set_flat(torch.from_numpy(apart[connection.node]))
            for lane in sync.core.lanes:
                lane.state["base"].copy_(lane.bucket.x)
            for _ in range(rounds):
                sgd_step(model, optimizer)
            before = model.flat().numpy().copy()
            with sync.merged():
                seen = model.flat().numpy().copy()
            back = model.flat().numpy().copy()
            distance = sync.merge()
            return before, seen, back, model.flat().numpy().copy(), distance

    each_of = zip(*run_islands(n, island), strict=True)
    before, seen, back, merged, distances = (np.array(each, dtype=np.float64) for each in each_of)
    want = apart.astype(np.float64).mean(axis=0)
    w = np.linalg.matrix_power(columns(n), rounds) @ np.ones(n)
    assert np.abs(w - 1).max() > 0.1, "a plain mean of z would be off"
    # n + 3 roundings a round of values up to 1, none of which grows (rows of A sum to one); w and dividing by it twice.
    bound = (rounds + 1) * (n + 3) * U * 2 / w.min()
    assert largest(seen - want) <= bound
    assert largest(merged - want) <= bound
    assert (back == before).all()
    if delay == 0:  # else a round lands before the merge
        np.testing.assert_allclose(distances, np.square(before - want).sum(axis=1).mean() ** 0.5, rtol=1e-5)

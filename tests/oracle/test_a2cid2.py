"""Does A2CiD2 on islands follow the paper's x and x~, where it keeps only what lies between them?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, LR, STEPS, WIDTH, Matrix, U, largest, problem
from tests.oracle.test_topology import w_of

RING: dict[str, Any] = {"topology": "one_peer_ring"}
STAR: dict[str, Any] = {"topology": "random_edges", "graph": "star"}
"""Most islands sit out most rounds."""


def momentum(chances: Matrix, every: int) -> tuple[float, float]:
    """eta and alpha by the paper's chi1 and chi2, of how likely each pair is to meet in a round."""
    laplacian = (np.diag(chances.sum(axis=1)) - chances) / every
    inverse = np.linalg.pinv(laplacian)
    chi1 = 1 / np.linalg.eigvalsh(laplacian)[1]
    meet = chances > 0
    chi2 = ((np.diag(inverse)[:, None] + np.diag(inverse) - 2 * inverse)[meet]).max() / 2
    return 0.5 / np.sqrt(chi1 * chi2), 0.5 * np.sqrt(chi1 / chi2)


def chances(axes: dict[str, Any], n: int) -> Matrix:
    if axes is RING:  # each edge every second round; of n = 5 one sits out
        ring = np.roll(np.eye(n), 1, axis=0)
        return (ring + ring.T) * (1 / 2 if n % 2 == 0 else (n - 1) / 2 / n)
    out = np.zeros((n, n))
    out[0, 1:] = out[1:, 0] = 1 / (n - 1)  # 1 / (deg_0 + deg_i - 1)
    return out


def steps(axes: dict[str, Any], n: int, every: int, delay: int, *, with_momentum: bool = True) -> list[tuple[Matrix, Matrix]]:
    """What a step, and at last the drain, does to one coordinate of (x, x~, m) on all islands: maps (width, 3n, 3n) and what is
    added (3n, width). m is what flies."""
    p, eye, all_of = problem(n), np.eye(n), np.eye(3 * n)
    eta, alpha = momentum(chances(axes, n), every) if with_momentum else (0.0, 0.5)
    A = LR * p.a.astype(np.float64)
    optimizer = np.zeros((WIDTH, 3 * n, 3 * n))
    optimizer[:, :n, :n] = optimizer[:, n : 2 * n, :n] = np.einsum("ik,ij->kij", A, eye)
    towards = np.concatenate((A * p.c, A * p.c, 0 * A))
    landed = np.kron([[1, 0, 0.5], [0, 1, alpha], [0, 0, 0]], eye)

    def flow(elapsed: int) -> Matrix:
        e = np.exp(-2 * eta * elapsed)
        of_one = np.array([[(1 + e) / 2, (1 - e) / 2, 0], [(1 - e) / 2, (1 + e) / 2, 0], [0, 0, 1]])
        return np.asarray(np.kron(of_one, eye), dtype=np.float64)

    made, flowed, flying = [], 0, 0
    for t in range(1, STEPS + 2):
        before, after, done = all_of, all_of, t > STEPS
        if flying and (t == flying + delay or done):
            lands = flying + max(0, delay - 1)
            before, flowed, flying = landed @ flow(lands - flowed), lands, 0
        if not done and t % every == 0:
            sent = all_of.copy()
            sent[2 * n :, :n] = 2 * (w_of(axes["topology"], axes.get("graph"), t // every - 1, n) - eye)
            after = (landed if delay == 0 else all_of) @ sent @ flow(t - flowed)
            flowed, flying = t, t if delay else 0
        # The gradient is that of x before anything landed.
        made.append((after @ (before - (0 if done else optimizer)), after @ towards * (not done)))
    return [(np.broadcast_to(m, (WIDTH, 3 * n, 3 * n)), add) for m, add in made]


@pytest.mark.parametrize("delay", [0, 1, 2])
@pytest.mark.parametrize(("axes", "n", "every"), [(RING, 6, 2), (RING, 5, 3), (STAR, 4, 2)], ids=["ring", "odd ring", "star"])
def test_it_follows_x_and_x_tilde(axes: dict[str, Any], n: int, every: int, delay: int) -> None:
    p = problem(n)

    def island(connection: Connection) -> list[NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(
            *(model, optimizer), recipe="a2cid2", **axes, every=every, delay=delay, bucket_bytes=BUCKET_BYTES, link=connection
        ) as sync:
            for _ in range(STEPS):
                sgd_step(model, optimizer)
                seen.append(model.flat().numpy().copy())
            assert len(sync.core.lanes) == 2
        return [*seen, model.flat().numpy().copy()]

    got = np.array(run_islands(n, island), dtype=np.float64).swapaxes(0, 1)
    state = np.concatenate((np.tile(p.start, (2 * n, 1)), np.zeros((n, WIDTH)))).astype(np.float64)
    M, want, through, bound = largest(p.c.astype(np.float64)), [], list[Matrix](), 0.0
    for of_step, add in steps(axes, n, every, delay):
        state = np.einsum("kij,jk->ik", of_step, state) + add
        want.append(state[:n])
        M = max(M, largest(state))
        through = [*(of_step @ each for each in through), np.tile(np.eye(3 * n), (WIDTH, 1, 1))]
        bound = max(bound, sum(np.abs(each).sum(axis=2).max() for each in through))
    # A step rounds x by 4 u M in the optimizer, by 3 in each of two flows and 3 in the mix, and x~ - x, up to 2 M, by as many: 26
    # u M in x~, which the maps of later steps carry on; the largest sums of their rows are counted.
    allowed = 26 * U * M * bound
    assert largest(got - np.array(want)) <= allowed
    state, plain = np.concatenate((np.tile(p.start, (2 * n, 1)), np.zeros((n, WIDTH)))).astype(np.float64), list[Matrix]()
    for of_step, add in steps(axes, n, every, delay, with_momentum=False):
        state = np.einsum("kij,jk->ik", of_step, state) + add
        plain.append(state[:n])
    assert largest(np.array(want) - np.array(plain)) > 30 * allowed, "momentum matters"


def test_a_merge_in_mid_run_leaves_no_momentum_behind() -> None:
    """After it all islands are equal, and stay so with a learning rate of 0, whatever lay between x and x~ before."""
    n = 4
    p = problem(n)

    def island(connection: Connection) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="a2cid2", link=connection) as sync:
            for _ in range(6):
                sgd_step(model, optimizer)
            ahead = max(float(lane.state["ahead"].abs().max()) for lane in sync.core.lanes)
            sync.merge()
            merged = model.flat().numpy().copy()
            optimizer.param_groups[0]["lr"] = 0.0
            for _ in range(3):
                sgd_step(model, optimizer)
        return merged, model.flat().numpy().copy(), ahead

    merged, after, ahead = zip(*run_islands(n, island), strict=True)
    assert min(ahead) > 1e-3
    assert np.ptp(merged, axis=0).max() == 0.0
    assert (np.array(after) == np.array(merged)).all()

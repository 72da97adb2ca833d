"""Do D-PSGD and CHOCO follow their matrix recursions, and do the mixing matrices keep the mean?

X holds one island a row. With U(G) = lr G, plain SGD on a quadratic, G(X) = A (X - C) is known in closed form.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from dtrain.topology import mixing
from dtrain.topology.consensus import matrix
from tests.islands import Quadratic, run_islands, sgd_step

Matrix = NDArray[np.float64]
Delay = Literal[0, 1]

U = 2.0**-24
"""Unit roundoff of fp32."""
CUT, WIDTH = 70, 153
"""Two parameters, neither a multiple of a codec's block."""
LR, STEPS = 0.125, 12
BUCKET_BYTES = 256
"""Small enough that each parameter is a bucket of its own."""


class Problem(NamedTuple):
    start: NDArray[np.float32]
    a: NDArray[np.float32]
    c: NDArray[np.float32]

    def gradient(self, X: Matrix) -> Matrix:
        return self.a.astype(np.float64) * (X - self.c.astype(np.float64))

    def model(self, node: int) -> Quadratic:
        return Quadratic(torch.from_numpy(self.start), torch.from_numpy(self.a[node]), torch.from_numpy(self.c[node]), CUT)


def problem(n: int) -> Problem:
    """lr a <= 1/4 is below each W's diagonal (1/3 or 1/2), so W - lr A is a non-expansion in the largest absolute value."""
    rng = np.random.default_rng(n)
    start, a, c = rng.uniform(-1, 1, WIDTH), rng.uniform(0.25, 2, (n, WIDTH)), rng.uniform(-1, 1, (n, WIDTH))
    return Problem(start.astype(np.float32), a.astype(np.float32), c.astype(np.float32))


def ring_matrix(n: int, index: int) -> Matrix:
    if n == 2:
        return np.full((2, 2), 0.5)
    eye = np.eye(n)
    return (eye + np.roll(eye, 1, axis=0) + np.roll(eye, -1, axis=0)) / 3


def one_peer_matrix(n: int, index: int) -> Matrix:
    period = int(np.ceil(np.log2(n)))
    return (np.eye(n) + np.roll(np.eye(n), 2 ** (index % period), axis=0)) / 2


def pair_ring_matrix(n: int, index: int) -> Matrix:
    W = np.eye(n)
    for k in range(index % 2 if n % 2 == 0 else index % n + 1, index % 2 + n - 1 if n % 2 == 0 else index % n + n - 1, 2):
        a, b = k % n, (k + 1) % n
        W[[a, a, b, b], [a, b, a, b]] = 0.5
    return W


def star_matrix(n: int, index: int) -> Matrix:
    W = np.eye(n) * (1 - 1 / n)
    W[0, :] = W[:, 0] = 1 / n
    return W


def complete_matrix(n: int, index: int) -> Matrix:
    return np.full((n, n), 1 / n)


MATRICES = {
    "one_peer_ring": pair_ring_matrix,
    "star": star_matrix,
    "ring": ring_matrix,
    "one_peer_exponential": one_peer_matrix,
    "complete": complete_matrix,
}


def recursion(p: Problem, n: int, topology: str, delay: Delay, gamma: float = 1.0) -> list[Matrix]:
    """X after each step, and after the drain.  delay 0: X <- W_t (X - lr G(X));  delay 1: X <- W_{t-1} X - lr G(X)."""

    def mixing(index: int) -> Matrix:
        return np.eye(n) + gamma * (MATRICES[topology](n, index) - np.eye(n))

    X = np.tile(p.start.astype(np.float64), (n, 1))
    out = []
    for t in range(STEPS):
        if delay == 0:
            X = mixing(t) @ (X - LR * p.gradient(X))
        else:
            X = (mixing(t - 1) @ X if t > 0 else X) - LR * p.gradient(X)
        out.append(X)
    return [*out, mixing(STEPS - 1) @ X if delay else X]


def trajectory(
    p: Problem, n: int, recipe: str, topology: str, delay: Delay, gamma: float | None = None, reduce: str | None = None
) -> Matrix:
    """(steps + 1, n, width): what the islands of dtrain hold after each step, and after the drain."""

    def island(connection: Connection) -> list[NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(
            model,
            optimizer,
            recipe=recipe,
            topology=topology,
            delay=delay,
            codec="identity",
            gamma=gamma,
            reduce=reduce,
            bucket_bytes=BUCKET_BYTES,
            link=connection,
        ) as sync:
            assert len(sync.buckets) == 2
            for _ in range(STEPS):
                sgd_step(model, optimizer)
                seen.append(model.flat().numpy().copy())
        return [*seen, model.flat().numpy().copy()]

    return np.array(run_islands(n, island), dtype=np.float64).swapaxes(0, 1)


def largest(values: Matrix) -> float:
    return float(np.abs(values).max())


GRAPHS = [
    *(("ring", n) for n in (2, 3, 4, 5)),
    *(("one_peer_exponential", n) for n in (2, 4, 5, 8)),
    *(("one_peer_ring", n) for n in (4, 5)),
    ("star", 4),
]


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(("topology", "n"), GRAPHS)
def test_dpsgd_follows_the_matrix_recursion(topology: str, n: int, delay: Delay) -> None:
    p = problem(n)
    want = np.array(recursion(p, n, topology, delay))
    got = trajectory(p, n, "dpsgd", topology, delay)
    # M bounds all |x| and |c|. The update rounds x - c, times a, times lr, and the difference, each at most u 2M: 8 u M. The mix
    # adds at most 3 terms, each with a rounded weight, product and sum, intermediate sums at most 2M: 3 (1 + 1 + 2) u M. Errors
    # made earlier do not grow (non-expansion), so T steps and the drain are within 20 (T + 1) u M.
    M = max(largest(want), largest(p.c.astype(np.float64)))
    assert largest(got - want) <= 20 * (STEPS + 1) * U * M


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("reduce", ["gather", "all_to_all"])
def test_the_mean_of_all_by_either_path_follows_it_too(reduce: str, delay: Delay) -> None:
    """Sent whole to everyone, or in parts to their owners: W is 1/n everywhere."""
    p, n = problem(3), 3
    want = np.array(recursion(p, n, "complete", delay))
    got = trajectory(p, n, "dpsgd", "complete", delay, reduce=reduce)
    M = max(largest(want), largest(p.c.astype(np.float64)))
    assert largest(got - want) <= 20 * (STEPS + 1) * U * M


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("gamma", [1.0, 0.75])
def test_choco_without_loss_is_gossip_with_a_lazier_matrix(gamma: float, delay: Delay) -> None:
    """With q = x - xhat, xhat becomes x and s becomes W x: x + gamma (s - xhat) = (I + gamma (W - I)) x."""
    p, n = problem(4), 4
    want = np.array(recursion(p, n, "ring", delay, gamma))
    got = trajectory(p, n, "choco", "ring", delay, gamma=gamma)
    # As above, but s also keeps what it rounded in all rounds before: step t adds 20 (1 + t) u M.
    M = max(largest(want), largest(p.c.astype(np.float64)))
    assert largest(got - want) <= 20 * (STEPS + 1) * (STEPS + 2) / 2 * U * M


class Blocks(NamedTuple):
    """The specification in numpy: a bf16 scale a block, codes against the rounded scale, blocks within a parameter."""

    bits: int
    block: int

    def decoded(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        q_max = np.float32(2 ** (self.bits - 1) - 1)
        out = np.zeros_like(x)
        for begin, end in ((0, CUT), (CUT, WIDTH)):
            for k in range(begin, end, self.block):
                part = x[k : min(k + self.block, end)]
                scale = to_bf16(np.abs(part).max() / q_max)
                if scale > 0:
                    codes = np.clip(np.rint(part * (np.float32(1) / scale)), -q_max, q_max)
                    out[k : k + len(part)] = codes * scale
        return out


def to_bf16(x: np.float32) -> np.float32:
    """Round to nearest, ties to even, on the upper 16 bits."""
    bits = int(np.float32(x).view(np.uint32))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return np.uint32(rounded).view(np.float32)


class Whole(NamedTuple):
    """The identity codec."""

    def decoded(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x


class ChocoStep(NamedTuple):
    """One island after a step: x behind the inner update, and x, xhat, s behind the whole step (bytes here, not landed: s is
    without them)."""

    updated: NDArray[np.float32]
    x: NDArray[np.float32]
    xhat: NDArray[np.float32]
    s: NDArray[np.float32]


def choco_steps(p: Problem, n: int, codec: str, delay: Delay, gamma: float) -> list[list[ChocoStep]]:
    def island(connection: Connection) -> list[ChocoStep]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        updated: list[NDArray[np.float32]] = []
        # Registered before join's, so it runs first: behind the update and before the round.
        optimizer.register_step_post_hook(lambda *_: updated.append(model.flat().numpy().copy()))
        out = []
        with dtrain.join(
            model, optimizer, recipe="choco", codec=codec, gamma=gamma, delay=delay, bucket_bytes=BUCKET_BYTES, link=connection
        ) as sync:
            for _ in range(STEPS):
                sgd_step(model, optimizer)
                sync.settle()
                xhat, s = (torch.cat([lane.state[k] for lane in sync.core.lanes]).numpy().copy() for k in ("xhat", "s"))
                out.append(ChocoStep(updated[-1], model.flat().numpy().copy(), xhat, s))
        return out

    return run_islands(n, island)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize(("name", "codec"), [("identity", Whole()), ("int8:64", Blocks(8, 64)), ("int4:32", Blocks(4, 32))])
def test_choco_follows_its_recursion_step_by_step(name: str, codec: Blocks | Whole, delay: Delay) -> None:
    """Each step is checked from the islands' own state before it.

    A quantizer is not continuous: run freely, one last bit of difference may flip a code. From the same state both
    sides see the same fp32 difference x - xhat, so the codes are equal and what is left to differ is rounding.
    """
    n, gamma = 4, 0.75
    p, W = problem(n), ring_matrix(n, 0)
    islands = choco_steps(p, n, name, delay, gamma)
    start = np.tile(p.start, (n, 1))
    before = ChocoStep(start, start, start, start)
    flying = np.zeros_like(W @ start)  # what the neighbours sent, which s takes in where the round lands
    for t in range(STEPS):
        now = ChocoStep(*(np.array(values) for values in zip(*(steps[t] for steps in islands), strict=True)))
        X, Xhat, S = (v.astype(np.float64) for v in (before.x, before.xhat, before.s))
        S = S + flying
        landed = X + gamma * (S - Xhat) if delay else X
        updated = landed - LR * p.gradient(X)
        q = np.array([codec.decoded(u - h) for u, h in zip(now.updated, before.xhat, strict=True)]).astype(np.float64)
        own, heard = np.diag(np.diag(W)) @ q, (W - np.diag(np.diag(W))) @ q
        xhat, s = Xhat + q, S + own + (0 if delay else heard)
        flying = heard if delay else np.zeros_like(heard)
        x = updated if delay else now.updated + gamma * (now.s.astype(np.float64) - now.xhat)
        M = max(largest(v) for v in (X, Xhat, S, xhat, s, p.c.astype(np.float64)))
        # At most 24 roundings of values up to M (see D-PSGD), none inherited.
        for want, got in ((updated, now.updated), (xhat, now.xhat), (s, now.s), (x, now.x)):
            assert largest(got - want) <= 24 * U * M
        assert largest(q) > 0
        before = now


@pytest.mark.parametrize("codec", ["identity", "bf16", "int8:64", "int4:64"])
@pytest.mark.parametrize(
    ("recipe", "topology"), [("dpsgd", "one_peer_exponential"), ("dpsgd", "random_pairs"), ("choco", "ring")]
)
def test_mixing_keeps_the_mean_and_brings_islands_closer(recipe: str, topology: str, codec: str) -> None:
    n = 5
    apart = np.random.default_rng(1).uniform(-1, 1, (n, WIDTH)).astype(np.float32)
    p = problem(n)

    def island(connection: Connection) -> NDArray[np.float32]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        gamma = 0.5 if recipe == "choco" else None
        with dtrain.join(model, optimizer, recipe=recipe, topology=topology, codec=codec, gamma=gamma, link=connection):
            model.set_flat(torch.from_numpy(apart[connection.node]))
            for _ in range(STEPS):
                sgd_step(model, optimizer)
        return model.flat().numpy()

    mixed = np.array(run_islands(n, island), dtype=np.float64)
    # What one island takes up another gives, whatever the codec lost: only rounding moves the mean, 20 u M a step and island at
    # most, and CHOCO's sums keep theirs (as above). M = 2: each x is a mean of values up to 1, and a lossy code adds less than 1.
    bound = 20 * STEPS * (STEPS + 1) / 2 * U * 2
    assert largest(mixed.mean(axis=0) - apart.astype(np.float64).mean(axis=0)) <= bound
    assert np.ptp(mixed, axis=0).mean() < 0.5 * np.ptp(apart, axis=0).mean()


def test_random_pairs_are_one_matching_for_all_nodes() -> None:
    for n in range(2, 10):
        matchings = set()
        for index in range(30):
            W = matrix(mixing("random_pairs", None, 5), index, n)
            np.testing.assert_array_equal(W, W.T)
            assert sorted(np.diag(W)) == [0.5] * (n - n % 2) + [1.0] * (n % 2)
            matchings.add(W.tobytes())
        assert n == 2 or len(matchings) > 2

    def drawn(seed: int, index: int) -> Matrix:
        return matrix(mixing("random_pairs", None, seed), index, 8)

    assert any((drawn(1, i) != drawn(2, i)).any() for i in range(3))

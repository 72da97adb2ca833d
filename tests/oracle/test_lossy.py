"""Is each gossip method its paper's with a codec that loses something? A numpy rendering of each, a step at a time.

A quantizer is not continuous: run freely, one last bit of difference may flip a code. So each step is checked from the islands'
own state before it: both sides then code the same fp32 values, the codes are equal, and what is left to differ is rounding.
CHOCO's rendering is in test_gossip; without loss, all methods are held to free-running recursions (tests/contract)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, LR, MATRICES, STEPS, Blocks, Matrix, Problem, U, largest, problem
from tests.oracle.test_push_sum import ARCS, columns

Each = NDArray[np.float32]
"""(n, width), one island a row."""
N, GAMMA, OUTER_LR, MU = 5, 0.75, 0.5, 0.5
INT8 = Blocks(8, 64)


class Step(NamedTuple):
    """All islands behind a step: x behind the inner update, x and State behind the whole step (bytes here, not landed)."""

    updated: Each
    x: Each
    state: dict[str, Each]


class Seen(NamedTuple):
    p: Problem
    w: Callable[[int], Matrix]
    """Round -> W. Round t starts after step t, counted from 0."""
    delay: int
    steps: list[Step]
    """[t] is before step t, [t + 1] behind it."""
    unsure: list[int]
    """Elements of a step that its rendering left out."""


Pairs = Iterator[tuple[NDArray[np.floating], Each]]
"""What the rendering says of step t, and what dtrain has."""
EYE = np.eye(N)


def coded(x: NDArray[np.floating]) -> Matrix:
    assert x.dtype == np.float32
    return np.array([INT8.decoded(row) for row in x]).astype(np.float64)


def fine(x: Each) -> Matrix:
    return x.astype(np.float64)


def mean_on_all(x: Matrix) -> Matrix:
    return np.tile(x.mean(axis=0), (N, 1))


def gossip(s: Seen, t: int) -> Pairs:
    """x <- x + (W - I) C(x)."""
    before, now, X = s.steps[t], s.steps[t + 1], fine(s.steps[t].x)
    landed = (s.w(t - 1) - EYE) @ coded(before.x) if s.delay and t else 0.0
    yield X + landed - LR * s.p.gradient(X), now.updated
    yield fine(now.updated) + (0.0 if s.delay else (s.w(t) - EYE) @ coded(now.updated)), now.x


def deepsqueeze(s: Seen, t: int) -> Pairs:
    """e <- e + x;  z = C(e);  e <- e - z;  x <- x + gamma (W - I) z."""
    before, now, X = s.steps[t], s.steps[t + 1], fine(s.steps[t].x)

    def with_residual(k: int) -> Each:
        return s.steps[k + 1].updated + s.steps[k].state["residual"]

    def mixed(k: int) -> Matrix:
        return GAMMA * (s.w(k) - EYE) @ coded(with_residual(k))

    yield X + (mixed(t - 1) if s.delay and t else 0.0) - LR * s.p.gradient(X), now.updated
    yield with_residual(t) - coded(with_residual(t)), now.state["residual"]
    yield fine(now.updated) + (0.0 if s.delay else mixed(t)), now.x
    assert t == 0 or largest(fine(before.state["residual"])) > 1e-4


def push_sum(s: Seen, t: int) -> Pairs:
    """z <- z + sum_j P_ij w_j / w'_i (C(z_j) - C(z_i));  w' = P w;  x = w z takes the step, so z moves by 1 / w of it."""
    before, now, X, P = s.steps[t], s.steps[t + 1], fine(s.steps[t].x), columns(N)
    w = np.linalg.matrix_power(P, max(0, t - 1)) @ np.ones(N)
    after = P @ w if t else w
    A = (P - np.diag(np.diag(P))) * w / after[:, None]
    landed = X + ((A - np.diag(A.sum(axis=1))) @ coded(before.x) if t else 0.0)
    yield landed - LR * s.p.gradient(X), now.updated
    yield landed + (now.updated - landed) / after[:, None], now.x


def twice(s: Seen, t: int, scale: float, weight: float) -> Pairs:
    """y_1 = P y_0;  y_2 = w P y_1 + (1 - w) y_0;  P y = y + scale (W - I) C(y);  x <- x + y_2 - x_sent."""
    now, X = s.steps[t + 1], fine(s.steps[t].x)
    start = fine(s.steps[t].state["y"]) if s.delay and t else X
    yield start - LR * s.p.gradient(X), now.updated
    W, y0 = s.w(t) - EYE, fine(now.updated)
    y1 = y0 + scale * W @ coded(now.updated)
    # y_1 is not observed, and its code, or its block's scale, may lie within what a mix rounds of a step: such elements are left
    # out: MOST_UNSURE.
    near = ROUNDINGS / 2 * U * largest(y1)
    low, high = (coded((y1 + d).astype(np.float32)) for d in (-near, near))
    sure = (np.abs(low - high) <= 4 * near).all(axis=0)
    s.unsure.append(int((~sure).sum()))
    y2 = weight * (y1 + scale * W @ coded(y1.astype(np.float32))) + (1 - weight) * y0
    yield np.where(sure, y2, fine(now.state["y"])), now.state["y"]
    yield fine(now.updated if s.delay else now.state["y"]), now.x


def multi_gossip(s: Seen, t: int) -> Pairs:
    return twice(s, t, 1.0, 1.0)


def chebyshev(s: Seen, t: int) -> Pairs:
    """a_1 = m, a_2 = 2 m^2 - 1, w_1 = 2 m a_1 / a_2 for eigenvalues in [c - h, c + h]."""
    values = np.linalg.eigvalsh(s.w(0))
    c, h = (values[-2] + values[0]) / 2, (values[-2] - values[0]) / 2
    m = (1 - c) / h
    return twice(s, t, 1 / (1 - c), 2 * m * m / (2 * m * m - 1))


def gradient_tracking(s: Seen, t: int) -> Pairs:
    """v <- v + (W - I) C(v) + g - g_before;  x <- x + (W - I) C(x) - lr v."""
    before, now, X = s.steps[t], s.steps[t + 1], fine(s.steps[t].x)
    v, g = before.state["v"], s.p.gradient(X)
    yield v + (s.w(t) - EYE) @ coded(v) + g - before.state["g_before"], now.state["v"]
    yield g, now.state["g_before"]
    landed = (s.w(t - 1) - EYE) @ coded(before.x) if s.delay and t else 0.0
    yield X + landed - LR * fine(now.state["v"]), now.updated
    yield fine(now.updated) + (0.0 if s.delay else (s.w(t) - EYE) @ coded(now.updated)), now.x


def beer(s: Seen, t: int) -> Pairs:
    """Each of x and v by CHOCO, x with a delay of 1 and v at once: see test_gossip. Both with s = W h, h the public copies."""
    before, now, X, W = s.steps[t], s.steps[t + 1], fine(s.steps[t].x), s.w(t)
    b = {name: fine(value) for name, value in before.state.items()}
    own = np.diag(np.diag(W))
    g = s.p.gradient(X)
    yield b["v"] + GAMMA * (b["v_s"] - b["v_hat"]) + g - b["g_before"], now.state["v"]
    q = coded(now.state["v"] - before.state["v_hat"])
    yield b["v_hat"] + q, now.state["v_hat"]
    yield b["v_s"] + W @ q, now.state["v_s"]
    heard = (W - own) @ coded(before.updated - s.steps[t - 1].state["xhat"]) if t else 0.0
    yield X + GAMMA * (b["s"] + heard - b["xhat"]) - LR * fine(now.state["v"]), now.updated
    q = coded(now.updated - before.state["xhat"])
    yield b["xhat"] + q, now.state["xhat"]
    yield b["s"] + heard + own @ q, now.state["s"]


def diloco(s: Seen, t: int) -> Pairs:
    """delta = mean_i C(e_i + theta - x_i), e what was lost;  u <- mu u + delta;  theta <- theta - lr (delta + mu u) = x."""
    before, now = s.steps[t].state, s.steps[t + 1].state
    e = before["residual"] + (before["anchor"] - s.steps[t + 1].updated)
    delta = mean_on_all(coded(e))
    u = MU * fine(before["momentum"]) + delta
    yield e - coded(e), now["residual"]
    yield delta, now["delta"]
    yield u, now["momentum"]
    yield before["anchor"] - OUTER_LR * (delta + MU * u), now["anchor"]
    yield fine(now["anchor"]), s.steps[t + 1].x


def eager(s: Seen, t: int) -> Pairs:
    """g_i = delta_i / n + (delta' - delta_i' / n), ' the round before;  u <- mu u + g;  theta <- theta - lr (g + mu u) = x."""
    before, now = s.steps[t].state, s.steps[t + 1].state
    own = before["anchor"] - s.steps[t + 1].updated
    g = fine(own) / N + (fine(before["delta"]) - fine(before["own"]) / N if t else 0.0)
    u = MU * fine(before["momentum"]) + g
    yield fine(own), now["own"]
    yield mean_on_all(coded(own + before["residual"])), now["delta"]
    yield u, now["momentum"]
    yield before["anchor"] - OUTER_LR * (g + MU * u), now["anchor"]
    yield fine(now["anchor"]), s.steps[t + 1].x


OUTER = {"reduce": "gather", "outer": "nesterov", "outer_lr": OUTER_LR, "outer_momentum": MU, "error_feedback": True, "every": 1}
CASES: list[tuple[Callable[[Seen, int], Pairs], int, dict[str, Any]]] = [
    *((gossip, d, {"recipe": "dpsgd", "topology": "one_peer_exponential"}) for d in (0, 1)),
    *((deepsqueeze, d, {"recipe": "deepsqueeze", "gamma": GAMMA, "topology": "one_peer_ring"}) for d in (0, 1)),
    (push_sum, 1, {"recipe": "push_sum"}),
    *((multi_gossip, d, {"recipe": "multi_gossip", "gossip_steps": 2, "every": 1}) for d in (0, 1)),
    *((chebyshev, d, {"recipe": "chebyshev", "gossip_steps": 2, "every": 1, "topology": "star"}) for d in (0, 1)),
    *((gradient_tracking, d, {"recipe": "gradient_tracking", "topology": "one_peer_ring"}) for d in (0, 1)),
    (beer, 1, {"recipe": "beer", "gamma": GAMMA, "topology": "star"}),
    (diloco, 0, {"recipe": "diloco", **OUTER}),
    (eager, 1, {"recipe": "diloco", "landing": "eager", **OUTER}),
]
ROUNDINGS = 40
"""An update rounds 8 times (test_gossip), a mix of at most 5 terms 4 times each, and at most 12 more products and sums follow."""


MOST_UNSURE = 64 + 15
"""Over all steps of ``twice``: one block by its scale, and single codes. y_1 is known to near = 20 u M, M its largest value. A
code changes where 2 near hold a boundary, max / 127 apart: of 12 x 5 x 153 codes 2.8 M / max, and M is 1.6 times a block's
largest in the mean, at most: 4.5, and five deviations of a Poisson variable are 10.6. A scale changes where 2 near hold a
boundary of bf16, 2^-8 max apart: of 12 x 5 x 4 blocks 0.15 M / max, a quarter of one."""


@pytest.mark.parametrize(("rendering", "delay", "axes"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_step_with_8_bit_codes_is_its_rendering(
    rendering: Callable[[Seen, int], Pairs], delay: int, axes: dict[str, Any], tmp_path: Path
) -> None:
    if axes["recipe"] == "push_sum":
        (tmp_path / "arcs.txt").write_text(ARCS[N])
        axes = axes | {"graph": str(tmp_path / "arcs.txt")}
    name = axes.get("topology", "ring")
    steps = steps_of(axes | {"codec": "int8:64", "delay": delay})
    seen = Seen(problem(N), lambda index: MATRICES[name](N, index), delay, steps, [])
    lost = 0.0
    for t in range(STEPS):
        known = [seen.p.c, *(v for step in steps[t : t + 2] for v in (step.updated, step.x, *step.state.values()))]
        bound = ROUNDINGS * U * max(map(largest, map(fine, known)))
        for want, got in rendering(seen, t):
            assert float(np.abs(want - got).max()) <= bound, f"step {t}"
        lost = max(lost, largest(coded(steps[t].x) - steps[t].x))
    assert sum(seen.unsure) <= MOST_UNSURE
    assert lost > 1e-3, "the codec loses something"


def steps_of(axes: dict[str, Any]) -> list[Step]:
    p = problem(N)

    def island(connection: Connection) -> list[tuple[Each, Each, dict[str, Each]]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        updated: list[Each] = [model.flat().numpy().copy()]
        # Registered before join's, so it runs first: behind the update and before the round.
        optimizer.register_step_post_hook(lambda *_: updated.append(model.flat().numpy().copy()))
        seen = []
        with dtrain.join(model, optimizer, **axes, bucket_bytes=BUCKET_BYTES, link=connection) as sync:
            for step in range(STEPS + 1):
                if step:
                    sgd_step(model, optimizer)
                    sync.settle()
                lanes = [lane.state for lane in sync.core.lanes]
                names = [k for k, v in lanes[0].items() if v.dtype == torch.float32]
                state = {k: torch.cat([lane[k] for lane in lanes]).numpy().copy() for k in names}
                seen.append((updated[-1], model.flat().numpy().copy(), state))
        return seen

    out = []
    for each in zip(*run_islands(N, island), strict=True):
        state = {k: np.array([s[k] for _, _, s in each]) for k in each[0][2]}
        out.append(Step(np.array([u for u, _, _ in each]), np.array([x for _, x, _ in each]), state))
    return out

"""How far apart do islands with different data stay under a constant learning rate? Each method goes to its closed form.

With the identity codec and a delay of one step, x <- M x - lr A (x - c), M the method's mixing matrix and A the islands'
curvatures: it ends at (I - M + lr A) x = lr A c, whose disagreement, O(lr), is the method's floor. (push_sum: the same of
numerators w z, with its own weights w = P w.) Codes of x itself (dpsgd, deepsqueeze) add what they lose, at each step anew; codes
of differences (choco) add nothing in the end, for what they code goes to 0. gradient_tracking and beer have no floor:
tests/oracle/test_gradient_tracking."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from dtrain.recipes import RECIPES
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, WIDTH, Matrix, U, largest, problem, ring_matrix
from tests.oracle.test_push_sum import ARCS, columns
from tests.oracle.test_topology import chebyshev_matrix

STEPS, LR = 80, 0.25
LOST = (1 + 2**-8) / 254
"""Of a block's largest value, by int8: half a code, of a scale that bf16 may have rounded up."""
RING, EYE = ring_matrix(4, 0), np.eye(4)


class Method(NamedTuple):
    axes: dict[str, Any]
    m: Matrix


METHODS = {
    "dpsgd": Method({"topology": "ring"}, RING),
    "deepsqueeze": Method({"topology": "ring", "gamma": 0.5, "error_feedback": True}, (EYE + RING) / 2),
    "choco": Method({"gamma": 0.75}, EYE / 4 + 0.75 * RING),
    "multi_gossip": Method({"gossip_steps": 3}, RING @ RING @ RING),
    "chebyshev": Method({"gossip_steps": 3}, chebyshev_matrix(RING, 3)),
    "push_sum": Method({}, columns(3)),
}


class Floor(NamedTuple):
    """All of float64."""

    reached: Matrix
    """What the recursion has after STEPS, (n, width)."""
    end: Matrix
    """Where it goes."""
    most: float
    """The largest |x| on the way."""
    gain: float
    """The largest sum over t of |B^t|, B what a step makes of a difference: what stays of a disturbance of 1 at every step."""


def floor(m: Matrix) -> Floor:
    n, p = len(m), problem(len(m))
    a, c = p.a.astype(np.float64), p.c.astype(np.float64)
    w = np.linalg.matrix_power(m, 400) @ np.ones(n)
    x, now = np.tile(p.start.astype(np.float64), (n, 1)), np.ones((n, 1))
    most = largest(x)
    for t in range(STEPS):
        gradient = p.gradient(x / now)
        if t:
            x, now = m @ x, m @ now
        x = x - LR * gradient
        most = max(most, largest(x))
    step = LR * a.T[:, :, None] * np.eye(n)  # (width, n, n)
    end: Matrix = np.linalg.solve(np.diag(w) - m * w + step, LR * (a * c).T[:, :, None])[:, :, 0].T.astype(np.float64)
    b, power, gain = (m * w - step) / w[:, None], np.eye(n), np.zeros(WIDTH)
    for _ in range(4 * STEPS):
        gain += np.sqrt(np.square(power).sum(axis=(-2, -1)))  # no smaller than the 2-norm
        power = b @ power
    return Floor(x / now, end, most, float(gain.max()))


def trained(method: str, codec: str, folder: Path) -> Matrix:
    axes: dict[str, Any] = {**METHODS[method].axes}
    n = len(METHODS[method].m)
    if method == "push_sum":
        (folder / "arcs.txt").write_text(ARCS[n])
        axes["graph"] = str(folder / "arcs.txt")
    p = problem(n)

    def island(connection: Connection) -> NDArray[np.float32]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(
            model, optimizer, recipe=method, codec=codec, every=1, delay=1, bucket_bytes=BUCKET_BYTES, link=connection, **axes
        ):
            for _ in range(STEPS):
                sgd_step(model, optimizer)
            return model.flat().numpy().copy()

    return np.array(run_islands(n, island), dtype=np.float64)


def disturbance(method: str, end: Matrix) -> float:
    """A step's rounding (test_algorithms derives it), in the 2-norm over islands. push_sum's progress is divided by weights of
    1/2 at least; CHOCO's xhat and s keep what each of the 4 sums of a step rounded, all steps long, and gamma of it moves x."""
    n, steps = len(end), METHODS[method].axes.get("gossip_steps", 1)
    most = max(1.0, largest(end), largest(problem(n).c.astype(np.float64)))
    each = 2 * most * (8 + 8 * n * steps) * (2 if method == "push_sum" else 1)
    return n**0.5 * U * (each + (most * 4 * STEPS * 0.75 if method == "choco" else 0.0))


HELD_ELSEWHERE = {
    "gradient_tracking": "test_gradient_tracking: none, islands agree on the optimum",
    "beer": "the same",
    "decent_adam": "dpsgd, fused",
    "accum_adam": "dpsgd, fused",
    "a2cid2": "test_events: its rounds change, and so does its end",
    "dfedsam": "multi_gossip with other gradients: test_sam",
    "dfedsam_mgs": "the same",
    "semi_s2s": "dpsgd whose rounds are drawn: test_server has what they leave in the mean",
    "single_merge": "dpsgd that ends with the exact mean: test_budget",
}


def test_every_gossip_method_has_a_floor_or_none() -> None:
    of_gossip = {name for name, row in RECIPES.items() if row.combine in ("gossip", "push")}
    assert of_gossip == {*METHODS, *HELD_ELSEWHERE}


SLOW = ("dpsgd", "multi_gossip", "chebyshev")
"""Their recursions are held to for 13 steps in test_algorithms."""


@pytest.mark.parametrize("method", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW else []) for m in METHODS])
def test_it_goes_to_its_closed_form(method: str, tmp_path: Path) -> None:
    want = floor(METHODS[method].m)
    apart = np.ptp(want.end, axis=0).max()
    left = largest(want.reached - want.end)
    assert left < 0.01 * apart, "the recursion is there"
    bound = left + want.gain * disturbance(method, want.end)
    assert bound < 0.05 * apart
    assert largest(trained(method, "identity", tmp_path) - want.end) <= bound


@pytest.mark.parametrize("method", ["dpsgd", "deepsqueeze", "choco"])
def test_what_8_bit_codes_add_to_it(method: str, tmp_path: Path) -> None:
    m = METHODS[method].m
    want, mixing = floor(m), float(np.linalg.norm(m - EYE, 2))
    left = largest(want.reached - want.end)
    exact = left + want.gain * disturbance(method, want.end)
    found = largest(trained(method, "int8:64", tmp_path) - want.end)
    # An error e of each code, LOST of the largest value at most and 2 of it in the 2-norm over 4 islands, moves x by (M - I) e:
    # dpsgd. With error feedback x + e_before - e is sent, twice an error, and x + e_before is coded: |e| is LOST / (1 - LOST) of
    # |x|. CHOCO codes what x moved by, at most 2 |x - end|, and its error again a step later; both go down with B, so at the end
    # each step has left 2 LOST / (1 - LOST) of what is left, twice that in the 2-norm.
    again = LOST / (1 - LOST)
    each = want.gain * mixing * 2 * {"dpsgd": LOST, "deepsqueeze": 2 * again, "choco": 0.0}[method]
    exact += STEPS * mixing * 2 * 2 * again * left if method == "choco" else 0.0
    # |x| is what it is without codes, and as much more as they move it.
    assert each < 1
    assert found <= (exact + each * want.most) / (1 - each)
    assert (found > 10 * exact) == (method != "choco"), "codes of x itself leave something"

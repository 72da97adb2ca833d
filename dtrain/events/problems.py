"""What do simulated nodes minimise? mean_i f_i(x), each f_i strongly convex, with the optimum known or found to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dtrain.events.algorithm import Array, Ints

SAMPLES = 8
"""Rows of data a node of ``ridge`` and ``logistic``."""
CONDITION = 1000.0
"""L / mu of ``quadratic``."""


@dataclass(frozen=True, slots=True)
class Problem:
    start: Array
    """(n, d)."""
    optimum: Array
    """(d,)."""
    gradient: Callable[[Ints, Array], Array] | None
    """(nodes (k,), x (k, d)) -> g_i(x) (k, d); None where nodes only have to agree."""
    strong_convexity: float = 1.0
    """The smallest mu of any f_i."""
    smoothness: float = 1.0
    """The largest L of any f_i."""


def consensus(num_nodes: int, numel: int, seed: int) -> Problem:
    """Agree on the mean of what the nodes begin with."""
    start = _draw(seed).standard_normal((num_nodes, numel))
    return Problem(start, start.mean(axis=0), None)


def quadratic(num_nodes: int, numel: int, seed: int, *, condition: float = CONDITION) -> Problem:
    """f_i(x) = sum_k a_k / 2 (x_k - c_ik)^2 with a_k from 1 to L = condition, as far apart by ratio, and any c_ik."""
    a = np.geomspace(1.0, condition, numel) if numel > 1 else np.ones(1)
    c = _draw(seed).standard_normal((num_nodes, numel))
    return Problem(np.zeros_like(c), c.mean(axis=0), lambda nodes, x: a * (x - c[nodes]), 1.0, float(a.max()))


def scattered(num_nodes: int, numel: int, seed: int, *, condition: float = 100.0) -> Problem:
    """f_i(x) = sum_k a_ik / 2 (x_k - c_k)^2: a_ik is L = condition at one node for each k and 1 elsewhere, so the others must
    hear of c_k from there; all agree on the optimum c."""
    k = np.arange(numel)
    a = np.ones((num_nodes, numel))
    a[k * num_nodes // numel, k] = condition
    c = _draw(seed).standard_normal(numel)
    return Problem(np.zeros_like(a), c, lambda nodes, x: a[nodes] * (x - c), 1.0, condition)


def ridge(num_nodes: int, numel: int, seed: int, *, penalty: float = 0.01) -> Problem:
    """f_i(x) = |A_i x - b_i|^2 / (2 SAMPLES) + penalty / 2 |x|^2, with b_i = A_i w_i + noise and a w_i of each node's own."""
    rows, draw = _rows(num_nodes, numel, seed)
    own = draw.standard_normal(numel) + 0.3 * draw.standard_normal((num_nodes, numel))
    labels = np.einsum("nsd,nd->ns", rows, own) + 0.1 * draw.standard_normal((num_nodes, SAMPLES))
    hessians = np.einsum("nsd,nse->nde", rows, rows) / SAMPLES + penalty * np.eye(numel)
    linear = np.einsum("nsd,ns->nd", rows, labels) / SAMPLES
    optimum = np.linalg.solve(hessians.mean(axis=0), linear.mean(axis=0))
    values = np.linalg.eigvalsh(hessians)
    return Problem(
        np.zeros((num_nodes, numel)),
        optimum,
        lambda nodes, x: np.einsum("kde,ke->kd", hessians[nodes], x) - linear[nodes],
        float(values.min()),
        float(values.max()),
    )


def logistic(num_nodes: int, numel: int, seed: int, *, penalty: float = 0.01) -> Problem:
    """f_i(x) = mean_s log(1 + exp(-b_is a_is' x)) + penalty / 2 |x|^2, the labels b_is = +-1 by a w_i of each node's own."""
    rows, draw = _rows(num_nodes, numel, seed)
    own = draw.standard_normal(numel) + 0.3 * draw.standard_normal((num_nodes, numel))
    labels = np.sign(np.einsum("nsd,nd->ns", rows, own) + 0.5 * draw.standard_normal((num_nodes, SAMPLES)))
    signed = rows * labels[:, :, None]

    def gradient(nodes: Ints, x: Array) -> Array:
        weight = 1 / (1 + np.exp(np.einsum("ksd,kd->ks", signed[nodes], x)))
        return penalty * x - np.einsum("ksd,ks->kd", signed[nodes], weight) / SAMPLES

    largest = np.linalg.eigvalsh(np.einsum("nsd,nse->nde", rows, rows) / SAMPLES).max()
    optimum = _newton(signed.reshape(-1, numel), penalty)
    return Problem(np.zeros((num_nodes, numel)), optimum, gradient, penalty, float(largest) / 4 + penalty)


def _draw(seed: int) -> np.random.Generator:
    """No stream of the clocks (``clock.py``), whose units of time draw from (seed, unit), which is (seed, unit, 0)."""
    return np.random.default_rng((seed, 0, 1))


def _rows(num_nodes: int, numel: int, seed: int) -> tuple[Array, np.random.Generator]:
    draw = _draw(seed)
    return draw.standard_normal((num_nodes, SAMPLES, numel)), draw


def _newton(signed: Array, penalty: float) -> Array:
    """The minimum of the mean logistic loss: damped until the gradient is rounding."""
    x = np.zeros(signed.shape[1])

    def loss(x: Array) -> float:
        return float(np.logaddexp(0, -(signed @ x)).mean() + penalty / 2 * x @ x)

    for _ in range(100):
        weight = 1 / (1 + np.exp(signed @ x))
        gradient = penalty * x - signed.T @ weight / len(signed)
        if np.abs(gradient).max() < 1e-14:
            break
        curvature = (signed * (weight * (1 - weight))[:, None]).T @ signed / len(signed) + penalty * np.eye(len(x))
        step, size = np.linalg.solve(curvature, gradient), 1.0
        while loss(x - size * step) > loss(x) + 1e-15 and size > 1e-3:
            size /= 2
        x = x - size * step
    return x


PROBLEMS: dict[str, Callable[[int, int, int], Problem]] = {
    "consensus": consensus,
    "quadratic": quadratic,
    "scattered": scattered,
    "ridge": ridge,
    "logistic": logistic,
}
"""(number of nodes, of parameters, seed) -> the problem."""

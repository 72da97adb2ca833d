"""At which rates should a graph's edges meet, so that the fewest meetings satisfy DADAO? One semidefinite program.

The least sum of rates with chi1 chi2 <= 1/2: over lambda >= 0 and s, with e_ij = e_i - e_j and Lambda = sum lambda_ij e_ij e_ij',
    Lambda >= s (I - 11'/n)                              that is chi1 <= 1 / s;
    [[s, e_ij'], [e_ij, Lambda + 11'/n]] >= 0            for all edges: e_ij' Lambda^+ e_ij <= s, that is chi2 <= s / 2.
Both are linear in (lambda, s), so no search over s is needed. On an edge-transitive graph all rates are equal, as the mean over
its symmetries of a solution is one."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from dtrain.events.algorithm import Array, Ints
from dtrain.extras import require

MOST_NODES = 64
"""An edge is a matrix of n + 1 rows. A torus of 36 takes the solver 6 s, a ring of 32, which mixes worse, a minute."""


def fewest_meetings(edges: Ints, num_nodes: int) -> Array:
    """Rates (m,) of the edges; raises ValueError without cvxpy, or for more than MOST_NODES nodes."""
    if num_nodes > MOST_NODES:
        raise ValueError(f'rates = "sdp" is solved for up to {MOST_NODES} islands, got {num_nodes}; use rates = "uniform"')
    cp = _cvxpy()
    m = len(edges)
    signs = np.zeros((m, num_nodes))
    signs[np.arange(m), edges[:, 0]], signs[np.arange(m), edges[:, 1]] = 1.0, -1.0
    rates, s = cp.Variable(m, nonneg=True), cp.Variable()
    mean = np.full((num_nodes, num_nodes), 1 / num_nodes)
    of_rates = signs.T @ cp.diag(rates) @ signs
    constraints = [of_rates - s * (np.eye(num_nodes) - mean) >> 0]
    for e in signs:
        row, corner = e.reshape(1, -1), cp.reshape(s, (1, 1), order="C")
        constraints.append(cp.bmat([[corner, row], [row.T, of_rates + mean]]) >> 0)
    problem = cp.Problem(cp.Minimize(cp.sum(rates)), constraints)
    problem.solve()
    if problem.status not in ("optimal", "optimal_inaccurate"):
        raise ValueError(f'rates = "sdp" was not solved: {problem.status}; use rates = "uniform"')
    return np.maximum(np.asarray(rates.value, dtype=np.float64), 0.0)


def _cvxpy() -> Any:
    require("cvxpy", asked='rates = "sdp"', extra="sdp")
    return importlib.import_module("cvxpy")

"""Accelerated in the gradients and in the meetings at once, for strongly convex problems and exact in the limit.

DADAO (Nabli and Oyallon 2023, arXiv 2208.00779): f_i mu-strongly convex and L-smooth, nu = mu / 2, six vectors a node,
    at all times   dx = eta (x~ - x) dt,     dx~ = eta (x - x~) dt,
                   dy = alpha (y~ - y) dt,   dy~ = -theta (y + z + nu x~) dt,
                   dz = alpha (z~ - z) dt,   dz~ = eta (z - z~) dt;
    at a gradient  G = g_i(x) - nu x - y~:   x <- x - gamma G,   x~ <- x~ - gamma~ G,   y~ <- y~ + (delta + 1) G;
    where i meets j, m = (y + z)_i - (y + z)_j:   z_i <- z_i - 1/2 m,   z~_i <- z~_i - beta~ m,   and j with -m;
    eta = 1/8 r,  alpha = delta = 1/4 r,  theta = 1 / (2 r),  gamma = 1 / (4 L),  gamma~ = 1 / (4 sqrt(nu L)),
    beta~ = 2 chi1 / r,   r = sqrt(nu / L).
One gradient a node and unit of time, and meetings so often that chi1 chi2 <= 1/2: sqrt(2 chi1 chi2) of them, with chi of rates
that sum to one. Then E |x - x*|^2 falls like exp(-eta t). The sum of all z, and of all z~, stays 0; at rest x = x~ = x*, y = y~ =
g_i(x*) - nu x*, z = z~ = -y - nu x*."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dtrain.events.algorithm import Array, EventAlgorithm
from dtrain.events.graph_constants import Chi

Complex = npt.NDArray[np.complex128]


def total_rate(chi: Chi) -> float:
    """Meetings a unit of time, of all edges together; ``chi`` is of rates that sum to one."""
    return (2 * chi.chi1 * chi.chi2) ** 0.5


def contraction(strong_convexity: float, smoothness: float) -> float:
    """eta, the rate at which the squared error falls."""
    return (strong_convexity / 2 / smoothness) ** 0.5 / 8


def modes(strong_convexity: float, smoothness: float) -> tuple[Complex, Complex]:
    """Values (6,) and vectors (6, 6) of the flow of (x, x~, y, y~, z, z~), its eigenvectors a column each.

    In closed form: 0 comes twice, and what a library finds for such a pair may be nearly parallel."""
    nu = strong_convexity / 2
    r = (nu / smoothness) ** 0.5
    eta, alpha, theta = r / 8, r / 4, 1 / (2 * r)

    def driven(value: float, x: tuple[float, float], z: tuple[float, float]) -> list[complex]:
        """The mode of x's or z's own equations, with what it does to y."""
        y = -theta * (nu * x[1] + z[0]) / (value * (value + alpha) / alpha + theta)
        return [*x, y, (value + alpha) / alpha * y, *z]

    # alpha theta = 1/8 and alpha < 1/4: y and y~ turn around each other.
    turning = [-alpha / 2 + sign * 1j * (alpha * theta - alpha**2 / 4) ** 0.5 for sign in (1, -1)]
    values = [0.0, -2 * eta, 0.0, -alpha - eta, *turning]
    columns = [
        driven(0.0, (1, 1), (0, 0)),
        driven(-2 * eta, (1, -1), (0, 0)),
        driven(0.0, (0, 0), (1, 1)),
        driven(-alpha - eta, (0, 0), (alpha, -eta)),
        *([0, 0, alpha, value + alpha, 0, 0] for value in turning),
    ]
    return np.array(values, dtype=np.complex128), np.array(columns, dtype=np.complex128).T


def dadao(chi: Chi, strong_convexity: float, smoothness: float) -> EventAlgorithm:
    nu = strong_convexity / 2
    r = (nu / smoothness) ** 0.5
    gamma, gamma_tilde, delta, beta_tilde = 1 / (4 * smoothness), 1 / (4 * (nu * smoothness) ** 0.5), r / 4, 2 * chi.chi1 / r
    values, vectors = modes(strong_convexity, smoothness)
    inverse = np.linalg.inv(vectors)

    def init(x: Array) -> Array:
        zero = np.zeros_like(x)
        return np.stack((x, x, zero, zero, zero, zero), axis=1)

    def flow(states: Array, elapsed: Array) -> None:
        grown = np.exp(values * elapsed[:, None])
        states[...] = np.real(vectors * grown[:, None, :] @ inverse) @ states

    def step(states: Array, gradients: Array) -> None:
        G = gradients - nu * states[:, 0] - states[:, 3]
        states[:, 0] -= gamma * G
        states[:, 1] -= gamma_tilde * G
        states[:, 3] += (delta + 1) * G

    def meet(a: Array, b: Array) -> None:
        m = a[:, 2] + a[:, 4] - b[:, 2] - b[:, 4]
        a[:, 4] -= m / 2
        a[:, 5] -= beta_tilde * m
        b[:, 4] += m / 2
        b[:, 5] += beta_tilde * m

    return EventAlgorithm(init, flow, step, meet)

"""Which momentum, gamma and outer_lr keep islands together that average by random pairs? NoLoCo's mean-square recursion. Pure.

``algorithms/noloco.py`` has the method. Along a direction of curvature a all islands do the same to their differences: training
leaves r = 1 - lr a of x a step. Of z = (phi, u, Delta), seen where a round is sent, a round of H steps whose result lands d steps
later makes, with P = I - W, W the round's matrix of pair means,
    u' = alpha u + beta Delta - P (beta Delta + gamma phi);   phi' = phi + u';
    Delta' = r^(H-d) (phi' + (r^d - 1) (phi + Delta)) - phi',        or  z' = (A + P B) z  with matrices A and B of 3 x 3.
P is a projection, drawn anew each round and alike for all islands: E P = c (I - J), c = n / (2 (n - 1)) of n islands, and 1/2
where n is odd and one is left alone. So S = E z z', summed over islands, follows
    S' = A S A' + c (A S B' + B S A' + B S B'),
for disagreement; and with c = 0 for the islands' mean, which no P moves. What a codec loses, E|e|^2 = lost E|y|^2 of each vector
and owing nothing to the others, comes on top where phi and Delta are sent. The radius of this linear map must be below 1, for
each r^H from 0 to 1: there a momentum of 0.9 bears, of 16 islands, no gamma above 0.4."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_LEFT = np.linspace(0.0, 1.0, 17)
_LEFT[0] = 1e-3
"""r^H, what training leaves in a round. At 0 with d = H a round undoes the progress of the last, on the edge by itself."""


def growth(momentum: float, gamma: float, outer_lr: float, num_islands: int, *, flown: float = 0.0, lost: float = 0.0) -> float:
    """By which a round multiplies E|x_i - x_j|^2, or the mean's |x|^2 where that is more, in the long run, at the r for which it
    is most. ``flown``: d / H. ``lost``: E|e|^2 / |y|^2 of the codec. Below 1 all is stable."""
    apart = _maps(momentum, gamma, outer_lr, chance(num_islands), flown, lost)
    together = _maps(momentum, gamma, outer_lr, 0.0, flown, 0.0)[:-1]  # r = 1, no training, leaves the mean where it is
    return float(np.abs(np.linalg.eigvals(np.concatenate((apart, together)))).max())


def chance(num_islands: int) -> float:
    """c: of an even number all have a partner, of an odd one (n - 1) / n of them."""
    return 0.5 if num_islands % 2 else num_islands / (2 * (num_islands - 1))


def largest_gamma(momentum: float, outer_lr: float, num_islands: int, *, flown: float = 0.0, lost: float = 0.0) -> float | None:
    """The largest multiple of 0.01 up to 1 that is stable; None where none is."""
    for hundredths in range(100, 0, -1):
        if growth(momentum, hundredths / 100, outer_lr, num_islands, flown=flown, lost=lost) < 1:
            return hundredths / 100
    return None


def _maps(alpha: float, gamma: float, beta: float, c: float, flown: float, lost: float) -> Matrix:
    """(r, 9, 9): S -> S', flat, for each of ``_LEFT``."""
    within, behind = _LEFT**flown, _LEFT ** (1 - flown)  # r^d and r^(H-d)
    u, u_by_p = np.array([0.0, alpha, beta]), np.array([-gamma, 0.0, -beta])
    phi = u + np.array([1.0, 0.0, 0.0])
    a, b = np.zeros((2, len(_LEFT), 3, 3))
    a[:, 0], a[:, 1], b[:, 0], b[:, 1] = phi, u, u_by_p, u_by_p
    a[:, 2] = np.outer(behind - 1, phi) + np.outer(behind * (within - 1), [1.0, 0.0, 1.0])
    b[:, 2] = np.outer(behind - 1, u_by_p)
    maps = _product(a, a) + c * (_product(a, b) + _product(b, a) + _product(b, b))
    into = np.stack([np.ones_like(behind), np.ones_like(behind), behind - 1], axis=1)
    noise = np.diag([c * gamma**2 * lost, 0.0, (1 - c) * beta**2 * lost]).ravel()
    return maps + np.einsum("ri,rj,k->rijk", into, into, noise).reshape(-1, 9, 9)


def _product(left: Matrix, right: Matrix) -> Matrix:
    """Kronecker's, one for each r."""
    return np.einsum("rij,rkl->rikjl", left, right).reshape(-1, 9, 9)

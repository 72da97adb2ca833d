"""Which outer learning rates does an outer loop bear? A quadratic model of DiLoCo's landings. Pure.

Identical islands, and one direction of a quadratic loss of which H local steps leave r^H = 1 - s, 0 <= r < 1, so that s in (0, 1]
is what a round trains out of it. The outer step, torch's Nesterov (arXiv 2311.08105), is
    u <- mu u + g;   theta <- theta - lr (g + mu u),
theta the anchor's distance from the minimum, and what g is the landing says (``algorithms/diloco.py``):
    in time  g = s theta_t                                  DiLoCo: x_t = (1 - s) theta_t, and delta_t = theta_t - x_t
    eager    g = s theta_t / n + (1 - 1 / n) s theta_t-1    of n islands (arXiv 2502.12996); with n = 1 it is in time
    pure     g = s theta_t-1                                DiLoCoX (arXiv 2506.21263); eager of n = infinity
    keep     g = theta_t - x_t,   x_t+1 = r^(H-d) (theta_t+1 + (r^d - 1) x_t)
    blend    g = theta_t - x_t,   x_t+1 = r^(H-d) ((1 - alpha) theta_t+1 + (r^d - (1 - alpha) r^(d-1)) x_t)
keep's: of x_t, which was sent after step t H, d - 1 steps leave r^(d-1) x_t. The round lands before the update of step d, whose
gradient was taken before it: r^(d-1) x_t - x_t + theta_t+1 - (1 - r) r^(d-1) x_t is there after d steps, and r^(H-d) of that
where the next round starts. blend's likewise; without delay it lands at once, and the bracket is
(1 - alpha) theta_t+1 + alpha x_t.

A round is a matrix on (theta, u, and what is left of the round before), and the loop is stable where all its eigenvalues are
inside the unit circle, for every s. Of the first three that is a matter of lr s, so that s = 1 is the worst: in time
lr < 2 (1 + mu) / (1 + 2 mu). keep and blend bear as much, keep less where a round flies for nearly the whole of its period. What
islands differ by narrows no range: eager's, by g = s (theta_t - theta_t-1) / n, bears n / 2 times what DiLoCo in time does.

What the model leaves out: what a codec loses, gradients that are noisy, islands whose losses differ, an inner Adam, rounds that
are without some islands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

Landing = Literal["keep", "eager", "pure", "blend"]
_STEP, _MOST = 0.1, 4.0
"""Between the learning rates at which an instability is first looked for, and the last: no loop here bears more than 2."""
_INSIDE = 1 - 1e-12
"""Radii above are on the circle, but for rounding. A direction of s = 0.01, the slowest, is below for any lr above 1e-9."""


@dataclass(frozen=True, slots=True)
class Loop:
    """An outer loop but for its learning rate. Without a delay, keep is DiLoCo in time."""

    landing: Landing
    momentum: float
    num_islands: int = 1
    """Only eager's says something."""
    every: int = 1
    """H, in steps; says something, as ``delay`` does, to keep and blend."""
    delay: int = 0
    """d, in steps, H at most."""
    alpha: float = 0.0
    """Of blend: the local parameters' share."""


def round_matrices(loop: Loop, lr: float, s: Values) -> Values:
    """(len(s), 3, 3), float64: of each contraction s, in (0, 1], what a round makes of (theta, u, and theta_t-1's s or x_t)."""
    import numpy as np

    zero, one = np.zeros_like(s), np.ones_like(s)
    if loop.landing in ("eager", "pure"):
        share = 1 / loop.num_islands if loop.landing == "eager" else 0.0
        g = share * s, zero, (1 - share) * one
    else:
        g = one, zero, -one
    u = g[0], g[1] + loop.momentum, g[2]
    theta = tuple(at - lr * (g_k + loop.momentum * u_k) for at, g_k, u_k in zip((one, zero, zero), g, u, strict=True))
    if loop.landing in ("eager", "pure"):
        last = s, zero, zero
    else:
        alpha, ahead = (loop.alpha if loop.landing == "blend" else 0.0), _kept(loop, s)
        after = (1 - s) ** ((loop.every - loop.delay) / loop.every)
        last = tuple(after * ((1 - alpha) * theta_k + x_k) for theta_k, x_k in zip(theta, (zero, zero, ahead), strict=True))
    return np.moveaxis(np.array([theta, u, last]), -1, 0)


def _kept(loop: Loop, s: Values) -> Values:
    """What stands before x_t in x_t+1, but for r^(H-d)."""
    in_flight = (1 - s) ** (loop.delay / loop.every)  # r^d
    if loop.landing == "keep":
        return in_flight - 1
    if loop.delay == 0:
        return loop.alpha + 0 * s
    return in_flight - (1 - loop.alpha) * (1 - s) ** ((loop.delay - 1) / loop.every)


def contractions(every: int) -> Values:
    """Those that are looked at: evenly many s from 0.01 to 1, and those of evenly many r."""
    import numpy as np

    return np.unique(np.concatenate((np.linspace(0.01, 1, 100), np.maximum(0.01, 1 - np.linspace(0, 0.99, 100) ** every))))


@lru_cache(maxsize=4096)
def radius(loop: Loop, lr: float) -> float:
    """The largest spectral radius of a round over all contractions; below 1 the loop is stable."""
    import numpy as np

    return float(np.abs(np.linalg.eigvals(round_matrices(loop, lr, contractions(loop.every)))).max())


def is_stable(loop: Loop, lr: float) -> bool:
    return radius(loop, lr) < _INSIDE


@lru_cache(maxsize=256)
def largest_outer_lr(loop: Loop) -> float:
    """The learning rate, to 1e-9, below which all are stable."""
    low, high = 0.0, _STEP
    while is_stable(loop, high) and high < _MOST:
        low, high = high, high + _STEP
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(loop, middle) else (low, middle)
    return low

"""How long does an island wait for the last of those that it needs, when steps take unequally long?

g islands come to a round at a + s Z_i, Z_i independent standard normal. Island i waits until the last has come and the link has
carried the round, a seconds longer than i can hide (negative where it could hide more):
    E[wait] = E max(0, a + s M),   M = max_j Z_j - Z_i >= 0,   P(M <= m) = integral phi(z) Phi(z + m)^(g-1) dz,
by the trapezoid rule on a grid of 0.02 (both functions are smooth; the sum is right to 1e-5, see its test). For a >= 0 this is
a + s E[max of g normals]. Noise of one round is taken to be independent of the last's, so what an island could gain by running
ahead over several rounds is left out."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

_STEP, _REACH = 0.02, 8.5
"""phi(8.5) is 1e-16: nothing lies beyond."""

_Z = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
_M = np.arange(0.0, 2 * _REACH + _STEP / 2, _STEP)


def expected_wait_s(excess_s: float, jitter_s: float, group: float) -> float:
    """E max(0, excess + jitter M); ``group`` is 1 or more, a mean where rounds differ."""
    if jitter_s <= 0 or group <= 1:
        return max(0.0, excess_s)
    beyond = _beyond(group)
    if excess_s >= 0:
        return excess_s + jitter_s * float(beyond[0])
    return jitter_s * float(np.interp(-excess_s / jitter_s, _M, beyond, right=0.0))


def expected_max(group: float) -> float:
    """E of the largest of ``group`` standard normals: 0, 0.564, 0.846, 1.029, ... for 1, 2, 3, 4."""
    return float(_beyond(group)[0]) if group > 1 else 0.0


@cache
def _normal() -> npt.NDArray[np.float64]:
    """Phi on the grid of z + m."""
    reach = np.arange(-_REACH, 3 * _REACH + _STEP, _STEP)
    return np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in reach])


@cache
def _beyond(group: float) -> npt.NDArray[np.float64]:
    """m on the grid -> E max(0, M - m), the integral of P(M > m) from m on."""
    density = np.exp(-_Z * _Z / 2) / math.sqrt(2 * math.pi) * _STEP
    powers = _normal() ** (group - 1)
    inside = np.correlate(powers[: len(_Z) + len(_M) - 1], density, mode="valid")
    over = 1 - inside
    pieces = (over[1:] + over[:-1]) / 2 * _STEP
    return np.concatenate([np.cumsum(pieces[::-1])[::-1], [0.0]])

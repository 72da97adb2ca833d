"""What do simulated islands train, where no model would be small enough? A loss whose gradients and optimum are known."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Problem(Protocol):
    @property
    def start(self) -> Tensor:
        """The parameters that every island, and its method, begins with, flat fp32."""
        ...

    @property
    def moves(self) -> bool:
        """Whether there are gradients at all."""
        ...

    def apart(self, node: int) -> Tensor | None:
        """Where an island is put once its method has begun; None leaves it."""
        ...

    def gradient(self, node: int, x: Tensor, out: Tensor) -> None:
        """At x, into ``out``."""
        ...


class Consensus:
    """No gradients: methods begin at 0, islands apart, each x_ik uniform in [-1, 1), and only talk."""

    moves = False

    def __init__(self, numel: int, seed: int) -> None:
        self.start, self._seed = torch.zeros(numel), seed

    def apart(self, node: int) -> Tensor | None:
        return 2 * torch.rand(self.start.numel(), generator=_draw(self._seed, node)) - 1

    def gradient(self, node: int, x: Tensor, out: Tensor) -> None:
        raise AssertionError("nothing moves")


class Still:
    """Nothing moves, and all stay at 0: for the time and the bytes of rounds."""

    moves = False

    def __init__(self, numel: int) -> None:
        self.start = torch.zeros(numel)

    def apart(self, node: int) -> Tensor | None:
        return None

    def gradient(self, node: int, x: Tensor, out: Tensor) -> None:
        raise AssertionError("nothing moves")


class Quadratic:
    """f_i(x) = sum_k a_ik / 2 (x_k - c_ik)^2 on island i, and f = mean_i f_i; all begin at one place.

    Its minimum is x*_k = sum_i a_ik c_ik / sum_i a_ik, and f(x) - f(x*) = mean_i sum_k a_ik / 2 (x_k - x*_k)^2."""

    moves = True

    def __init__(self, a: list[Tensor], c: list[Tensor], start: Tensor) -> None:
        self._a, self._c, self.start = a, c, start

    def apart(self, node: int) -> Tensor | None:
        return None

    def gradient(self, node: int, x: Tensor, out: Tensor) -> None:
        torch.sub(x, self._c[node], out=out).mul_(self._a[node])

    def gap(self, x: Tensor) -> float:
        """f(x) - f(x*), in fp64."""
        curvature = torch.zeros(x.numel(), dtype=torch.float64)
        optimum = torch.zeros_like(curvature)
        for a, c in zip(self._a, self._c, strict=True):
            curvature += a
            optimum += a.double() * c
        return float((curvature * (x.double() - optimum / curvature).square()).sum()) / (2 * len(self._a))


def drawn_quadratic(num_islands: int, numel: int, seed: int) -> Quadratic:
    """a uniform in [0.25, 2) and c in [-1, 1), each island its own; all begin at 0."""
    a, c = [], []
    for node in range(num_islands):
        draw = _draw(seed, node)
        a.append(0.25 + 1.75 * torch.rand(numel, generator=draw))
        c.append(2 * torch.rand(numel, generator=draw) - 1)
    return Quadratic(a, c, torch.zeros(numel))


def begin(problem: Problem, node: int) -> Tensor:
    """Where an island is at first."""
    apart = problem.apart(node)
    return problem.start.clone() if apart is None else apart


def _draw(seed: int, node: int) -> torch.Generator:
    # Seeds of islands of neighbouring jobs do not meet: there are 1,024 islands at most.
    return torch.Generator().manual_seed(seed * 1024 + node)


def consensus_distance(each: list[Tensor]) -> float:
    """sqrt(mean_i |x_i - mean x|^2), in fp64."""
    mean = mean_of(each)
    return (sum(float((x.double() - mean).square().sum()) for x in each) / len(each)) ** 0.5


def mean_of(each: list[Tensor]) -> Tensor:
    total = torch.zeros(each[0].numel(), dtype=torch.float64)
    for x in each:
        total += x
    return total / len(each)

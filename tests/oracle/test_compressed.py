"""Are the outer loops with few bits their papers'? Renderings in plain torch on one vector an island, to the bit.

With 4 islands and lr = 1/8 the products by 1 / n and lr are exact, and the sums have one order (test_diloco)."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.connect import Connection
from dtrain.recipes import RECIPES
from tests.islands import Quadratic, run_islands, sgd_step

N, LR = 4, 0.125
CUT, WIDTH = 5000, 5700
"""Two parameters: a whole chunk of 4,096 and a broken one, and a short one."""


class Problem(NamedTuple):
    start: Tensor
    a: Tensor
    c: Tensor


def problem() -> Problem:
    """0 < lr a <= 1/4; c as (normal)^3, so that a few elements move by much more than others."""
    g = torch.Generator().manual_seed(7)
    start, a, c = torch.randn(WIDTH, generator=g), torch.rand(N, WIDTH, generator=g), torch.randn(N, WIDTH, generator=g)
    return Problem(start, 0.25 + 1.75 * a, c**3)


def of_dtrain(p: Problem, steps: int, **axes: Any) -> Tensor:
    """(steps, n, width): x after each step."""

    def island(connection: Connection) -> Tensor:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(model, optimizer, link=connection, **axes):
            for _ in range(steps):
                sgd_step(model, optimizer)
                seen.append(model.flat())
        return torch.stack(seen)

    return torch.stack(run_islands(N, island), dim=1)


def two_bits_of_the_largest(v: Tensor) -> Tensor:
    """Of each chunk the 64 largest, each as the mean of the larger or of the smaller half's magnitudes; the rest 0."""
    out = torch.zeros_like(v)
    for parameter, coded in zip(v.split((CUT, WIDTH - CUT)), out.split((CUT, WIDTH - CUT)), strict=True):
        for chunk, into in zip(parameter.split(4096), coded.split(4096), strict=True):
            kept = chunk.abs().topk(64).indices
            size = chunk[kept].abs().double()
            for group in (size >= size.mean(), size < size.mean()):
                into[kept[group]] = chunk[kept[group]].sign() * size[group].mean().bfloat16().float()
    return out


def sparseloco(p: Problem, steps: int) -> Tensor:
    """e <- 0.95 e + theta - x;  q = C(e);  e <- e - q;  theta <- theta - sum_i q_i / n = x."""
    theta, x, e = p.start.clone(), [p.start.clone() for _ in range(N)], [torch.zeros(WIDTH) for _ in range(N)]
    seen = []
    for t in range(1, steps + 1):
        x = [x[i] - LR * p.a[i] * (x[i] - p.c[i]) for i in range(N)]
        if t % 30 == 0:
            delta = torch.zeros(WIDTH)
            for i in range(N):
                e[i] = 0.95 * e[i] + (theta - x[i])
                q = two_bits_of_the_largest(e[i])
                e[i] = e[i] - q
                delta = delta + q / N
            theta = theta - delta
            x = [theta.clone() for _ in range(N)]
        seen.append(torch.stack(x))
    return torch.stack(seen)


def test_sparseloco_is_its_paper() -> None:
    p, steps = problem(), 4 * RECIPES["sparseloco"].every
    got = of_dtrain(p, steps, recipe="sparseloco")
    assert torch.equal(got, sparseloco(p, steps))
    sent = (got[29, 0] - p.start) != 0
    assert 3 * 64 < int(sent.sum()) < 4 * 3 * 64, "islands send each their own, some of them the same"


def mean_of_each_bin(v: Tensor) -> Tensor:
    """256 bins of 12 sigmas / 256 of each block of 4,096; a value becomes mu + the mean of x - mu in its bin, in bf16."""
    out = torch.zeros_like(v)
    for parameter, coded in zip(v.split((CUT, WIDTH - CUT)), out.split((CUT, WIDTH - CUT)), strict=True):
        for block, into in zip(parameter.split(4096), coded.split(4096), strict=True):
            mu = block.double().mean().float()
            off = block - mu
            unit = off / off.abs().max()
            bins = (unit / (unit.square().double().mean().sqrt().float() * 12 / 256)).floor().clamp(-128, 127)
            for k in bins.unique():
                into[bins == k] = mu + off[bins == k].double().mean().float().bfloat16().float()
    return out


def intellect(p: Problem, steps: int, decay: float | None) -> Tensor:
    """delta = C(sum_i C(theta - x_i) / n);  theta <- Nesterov(theta, delta) = x. With feedback C keeps what it loses, the owner's
    C (the last) too."""
    theta, x, e = p.start.clone(), [p.start.clone() for _ in range(N)], torch.zeros(N + 1, WIDTH)
    outer, seen = torch.optim.SGD([theta], lr=0.7, momentum=0.9, nesterov=True), []

    def coded(who: int, v: Tensor) -> Tensor:
        if decay is None:
            return mean_of_each_bin(v)
        e[who] = decay * e[who] + v
        q = mean_of_each_bin(e[who])
        e[who] -= q
        return q

    for t in range(1, steps + 1):
        x = [x[i] - LR * p.a[i] * (x[i] - p.c[i]) for i in range(N)]
        if t % 100 == 0:
            delta = torch.zeros(WIDTH)
            for i in range(N):
                delta = delta + coded(i, theta - x[i]) / N
            theta.grad = coded(N, delta)
            outer.step()
            x = [theta.clone() for _ in range(N)]
        seen.append(torch.stack(x))
    return torch.stack(seen)


@pytest.mark.parametrize("decay", [None, 0.95])
def test_intellect_is_its_paper(decay: float | None) -> None:
    p, steps = problem(), 3 * RECIPES["intellect"].every
    feedback = {} if decay is None else {"error_feedback": True, "feedback_decay": decay}
    assert torch.equal(of_dtrain(p, steps, recipe="intellect", **feedback), intellect(p, steps, decay))

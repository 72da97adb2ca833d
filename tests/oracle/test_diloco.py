"""Does DiLoCo, in time, late, eager, pure and blended, follow its papers?

The renderings below are plain torch on one vector an island. With 1, 2 or 4 islands and lr = 1/8 the products by 1/n and lr are
exact, a fused multiply-add rounds like two operations, and the sums have one order: there dtrain must agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.connect import Connection
from dtrain.outer import nesterov
from tests.islands import Quadratic, run_islands, sgd_step

CUT, WIDTH = 70, 153
LR = 0.125
U = 2.0**-24
"""Unit roundoff of fp32."""
Delay = int | Literal["round"]


class Problem(NamedTuple):
    start: Tensor
    a: Tensor
    c: Tensor

    def double(self) -> Problem:
        return Problem(*(v.double() for v in self))


class Settings(NamedTuple):
    every: int
    steps: int
    outer_lr: float
    outer_momentum: float


NESTEROV = Settings(every=5, steps=23, outer_lr=0.7, outer_momentum=0.9)
EAGER = Settings(every=5, steps=23, outer_lr=0.5, outer_momentum=0.6)
"""Which four islands bear."""
PURE = Settings(every=5, steps=28, outer_lr=0.25, outer_momentum=0.8)
BLEND = Settings(every=6, steps=27, outer_lr=0.4, outer_momentum=0.9)
GENTLE = Settings(every=5, steps=20, outer_lr=0.5, outer_momentum=0.5)


def problem(n: int) -> Problem:
    """0 < lr a <= 1/4, so that an inner step makes no difference larger."""
    g = torch.Generator().manual_seed(n)
    start, a, c = torch.rand(WIDTH, generator=g), torch.rand(n, WIDTH, generator=g), torch.rand(n, WIDTH, generator=g)
    return Problem(2 * start - 1, 0.25 + 1.75 * a, 2 * c - 1)


def islands_of_dtrain(p: Problem, n: int, steps: int, **axes: Any) -> Tensor:
    """(steps + 1, n, width): x after each step, and after the drain."""

    def island(connection: Connection) -> Tensor:
        node = connection.node
        model = Quadratic(p.start, p.a[node], p.c[node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(model, optimizer, link=connection, **axes):
            for _ in range(steps):
                sgd_step(model, optimizer)
                seen.append(model.flat())
        return torch.stack([*seen, model.flat()])

    return torch.stack(run_islands(n, island), dim=1)


def outer_sgd(theta: Tensor, s: Settings) -> torch.optim.Optimizer:
    return torch.optim.SGD([theta], lr=s.outer_lr, momentum=s.outer_momentum, nesterov=s.outer_momentum > 0)


def paper(p: Problem, n: int, s: Settings, delay: int = 0) -> Tensor:
    """DiLoCo (2311.08105); a late result lands on theta, and the progress made in flight on top."""
    theta = p.start.clone()
    outer = outer_sgd(theta, s)
    x = [p.start.clone() for _ in range(n)]
    flight: tuple[int, list[Tensor], Tensor] | None = None
    seen = []

    def land(sent: list[Tensor], delta: Tensor) -> None:
        theta.grad = delta
        outer.step()
        x[:] = [(x_i - sent_i) + theta for x_i, sent_i in zip(x, sent, strict=True)]

    for t in range(1, s.steps + 1):
        grads = [a * (x_i - c) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if flight and flight[0] == t:
            land(*flight[1:])
            flight = None
        x[:] = [x_i - LR * g for x_i, g in zip(x, grads, strict=True)]
        if t % s.every == 0:
            delta = sum(((theta - x_i) / n for x_i in x), torch.zeros_like(theta))
            flight = (t + delay, list(x), delta)
            if delay == 0:
                land(*flight[1:])
                flight = None
        seen.append(torch.stack(x))
    if flight:
        land(*flight[1:])
    return torch.stack([*seen, torch.stack(x)])


def eager_paper(p: Problem, n: int, s: Settings) -> Tensor:
    """Eager updates (2502.12996): g_i^t = delta_i^t / n + (delta^{t-1} - delta_i^{t-1} / n), each island with its own theta."""
    thetas = [p.start.clone() for _ in range(n)]
    outers = [outer_sgd(theta, s) for theta in thetas]
    x = [p.start.clone() for _ in range(n)]
    others_before = [torch.zeros_like(p.start) for _ in range(n)]
    seen = []
    for t in range(1, s.steps + 1):
        x = [x_i - LR * (a * (x_i - c)) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if t % s.every == 0:
            deltas = [theta - x_i for theta, x_i in zip(thetas, x, strict=True)]
            for theta, outer, delta, late in zip(thetas, outers, deltas, others_before, strict=True):
                theta.grad = late + delta / n
                outer.step()
            x = [theta.clone() for theta in thetas]
            mean = sum((d / n for d in deltas), torch.zeros_like(p.start))
            others_before = [mean - d / n for d in deltas]
        seen.append(torch.stack(x))
    return torch.stack([*seen, torch.stack(x)])


def pure_paper(p: Problem, n: int, s: Settings) -> Tensor:
    """DiLoCoX (2506.21263), its codec left out: theta <- Outer(theta, the round before's mean), from where all start again."""
    theta, before = p.start.clone(), None
    outer = outer_sgd(theta, s)
    x = [p.start.clone() for _ in range(n)]
    begun, seen = list(x), []
    for t in range(1, s.steps + 1):
        x = [x_i - LR * (a * (x_i - c)) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if t % s.every == 0:
            mean = sum(((b - x_i) / n for b, x_i in zip(begun, x, strict=True)), torch.zeros_like(theta))
            if before is not None:
                theta.grad = before
                outer.step()
                x = [theta.clone() for _ in range(n)]
            begun, before = list(x), mean
        seen.append(torch.stack(x))
    return torch.stack([*seen, torch.stack(x)])


def plain(v: Tensor) -> Tensor:
    return v


def e3m0(v: Tensor) -> Tensor:
    """The nearest of 0, 2^-6, ..., 1 times the block's largest, which travels as bf16."""
    levels = torch.tensor([0.0, *(2.0**-k for k in range(6, -1, -1))])
    out = []
    for block in v.split(64):
        scale = block.abs().max().bfloat16().float()
        nearest = (block.abs()[:, None] / scale - levels).abs().argmin(dim=1)
        out.append(block.sign() * levels[nearest] * scale)
    return torch.cat(out)


def blend_paper(
    p: Problem, n: int, s: Settings, delay: int, alpha: float, cuts: Sequence[int], coded: Callable[[Tensor], Tensor] = plain
) -> Tensor:
    """Streaming DiLoCo (2501.18512): fragment k of P starts k H / P steps after fragment 0."""
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    thetas = [p.start[part].clone() for part in parts]
    outers = [outer_sgd(theta, s) for theta in thetas]
    x = [p.start.clone() for _ in range(n)]
    flights: dict[int, tuple[int, Tensor]] = {}
    seen = []

    def land(k: int) -> None:
        thetas[k].grad = flights.pop(k)[1]
        outers[k].step()
        for x_i in x:
            x_i[parts[k]] = alpha * x_i[parts[k]] + (1 - alpha) * thetas[k]

    for t in range(1, s.steps + 1):
        grads = [a * (x_i - c) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        for k in [k for k, (at, _) in flights.items() if at == t]:
            land(k)
        x = [x_i - LR * g for x_i, g in zip(x, grads, strict=True)]
        for k, part in enumerate(parts):
            if t % s.every == k * s.every // len(parts):
                flights[k] = t + delay, sum((coded(thetas[k] - x_i[part]) / n for x_i in x), torch.zeros_like(thetas[k]))
                if delay == 0:
                    land(k)
        seen.append(torch.stack([x_i.clone() for x_i in x]))
    for k in list(flights):
        land(k)
    return torch.stack([*seen, torch.stack(x)])


def axes_of(s: Settings) -> dict[str, Any]:
    return {"every": s.every, "outer_lr": s.outer_lr, "outer_momentum": s.outer_momentum}


def bound(s: Settings, M: float, gain: float) -> float:
    """How far fp32 can be from fp64 after all rounds, |x|, |c|, |delta|, |u| <= M.

    An inner step adds 8 u M (x - c, times a, times lr, the difference; each at most u 2M) and makes no older error larger, and
    because 0 < 1 - lr a < 1 neither does theta - x. gain bounds |error of the outer gradient| / |error of theta - x|. A mean of
    at most 4 rounds 12 u M; the outer step 4 products and 4 sums of values up to 4M: 32 u M.
    """
    theta = momentum = 0.0
    for _ in range(s.steps // s.every):
        delta = gain * (theta + s.every * 8 * U * M + 12 * U * M)
        momentum = s.outer_momentum * momentum + delta
        theta += s.outer_lr * (delta + s.outer_momentum * momentum) + 32 * U * M
    return theta + s.every * 8 * U * M


def size_of(values: Tensor, p: Problem) -> float:
    """theta - x is at most twice the largest x, and momentum 1 / (1 - 0.5) times that."""
    return 4 * max(float(values.abs().max()), float(p.c.abs().max()))


def test_outer_nesterov_is_torch_sgd_to_the_bit() -> None:
    g = torch.Generator().manual_seed(0)
    theirs = torch.randn(1001, generator=g)
    ours = theirs.clone()
    outer = nesterov(0.7, 0.9)
    state = outer.init(ours)
    reference = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(20):
        delta = torch.randn(1001, generator=g)
        theirs.grad = delta.clone()
        reference.step()
        outer.update(ours, delta, state)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n", [1, 3])
def test_every_step_with_lr_1_and_no_momentum_is_plain_averaging(n: int) -> None:
    """With one island it is plain local training."""
    p, steps = problem(n), 20
    got = islands_of_dtrain(p, n, steps, recipe="diloco", every=1, outer="sgd", outer_lr=1.0)
    q = p.double()
    x = q.start
    for t in range(steps):
        x = (x - LR * q.a * (x - q.c)).mean(dim=0)
        # A step rounds 8 u M as in bound(), theta - x, its mean and theta - delta 6 n u M more; older errors do not grow.
        M = max(1.0, float(x.abs().max()))
        assert float((got[t].double() - x).abs().max()) <= (t + 1) * (8 + 6 * n) * U * 2 * M


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("recipe", ["fedavg", "local_sgd"])
def test_fedavg_and_local_sgd_average_parameters(recipe: str, every: int) -> None:
    n, steps = 3, 16
    p = problem(n)
    got = islands_of_dtrain(p, n, steps, recipe=recipe, every=every)
    q = p.double()
    x = q.start.expand(n, -1)
    for t in range(1, steps + 1):
        x = x - LR * q.a * (x - q.c)
        if t % every == 0:
            x = x.mean(dim=0).expand(n, -1)
        M = max(1.0, float(x.abs().max()))
        assert float((got[t - 1].double() - x).abs().max()) <= t * (8 + 6 * n) * U * 2 * M


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("reduce", ["all_to_all", "gather"])
def test_diloco_is_its_paper_to_the_bit(n: int, reduce: str) -> None:
    p = problem(n)
    assert torch.equal(islands_of_dtrain(p, n, NESTEROV.steps, recipe="diloco", reduce=reduce, every=5), paper(p, n, NESTEROV))


def test_diloco_of_three_islands_is_its_paper() -> None:
    """1/3 is rounded, so the paper is followed in fp64."""
    n = 3
    p = problem(n)
    want = paper(p.double(), n, GENTLE)
    got = islands_of_dtrain(p, n, GENTLE.steps, recipe="diloco", every=5, outer_lr=0.5, outer_momentum=0.5)
    limit = bound(GENTLE, size_of(want, p), gain=1.0)
    assert limit < 1e-3
    assert float((got.double() - want).abs().max()) <= limit


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("delay", [1, 3, 5, "round"])
def test_a_late_round_lands_on_the_progress_made_in_flight(n: int, delay: Delay) -> None:
    p = problem(n)
    got = islands_of_dtrain(p, n, NESTEROV.steps, recipe="diloco", every=5, delay=delay)
    assert torch.equal(got, paper(p, n, NESTEROV, delay=5 if delay == "round" else delay))


@pytest.mark.parametrize("n", [2, 4])
def test_eager_is_its_paper_to_the_bit(n: int) -> None:
    p = problem(n)
    got = islands_of_dtrain(p, n, EAGER.steps, recipe="diloco", delay="round", landing="eager", **axes_of(EAGER))
    assert torch.equal(got, eager_paper(p, n, EAGER))


def test_eager_of_three_islands_is_its_paper() -> None:
    n = 3
    p = problem(n)
    want = eager_paper(p.double(), n, GENTLE)
    got = islands_of_dtrain(
        p, n, GENTLE.steps, recipe="diloco", every=5, delay="round", landing="eager", outer_lr=0.5, outer_momentum=0.5
    )
    # g_i = delta_i / n + delta' - delta_i' / n: its error is at most (1 + 2 / n) times theirs.
    limit = bound(GENTLE, size_of(want, p), gain=1 + 2 / n)
    assert limit < 1e-3
    assert float((got.double() - want).abs().max()) <= limit


def test_eager_with_one_island_is_diloco_in_time() -> None:
    p = problem(1)
    eager = islands_of_dtrain(p, 1, 23, recipe="diloco", every=5, delay="round", landing="eager")
    assert torch.equal(eager, islands_of_dtrain(p, 1, 23, recipe="diloco", every=5, delay=0))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("delay", ["round", 2])
def test_pure_is_its_paper_to_the_bit(n: int, delay: Delay) -> None:
    """How long a round flies says nothing, as it is applied where the next one starts."""
    p = problem(n)
    got = islands_of_dtrain(p, n, PURE.steps, recipe="diloco", delay=delay, landing="pure", **axes_of(PURE))
    assert torch.equal(got, pure_paper(p, n, PURE))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(("cuts", "delay"), [((0, WIDTH), 4), ((0, CUT, WIDTH), 2), ((0, CUT, WIDTH), 0)])
def test_blend_is_its_paper_to_the_bit(n: int, cuts: tuple[int, ...], delay: int) -> None:
    """Halves are exact; of another alpha see test_outer_stability."""
    p = problem(n)
    axes = {"delay": delay, "landing": "blend", "alpha": 0.5, "fragments": len(cuts) - 1}
    got = islands_of_dtrain(p, n, BLEND.steps, recipe="diloco", **axes, **axes_of(BLEND))
    assert torch.equal(got, blend_paper(p, n, BLEND, delay, 0.5, cuts))


@pytest.mark.parametrize("reduce", ["all_to_all", "gather"])
def test_blend_in_time_that_keeps_nothing_is_diloco(reduce: str) -> None:
    p, said = problem(2), {"codec": "identity", "reduce": reduce, **axes_of(NESTEROV)}
    blend = islands_of_dtrain(p, 2, NESTEROV.steps, recipe="streaming_diloco", fragments=1, delay=0, alpha=0.0, **said)
    assert torch.equal(blend, islands_of_dtrain(p, 2, NESTEROV.steps, recipe="diloco", **said))


# ---- rows, whose numbers are said here once more


@pytest.mark.parametrize("n", [2, 4])
def test_local_sgd_is_its_paper_to_the_bit(n: int) -> None:
    """Local SGD (1805.09767): what fedavg does to a common start, without one."""
    p = problem(n)
    x, seen = [p.start.clone() for _ in range(n)], []
    for t in range(1, 3 * 16 + 3):
        x = [x_i - LR * (a * (x_i - c)) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if t % 16 == 0:
            mean = sum((x_i / n for x_i in x), torch.zeros_like(p.start))
            x = [mean.clone() for _ in range(n)]
        seen.append(torch.stack(x))
    assert torch.equal(islands_of_dtrain(p, n, 3 * 16 + 2, recipe="local_sgd"), torch.stack([*seen, torch.stack(x)]))


@pytest.mark.parametrize("n", [2, 4])
def test_streaming_diloco_is_its_paper_to_the_bit(n: int) -> None:
    """With its codec, over the path that codes once; fewer fragments, and fewer steps between rounds."""
    p, s = problem(n), Settings(every=12, steps=45, outer_lr=0.4, outer_momentum=0.9)
    got = islands_of_dtrain(p, n, s.steps, recipe="streaming_diloco", every=s.every, fragments=2, reduce="gather")
    assert torch.equal(got, blend_paper(p, n, s, 5, 0.5, (0, CUT, WIDTH), e3m0))


@pytest.mark.parametrize("n", [2, 4])
def test_eager_diloco_is_its_paper_to_the_bit(n: int) -> None:
    p, s = problem(n), Settings(every=30, steps=94, outer_lr=0.4, outer_momentum=0.6)
    assert torch.equal(islands_of_dtrain(p, n, s.steps, recipe="eager_diloco"), eager_paper(p, n, s))


@pytest.mark.parametrize("reduce", ["all_to_all", "gather"])
@pytest.mark.parametrize(
    ("codec", "error_feedback"), [("identity", False), ("bf16", False), ("int8:64", True), ("int4:32", True)]
)
def test_after_a_round_all_islands_hold_the_same_bits(reduce: str, codec: str, error_feedback: bool) -> None:
    n = 3
    p = problem(n)
    got = islands_of_dtrain(
        p, n, 15, recipe="diloco", every=5, reduce=reduce, codec=codec, error_feedback=error_feedback, bucket_bytes=256
    )
    for t in range(1, 16):
        equal = all(torch.equal(got[t - 1, 0], got[t - 1, node]) for node in range(n))
        assert equal == (t % 5 == 0)

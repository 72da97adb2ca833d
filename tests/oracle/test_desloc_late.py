"""Do Adam's moments that land late end where they would be if their mean had been there at once?

The rendering keeps the gradients of the steps in flight and takes the mean through Adam's recursion with them; it runs in
float64 with torch's own AdamW, and knows nothing of powers of betas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.bucket import MOMENTS, flatten, make_buckets
from dtrain.moments import with_moments
from dtrain.optim import AccumAdamW
from tests.islands import Quadratic
from tests.oracle.test_desloc import EVERY, LR, STEPS, Seen, islands_of_dtrain, moments_of
from tests.oracle.test_diloco import CUT, Problem, problem
from tests.oracle.test_gossip import U

PERIODS = {"exp_avg": 2 * EVERY, "exp_avg_sq": 3 * EVERY}
BETAS = {"exp_avg": 0.9, "exp_avg_sq": 0.999}


def paper(p: Problem, n: int, delay: int) -> list[list[Seen]]:
    """By step, by island."""
    models = [Quadratic(p.start, p.a[i], p.c[i], CUT) for i in range(n)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=LR) for m in models]
    theta, seen = p.start.clone(), []
    sent: list[Tensor] = []
    means: dict[str, list[Tensor]] = {}
    flown: list[list[list[Tensor]]] = []
    for t in range(1, STEPS + 1):
        for m in models:
            m.zero_grad()
            m().backward()
        if sent and t % EVERY == delay % EVERY:
            theta = torch.stack(sent).mean(dim=0)
            for m, x in zip(models, sent, strict=True):
                m.set_flat(m.flat() - x + theta)
            for name, mean in means.items():
                for node, (m, o) in enumerate(zip(models, optimizers, strict=True)):
                    for k, tensor in enumerate(m.parameters()):
                        value = mean[k].clone()
                        for gradients in flown:
                            g = gradients[node][k]
                            value = BETAS[name] * value + (1 - BETAS[name]) * (g if name == "exp_avg" else g * g)
                        o.state[tensor][name].copy_(value)
            sent = []
        for o in optimizers:
            o.step()
        flown.append([[x.grad.clone() for x in m.parameters() if x.grad is not None] for m in models])
        if t % EVERY == 0:
            sent, flown = [m.flat() for m in models], []
            means = {
                name: [
                    torch.stack([o.state[x][name] for o, x in zip(optimizers, tensors, strict=True)]).mean(dim=0)
                    for tensors in zip(*(m.parameters() for m in models), strict=True)
                ]
                for name, period in PERIODS.items()
                if t % period == 0
            }
        seen.append([moments_of(m, o) for m, o in zip(models, optimizers, strict=True)])
    return seen


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("delay", [1, 2])
def test_late_moments_are_where_their_mean_would_have_come_to(n: int, delay: int) -> None:
    """fp32 rounds x some ten times a step, and each moment; a step of lr u / sqrt(v) is wrong by lr times their relative error,
    which is that of x where a gradient is small."""
    p = problem(n)
    g = float((p.a * (p.start.abs() + p.c.abs())).abs().max())
    limits = Seen(*(torch.tensor(20 * STEPS * U * most) for most in (2.0, g, g**2)))
    want, got = paper(p.double(), n, delay), islands_of_dtrain(p, n, STEPS, delay=delay)
    for one, two in zip(got, want, strict=True):
        for mine, theirs in zip(one, two, strict=True):
            for a, b, limit in zip(mine, theirs, limits, strict=True):
                assert float((a.double() - b).abs().max()) <= float(limit)
            assert (mine.v >= 0).all()


Make = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.0),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.0, betas=(0.5, 0.75)),
    "accum 1": lambda m: AccumAdamW(m.parameters(), lr=0.0),
    "accum 2": lambda m: AccumAdamW(m.parameters(), lr=0.0, every=2),
    "accum 3": lambda m: AccumAdamW(m.parameters(), lr=0.0, every=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("flown", [0, 1, 4])
def test_a_mean_that_is_carried_is_one_that_was_there_at_once(make: Make, flown: int) -> None:
    """Gradients are given, so one optimizer may have the mean at once and another late. The vector misses every second step, and
    of its moments less decays."""
    moved: list[list[Tensor]] = []
    for late in (False, True):
        model = nn.ParameterDict({"a": torch.linspace(-1, 1, 12).view(3, 4), "b": torch.linspace(1, 2, 5)})
        optimizer = make(model)
        flat = flatten(model.named_parameters(), None, None)
        (bucket,) = with_moments(
            "desloc", make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=False), flat, [optimizer]
        )
        assert bucket.moments is not None
        mean, sent = torch.linspace(0.5, 1.5, 17), {name: torch.zeros(17) for name in MOMENTS}

        def step(t: int, model: nn.ParameterDict = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for name, x in model.items():
                x.grad = None if name == "b" and t % 2 else torch.full_like(x, 0.25 * (t + 1))
            optimizer.step()

        for t in range(5):
            step(t)
        for name in MOMENTS:
            bucket.moments.read(name, sent[name])
            if not late:
                bucket.moments.write(name, mean)
        since = bucket.moments.updates()
        assert since.tolist() == [5, 3]
        for t in range(5, 5 + flown):
            step(t)
        for name in MOMENTS:
            if late:
                bucket.moments.carry(name, sent[name], mean, since)
        found = [torch.zeros(17) for _ in MOMENTS]
        for name, room in zip(MOMENTS, found, strict=True):
            bucket.moments.read(name, room)
        moved.append(found)
    for one, two in zip(*moved, strict=True):
        assert torch.equal(one, two) if flown == 0 else torch.allclose(one, two, rtol=32 * U, atol=0.0)


class OneDevice(TorchDispatchMode):
    """What CUDA refuses and meta lets pass: arithmetic of tensors that lie on two devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = {x.device for x in args if isinstance(x, Tensor) and x.dim()}
        assert len(devices) < 2 or "copy" in str(func), func
        return func(*args, **(kwargs or {}))


def test_moments_are_carried_where_they_lie() -> None:
    """Beside an optimizer on a GPU what was sent may lie in CPU memory (``outer_state = "host"``)."""
    weight = nn.Parameter(torch.zeros(8, device="meta"))
    optimizer = torch.optim.AdamW([weight])
    optimizer.state[weight] = {"step": torch.tensor(4.0), **{name: torch.zeros(8, device="meta") for name in MOMENTS}}
    flat = flatten([("weight", weight)], None, None)
    (bucket,) = with_moments(
        "desloc", make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=False), flat, [optimizer]
    )
    assert bucket.moments is not None
    with OneDevice():
        with pytest.raises(AssertionError, match="sub_"):
            torch.zeros(8, device="meta").sub_(torch.zeros(8))
        for name in MOMENTS:
            bucket.moments.carry(name, torch.zeros(8), torch.ones(8), torch.tensor([2]))

"""What may a training loop do under a gossip method? Tie weights, accumulate, freeze, leave parameters out, clip, and use bf16.

Each is compared with a loop that comes to the same by arithmetic alone, to the bit: halves of a gradient add up to it exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.connect import Connection
from dtrain.optim import AccumAdamW
from dtrain.recipes import RECIPES
from tests.islands import Quadratic, run_islands
from tests.oracle.test_gossip import BUCKET_BYTES, LR, problem

ISLANDS, STEPS, CLIP, ADAM_LR = 3, 5, 0.5, 0.01
ADAM = {"decent_adam": 1, "accum_adam": 2, "choco, fused": 2}
"""In one pass, with the optimizer that it needs, and its s."""
METHODS: dict[str, dict[str, Any]] = {
    "dpsgd": {},
    "deepsqueeze": {},
    "choco": {},
    "multi_gossip": {"every": 2, "delay": 1, "gossip_steps": 2},
    "chebyshev": {"every": 2, "delay": 2, "gossip_steps": 2, "topology": "star"},
    "push_sum": {"graph": "random_out:2"},
    "gradient_tracking": {},
    "beer": {},
    "a2cid2": {},
    "noloco": {"every": 2},
    "semi_s2s": {"server": "sampled:2:2"},
    "decent_adam": {},
    "accum_adam": {},
    "choco, fused": {},
}
BY_OTHERS = {"single_merge", "dfedsam", "dfedsam_mgs"}
"""dpsgd and multi_gossip again, with a schedule that must know the run's length, and with gradients that SAM takes."""
Backward = Callable[[Quadratic, int], None]


def once(model: Quadratic, step: int) -> None:
    model().backward()


class Loop(NamedTuple):
    model: Callable[[Quadratic], nn.Module] = lambda quadratic: quadratic
    """What is joined."""
    backward: Backward = once
    clip: float | None = None
    clip_by_hand: float | None = None
    """After what the method exchanges before an update."""


def run(method: str, loop: Loop, dtype: torch.dtype = torch.float32, codec: str = "int8:64") -> Tensor:
    """(steps + 1, n, width): after each step, and after the drain."""
    p, recipe = problem(ISLANDS), method.partition(",")[0]

    def island(connection: Connection) -> Tensor:
        quadratic = p.model(connection.node).to(dtype)
        model = loop.model(quadratic)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = (
            AccumAdamW(parameters, lr=ADAM_LR, every=ADAM[method]) if method in ADAM else torch.optim.SGD(parameters, lr=LR)
        )
        hooked = loop.clip_by_hand is None
        seen = []
        axes = {"codec": codec, "bucket_bytes": BUCKET_BYTES, **METHODS[method]}
        with dtrain.join(model, optimizer if hooked else [], recipe=recipe, clip=loop.clip, link=connection, **axes) as sync:
            assert len(sync.core.lanes) == 2
            for step in range(STEPS):
                optimizer.zero_grad()
                loop.backward(quadratic, step)
                if not hooked:
                    sync.before_update()
                    nn.utils.clip_grad_norm_(parameters, loop.clip_by_hand or 0.0)
                optimizer.step()
                if not hooked:
                    sync.after_update()
                seen.append(quadratic.flat())
        return torch.stack([*seen, quadratic.flat()])

    return torch.stack(run_islands(ISLANDS, island), dim=1)


@cache
def plain(method: str) -> Tensor:
    return run(method, Loop())


def tied(quadratic: Quadratic) -> nn.Module:
    """One parameter under two names, in two modules."""
    quadratic.again = nn.Module()
    quadratic.again.weight = quadratic.left
    return quadratic


def beside_frozen(quadratic: Quadratic) -> nn.Module:
    frozen = nn.Linear(3, 5)
    frozen.requires_grad_(False)
    return nn.ModuleList([frozen, quadratic])


def in_halves(model: Quadratic, step: int) -> None:
    for _ in range(2):
        (0.5 * model()).backward()


LOOPS = {
    "tied": Loop(model=tied),
    "accumulated": Loop(backward=in_halves),
    "beside frozen ones": Loop(model=beside_frozen),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", LOOPS)
def test_it_is_the_plain_loop_to_the_bit(method: str, loop: str) -> None:
    assert torch.equal(run(method, LOOPS[loop]), plain(method))


def test_every_method_that_gossips_is_here() -> None:
    assert {name for name, row in RECIPES.items() if row.combine in ("gossip", "push")} <= {*METHODS, *BY_OTHERS}
    assert all((plain(method)[-1, 0] != plain(method)[-1, 1]).any() for method in METHODS), "islands differ"


def leaves_out(value: float | None) -> Backward:
    def backward(model: Quadratic, step: int) -> None:
        model().backward()
        if step % 3 == 1:
            model.right.grad = None if value is None else torch.full_like(model.right, value)

    return backward


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ADAM])
def test_a_parameter_that_a_step_does_not_use_has_a_gradient_of_zero(method: str) -> None:
    """It mixes on, and an estimate of the mean gradient that others moved still moves it."""
    none = run(method, Loop(backward=leaves_out(None)))
    assert torch.equal(none, run(method, Loop(backward=leaves_out(0.0))))
    assert not torch.equal(none, plain(method))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ADAM])
def test_clipping_is_by_the_norm_of_the_whole_model(method: str) -> None:
    """As torch does it on all parameters, between what the method exchanges before an update and the update. The fused step's
    own: test_accum_adam."""
    clipped = run(method, Loop(clip=CLIP))
    assert torch.equal(clipped, run(method, Loop(clip_by_hand=CLIP)))
    assert float((clipped - plain(method)).abs().max()) > 0.05, "it clips"


@pytest.mark.parametrize("method", METHODS)
def test_bf16_parameters_are_trained_as_they_are(method: str) -> None:
    """There are no master weights: the optimizer steps bf16 parameters, and State is fp32. Each step rounds x twice to 8 bits at
    most (where it lands, and the update), and the gradient or its estimate once or twice; no method makes a difference larger.
    Adam's quotient is another matter where a gradient is about to change its sign: up to two steps of about lr."""
    got, want = run(method, Loop(), torch.bfloat16, "bf16"), run(method, Loop(), codec="bf16")
    assert got.dtype == torch.bfloat16
    most = float(want.abs().max())
    bound = (STEPS + 1) * 4 * 2.0**-9 * most + (2 * STEPS * ADAM_LR if method in ADAM else 0.0)
    assert float((got.float() - want).abs().max()) <= bound
    assert float((want[-1] - want[0]).abs().max()) > 2 * bound or method in ADAM, "it trains"

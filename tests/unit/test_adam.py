"""Does the inner optimizer decay what it should, and does the learning rate follow its formula?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dtrain.models.gpt import GPT, GPTConfig
from dtrain.optim.adam import adamw, cosine_lr, set_lr


def mixed_model(*, tied: bool = False) -> nn.ModuleDict:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(7, 4), "matrix": nn.Linear(4, 5), "gain": nn.LayerNorm(5), "head": nn.Linear(4, 7, bias=False)}
    )
    if tied:
        model["head"].weight = model["embedding"].weight
    return model


@pytest.mark.parametrize("model", [mixed_model(), mixed_model(tied=True), GPT(GPTConfig(layers=1)), nn.Linear(3, 2, bias=False)])
def test_each_parameter_is_in_exactly_one_group(model: nn.Module) -> None:
    optimizer = adamw(model, lr=1e-3, weight_decay=0.1)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_without_gradient_is_pure_decay_of_matrices(tied: bool) -> None:
    model, lr, decay = mixed_model(tied=tied), 0.01, 0.3
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw(model, lr=lr, weight_decay=decay).step()
    decayed = {"matrix.weight"} if tied else {"matrix.weight", "head.weight"}
    for name, p in model.named_parameters():
        factor = 1 - lr * decay if name in decayed else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0)
        assert name in decayed or torch.equal(p, before[name])


def test_steps_follow_adamw_in_float64() -> None:
    model = nn.Linear(9, 5, bias=False)
    lr, decay, beta1, beta2, eps = 3e-3, 0.2, 0.9, 0.95, 1e-8
    optimizer = adamw(model, lr=lr, weight_decay=decay)
    x = model.weight.detach().double()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    generator = torch.Generator().manual_seed(0)
    for t in range(1, 21):
        g = torch.randn(x.shape, generator=generator)
        model.weight.grad = g.clone()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * g.double()
        v = beta2 * v + (1 - beta2) * g.double() ** 2
        x = x * (1 - lr * decay) - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    # 20 steps, each of a few fp32 roundings of 6e-8 on weights below 0.5
    torch.testing.assert_close(model.weight.detach().double(), x, rtol=0, atol=5e-7)


def test_frozen_parameters_are_left_out() -> None:
    model = mixed_model()
    model["matrix"].weight.requires_grad_(False)
    grouped = {id(p) for group in adamw(model, lr=1e-3, weight_decay=0.1).param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_result_does_not_depend_on_threads_or_alignment() -> None:
    def train(num_threads: int, offset: int) -> Tensor:
        torch.set_num_threads(num_threads)
        generator = torch.Generator().manual_seed(0)
        model = nn.Linear(1, 1, bias=False)
        storage = torch.zeros(50_021 + offset)
        storage[offset:].copy_(torch.randn(50_021, generator=generator))
        model.weight = nn.Parameter(storage[offset:].view(1, -1))  # as the engine does: parameters are views of flat buckets
        optimizer = adamw(model, lr=1e-2, weight_decay=0.1)
        for _ in range(5):
            model.weight.grad = torch.randn(1, 50_021, generator=generator)
            optimizer.step()
        return model.weight.detach().clone()

    threads = torch.get_num_threads()
    try:
        expected = train(1, 0)
        assert all(torch.equal(train(n, offset), expected) for n in (1, 2) for offset in (0, 3))
    finally:
        torch.set_num_threads(threads)


def test_cosine_at_its_corners() -> None:
    def lr(step: int) -> float:
        return cosine_lr(step, steps=201, warmup=40, peak=2.0, floor=0.1)

    assert lr(0) == pytest.approx(2.0 / 41)
    assert lr(19) == pytest.approx(2.0 * 20 / 41)
    assert lr(39) == pytest.approx(2.0 * 40 / 41)
    assert lr(40) == 2.0  # the peak, once
    assert lr(80) == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))  # a quarter of the way: cos(pi / 4)
    assert lr(120) == pytest.approx(2.0 * 0.55)  # half way
    assert lr(200) == pytest.approx(0.2)  # the last step
    assert lr(10_000) == lr(200)
    values = [lr(step) for step in range(201)]
    assert values[:41] == sorted(values[:41])
    assert values[40:] == sorted(values[40:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (2, 1), (5, 100)])
def test_cosine_of_very_short_runs_is_positive_and_below_peak(steps: int, warmup: int) -> None:
    assert all(0 < cosine_lr(step, steps=steps, warmup=warmup, peak=1.0) <= 1 for step in range(steps))
    assert warmup > 0 or cosine_lr(0, steps=steps, warmup=warmup, peak=1.0) == 1.0


def test_set_lr_reaches_every_group() -> None:
    optimizer = adamw(mixed_model(), lr=1e-3, weight_decay=0.1)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]

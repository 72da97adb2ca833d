"""Is demo its paper's, to the bit? A rendering in plain torch, and what a loop must bring for it.

With 4 islands the products by 1 / n are exact and the sums have one order; the transforms are of fp64 on both sides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.build import build_optimizers
from dtrain.config import parse_job
from dtrain.connect import Connection, connect_local
from dtrain.launch.run_folder import resolved
from dtrain.plan.candidates import candidates
from dtrain.recipes import RECIPES, optimizer_of, resolve
from tests.islands import run_islands

N, STEPS, LR, DECAY = 4, 12, 0.125, 0.25
ROWS, COLUMNS, REST = 70, 96, 50
"""A matrix of four sorts of chunks, and a vector."""


class Model(nn.Module):
    """sum_k a_k / 2 (x_k - c_k)^2 of all elements, a and c the island's; the same start."""

    def __init__(self, node: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        start = [torch.randn(shape, generator=g) for shape in ((ROWS, COLUMNS), (REST,))]
        self.parts = nn.ParameterList(start)
        g = torch.Generator().manual_seed(6 + node)
        self.a = [0.5 + torch.rand(p.shape, generator=g) for p in start]
        self.c = [torch.randn(p.shape, generator=g) for p in start]

    def forward(self) -> Tensor:
        return torch.stack([(0.5 * a * (p - c).square()).sum() for p, a, c in zip(self.parts, self.a, self.c, strict=True)]).sum()

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parts])


def trained(connection: Connection, clip: float | None = None) -> Tensor:
    """(steps, elements)."""
    model = Model(connection.node)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, weight_decay=DECAY)
    seen = []
    with dtrain.join(model, optimizer, recipe="demo", clip=clip, link=connection):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
            seen.append(model.flat())
    return torch.stack(seen)


def basis(n: int) -> Tensor:
    d = [[math.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt((2 if k else 1) / n) for i in range(n)] for k in range(n)]
    return torch.tensor(d, dtype=torch.float64)


def largest(m: Tensor) -> Tensor:
    """IDCT(top 32 of DCT(chunk)) of every chunk of a matrix."""
    out = torch.empty_like(m)
    for rows in torch.arange(len(m)).split(64):
        for columns in torch.arange(m.shape[1]).split(64):
            at = rows[:, None], columns
            down, across = basis(len(rows)), basis(len(columns))
            c = (down @ m[at].double() @ across.T).float()
            kept = torch.zeros(c.numel()).scatter_(0, c.view(-1).abs().topk(min(32, c.numel())).indices, 1.0).view_as(c)
            out[at] = (down.T @ (c * kept).double() @ across).float()
    return out


def demo(n: int, clip: float = math.inf) -> Tensor:
    """m <- 0.999 m + g;  q = C(m);  m <- m - q;  theta <- theta - lr (sign(sum_i q_i / n) + decay theta)."""
    islands = [Model(node) for node in range(n)]
    theta = [p.detach().clone() for p in islands[0].parts]
    m = [[torch.zeros_like(p) for p in theta] for _ in range(n)]
    step, seen = torch.optim.SGD(theta, lr=LR, weight_decay=DECAY), []
    for _ in range(STEPS):
        total = [torch.zeros_like(p) for p in theta]
        for own, island in zip(m, islands, strict=True):
            gradient = [a * (p - c) for a, p, c in zip(island.a, theta, island.c, strict=True)]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient]))
            for k, g in enumerate(gradient):
                own[k] = 0.999 * own[k] + g * (clip / (norm + 1e-6)).clamp(max=1.0)
                q = largest(own[k].view(-1, own[k].shape[-1])).view_as(own[k])
                own[k] = own[k] - q
                total[k] = total[k] + q / n
        for p, q in zip(theta, total, strict=True):
            p.grad = q.sign()
        step.step()
        seen.append(torch.cat([p.reshape(-1) for p in theta]))
    return torch.stack(seen)


def test_demo_is_its_paper() -> None:
    islands = run_islands(N, trained)
    want = demo(N)
    assert all(torch.equal(island, want) for island in islands)
    moved = (want[1:] - want[:-1] * (1 - LR * DECAY)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, LR), rtol=0, atol=1e-5)


def test_what_is_clipped_goes_in_and_signs_come_out_of_one_island_too() -> None:
    """Clipped behind the exchange, signs of 6,770 elements would be 0.01 each."""
    alone = trained(connect_local(1)[0], clip=5.0)
    assert torch.equal(alone, demo(1, clip=5.0))
    assert not torch.equal(alone, demo(1)), "it clips"


def test_steps_are_by_signs_when_the_others_have_left_too() -> None:
    def island(connection: Connection) -> Tensor:
        model = Model(connection.node)
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=LR), [torch.cat([p.detach().reshape(-1) for p in model.parts])]
        with dtrain.join(model, optimizer, recipe="demo", link=connection):
            for _ in range(3 + 2 * connection.node):
                optimizer.zero_grad()
                model().backward()
                optimizer.step()
                seen.append(torch.cat([p.detach().reshape(-1) for p in model.parts]))
        return torch.stack(seen)

    _, longer = run_islands(2, island)
    moved = (longer[-2:] - longer[-3:-1]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, LR), rtol=0, atol=1e-5)


def test_a_loop_must_step_by_plain_sgd() -> None:
    model = Model(0)
    for optimizer, said in (
        (torch.optim.AdamW(model.parameters(), lr=LR), "AdamW makes something else"),
        (torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), "SGD with momentum makes something else"),
    ):
        with pytest.raises(ValueError, match=rf"^recipe 'demo' is defined with SGD without momentum, [^\n]*{said}[^\n]*$"):
            dtrain.join(model, optimizer, recipe="demo", link=connect_local(1)[0])


def test_a_job_steps_by_sgd_and_decays_matrices_alone() -> None:
    job = parse_job({"sync": {"recipe": "demo"}, "train": {"lr": 0.01, "weight_decay": 0.3}})
    (optimizer,) = build_optimizers(job, RECIPES["demo"], nn.Linear(3, 2))
    assert type(optimizer) is torch.optim.SGD
    groups = [(group["lr"], group["weight_decay"], group["momentum"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(0.01, 0.3, 0, 1), (0.01, 0.0, 0, 1)]
    with pytest.raises(ValueError, match=r'^train.moments_every = 1 is of AdamW, and sync.recipe = "demo" is defined with SGD'):
        resolved(parse_job({"sync": {"recipe": "demo"}, "train": {"moments_every": 1}}))
    with pytest.raises(ValueError, match=r'^train.optimizer = "adamw" takes SGD from sync.recipe = "demo", which is defined'):
        optimizer_of(RECIPES["demo"], "adamw")


def test_a_parameter_that_stays_an_islands_own_would_step_by_a_gradient_and_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^sync.exclude = \('a',\) has no effect with sync.algorithm = \"demo\""):
        resolve("demo", {"exclude": ["a"]}, 4)
    asked = resolve("dpsgd", {"exclude": ["a"]}, 4)
    assert "demo" not in {r.name for r in candidates(asked, 4)}


def test_a_plan_looks_at_it_with_its_own_codec_alone() -> None:
    assert [r.codec for r in candidates(resolve("dpsgd", {}, 4), 4) if r.name == "demo"] == ["dct:32/64"]

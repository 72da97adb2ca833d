"""Does Muon step the matrices that it is for, as far as AdamW would, and is MuLoCo DiLoCo with it?"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrain
from dtrain.config import parse_job
from dtrain.connect import Connection, connect_local
from dtrain.launch.checks import resolved
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.optim import hidden_matrices, muon_adamw
from dtrain.optim.muon import MuonFP32
from dtrain.recipes import RECIPES, optimizer_of
from tests.islands import run_islands

LR, DECAY, EVERY, STEPS, ISLANDS = 0.01, 0.1, 3, 11, 2


def gpt() -> GPT:
    return GPT(GPTConfig(vocab=16, layers=2, width=16, heads=2, context=8))


class Many(nn.Module):
    """One of each kind that a model may have, in blocks and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        inner, tied, frozen = nn.Embedding(7, 4), nn.Linear(4, 7), nn.Linear(4, 4)
        tied.weight, frozen.weight.requires_grad = inner.weight, False
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Conv1d(4, 4, 3), inner, tied, frozen])
        self.shared = nn.ModuleList([self.blocks[0]])


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def test_matrices_inside_the_blocks_are_muons_and_all_else_adamws() -> None:
    model = gpt()
    inside = [f"blocks.{k}.{name}.weight" for k in range(2) for name in ("qkv", "out", "up", "down")]
    assert names_of(model, hidden_matrices(model)) == inside
    many = Many()
    muon, adamw = muon_adamw(many, lr=LR, weight_decay=DECAY)
    (matrices,) = muon.param_groups
    decayed, plain = adamw.param_groups
    assert names_of(many, matrices["params"]) == ["blocks.0.weight"]
    assert names_of(many, decayed["params"]) == ["head.weight", "blocks.1.weight"]
    assert sorted(names_of(many, plain["params"])) == [
        *("blocks.0.bias", "blocks.1.bias", "blocks.2.weight", "blocks.3.bias", "blocks.4.bias", "embedding.weight", "head.bias")
    ]
    assert [g["weight_decay"] for g in (matrices, decayed, plain)] == [DECAY, DECAY, 0.0]
    with pytest.raises(ValueError, match=r"^Muon is for the matrices of blocks in an nn.ModuleList, and the model has none; "):
        muon_adamw(nn.Linear(4, 4), lr=LR, weight_decay=DECAY)


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24)])
def test_it_steps_as_far_as_adamw(shape: tuple[int, int]) -> None:
    """Gradients of noise: AdamW's m / sqrt(v) has a root mean square of sqrt((1 - b1) / (1 + b1)) = 0.229 where v is its mean;
    the variance of v, 2 (1 - b2) / (1 + b2) = 0.05, makes it 3 % more. Newton-Schulz leaves singular values between
    0.68 and 1.13 (but those near zero, few of a square matrix), and Muon 0.2 times their root mean square."""
    draw = torch.Generator().manual_seed(1)
    block = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])
    (matrix,) = block.parameters()
    other = nn.Parameter(matrix.detach().clone())
    muon, _ = muon_adamw(block, lr=LR, weight_decay=0.0)
    adamw = torch.optim.AdamW([other], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    moved: list[tuple[float, float]] = []
    for _ in range(120):
        before = [matrix.detach().clone(), other.detach().clone()]
        matrix.grad = torch.randn(shape, generator=draw)
        other.grad = matrix.grad.clone()
        muon.step()
        adamw.step()
        now = [matrix.detach(), other.detach()]
        moved.append((rms(now[0] - before[0]) / LR, rms(now[1] - before[1]) / LR))
    by_muon, by_adamw = (sum(pair[k] for pair in moved[60:]) / 60 for k in (0, 1))
    assert 0.2 * 0.68 < by_muon < 0.2 * 1.13
    assert by_adamw == pytest.approx(math.sqrt(0.1 / 1.9), rel=0.1)


@pytest.mark.parametrize("shape", [(32, 32), (24, 96), (96, 24)])
def test_in_fp32_it_is_torchs_but_for_what_bf16_loses(shape: tuple[int, int]) -> None:
    """Five steps on the same gradients, beside the equations in fp64 and torch's Muon. N raises a singular value below 1 by at
    most a = 3.4445 a step, 485 times in five, and an error of fp32, 2^-24, with it: 3e-5 of an update, a hundred times less than
    bf16's, 2^-9 for each of ten products, which are 2 %."""
    draw = torch.Generator().manual_seed(1)
    first = torch.randn(shape, generator=draw)
    ours, theirs = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    optimizers = [
        kind([x], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        for kind, x in ((MuonFP32, ours), (torch.optim.Muon, theirs))
    ]
    p64, m64 = first.double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(5):
        g = torch.randn(shape, generator=draw)
        ours.grad, theirs.grad = g.clone(), g.clone()
        for optimizer in optimizers:
            optimizer.step()
        m64 = 0.95 * m64 + 0.05 * g.double()
        x = 0.05 * g.double() + 0.95 * m64
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x + (-4.7750 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
        p64 = (1 - LR * DECAY) * p64 - 0.2 * math.sqrt(max(shape)) * LR * x
    moved = rms(p64 - first.double())
    assert rms(ours.detach().double() - p64) < 3e-5 * moved + 2**-24 * rms(p64)
    assert 1e-4 * moved < rms(theirs.detach().double() - p64) < 0.02 * moved


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def tokens(node: int, step: int) -> Tensor:
    return torch.randint(0, 16, (2, 9), generator=torch.Generator().manual_seed(100 * node + step))


def backward(model: GPT, node: int, step: int) -> None:
    model.zero_grad()
    batch = tokens(node, step)
    cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()


def paper() -> list[Tensor]:
    """Algorithm 1 of arXiv 2505.23725 on all islands: K inner loops of Muon and AdamW, one outer SGD with Nesterov's momentum."""
    theta = gpt()
    outer = torch.optim.SGD(theta.parameters(), lr=0.7, momentum=0.6, nesterov=True)
    islands = [copy.deepcopy(theta) for _ in range(ISLANDS)]
    inner: list[list[torch.optim.Optimizer]] = []
    for x in islands:
        matrices = [p for name, p in x.named_parameters() if name.startswith("blocks")]
        rest = [{"params": [x.head.weight], "weight_decay": DECAY}, {"params": [x.embedding.weight], "weight_decay": 0.0}]
        inner.append([
            MuonFP32(matrices, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=LR, betas=(0.9, 0.95), fused=True),
        ])  # fmt: skip
    for step in range(STEPS):
        for node, x in enumerate(islands):
            backward(x, node, step)
            for optimizer in inner[node]:
                optimizer.step()
        if (step + 1) % EVERY == 0:
            for anchor, *locals_ in zip(theta.parameters(), *(x.parameters() for x in islands), strict=True):
                anchor.grad = sum(((anchor - p) / ISLANDS for p in locals_), torch.zeros_like(anchor)).detach()
            outer.step()
            for x in islands:
                x.load_state_dict(theta.state_dict())
    return [torch.cat([p.detach().flatten() for p in x.parameters()]) for x in islands]


def test_muloco_is_its_papers_to_the_bit() -> None:
    """Halves are exact, and both sum in the same order: three rounds, and two steps more."""

    def island(connection: Connection) -> Tensor:
        model = gpt()
        optimizers = muon_adamw(model, lr=LR, weight_decay=DECAY)
        with dtrain.join(model, optimizers, recipe="muloco", every=EVERY, link=connection):
            for step in range(STEPS):
                backward(model, connection.node, step)
                for optimizer in optimizers:
                    optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many here as in the islands' threads
    try:
        want, got = paper(), run_islands(ISLANDS, island)
    finally:
        torch.set_num_threads(num_threads)
    assert not torch.equal(want[0], want[1])
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


class Muon2(torch.optim.SGD):
    """Somebody's own."""


def test_a_recipe_with_muon_needs_it() -> None:
    model = gpt()
    said = r"^recipe 'muloco' is defined with Muon, and SGD is another optimizer; give join dtrain\.optim\.muon"
    with pytest.raises(ValueError, match=said):
        dtrain.join(model, torch.optim.SGD(model.parameters(), lr=LR), recipe="muloco", link=connect_local(1)[0])
    for optimizers in (Muon2(model.parameters(), lr=LR), muon_adamw(model, lr=LR, weight_decay=DECAY), []):
        dtrain.join(model, optimizers, recipe="muloco", link=connect_local(1)[0]).close()
    with pytest.raises(ValueError, match=r"'decent_adam' is defined with AdamW, and MuonFP32 is another optimizer"):
        dtrain.join(model, muon_adamw(model, lr=LR, weight_decay=DECAY), recipe="decent_adam", link=connect_local(2)[0])


@pytest.mark.parametrize(
    ("sync", "train", "said"),
    [
        ("muloco", {"optimizer": "adamw"}, r'^train\.optimizer = "adamw" takes Muon from .*; .* sync\.recipe = "diloco"$'),
        ("decent_adam", {"optimizer": "muon"}, r'^train\.optimizer = "muon" takes AdamW from .*; .* sync\.recipe = "dpsgd"$'),
        ("diloco", {"optimizer": "muon", "moments_every": 4}, r"^train\.moments_every = 4 is AdamW's, and train\.optimizer ="),
        ("muloco", {"moments_every": 1}, r'^train\.moments_every = 1 is AdamW\'s, and sync\.recipe = "muloco" trains with Muon'),
    ],
)
def test_two_inner_optimizers_at_once_are_refused(sync: str, train: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as e:
        resolved(parse_job({"sync": {"recipe": sync}, "train": train}))
    assert "\n" not in str(e.value)


def test_a_job_trains_with_adamw_unless_it_or_its_recipe_says_muon() -> None:
    assert [optimizer_of(RECIPES[name], None) for name in ("diloco", "accum_adam", "muloco")] == ["adamw", "adamw", "muon"]
    assert [optimizer_of(RECIPES[name], "muon") for name in ("diloco", "dpsgd", "muloco")] == ["muon"] * 3


def test_gossip_whose_pass_is_shared_with_adamw_takes_muon_apart() -> None:
    """Two islands that do the same have no mean but themselves: their steps are Muon's own."""

    def trained(connection: Connection | None) -> list[Tensor]:
        model = gpt()
        optimizers = muon_adamw(model, lr=LR, weight_decay=DECAY)
        with dtrain.join(model, optimizers, recipe="dpsgd", link=connection) if connection else nullcontext():
            for step in range(3):
                backward(model, 0, step)
                for optimizer in optimizers:
                    optimizer.step()
        return [p.detach() for p in model.parameters()]

    for island in run_islands(2, trained):
        assert all(torch.equal(a, b) for a, b in zip(island, trained(None), strict=True))

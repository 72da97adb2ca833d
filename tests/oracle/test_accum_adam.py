"""Is AccumAdamW its paper's, and AdamW where s = 1? And is the fused gossip step the same as its parts, bit for bit?"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import dtrain
from dtrain import engine
from dtrain.build import build_optimizers
from dtrain.config import parse_job
from dtrain.connect import Connection
from dtrain.core import Core
from dtrain.fused import FusedSteps
from dtrain.hooks import take_over
from dtrain.launch.checks import resolved
from dtrain.optim import AccumAdamW
from dtrain.recipes import RECIPES, moments_of
from tests.islands import Quadratic, run_islands, sgd_step

Matrix = NDArray[np.float64]

U = 2.0**-24
"""Unit roundoff of fp32."""
N, CUT, WIDTH, STEPS = 4, 128, 205, 11
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def gradients(steps: int) -> Tensor:
    return torch.randn(steps, WIDTH, generator=torch.Generator().manual_seed(steps))


def run_steps(optimizer: torch.optim.Optimizer, x: Tensor, gs: Tensor) -> Tensor:
    seen = []
    for g in gs:
        x.grad = g.clone()
        optimizer.step()
        seen.append(x.detach().clone())
    return torch.stack(seen)


def paper(start: Matrix, gs: Matrix, every: int) -> Matrix:
    """Algorithm of arXiv 2410.11998 in float64; moments are stored already decayed."""
    x, (b1, b2) = start.copy(), BETAS
    m, v, a = (np.zeros_like(x) for _ in range(3))
    out = []
    for t, g in enumerate(gs, 1):
        a += g / every
        k = -(-t // every)
        m_hat, v_hat = m + (1 - b1) * g, v + (1 - b2) * g * g
        x = x * (1 - LR * DECAY) - LR / (1 - b1**k) * m_hat / (np.sqrt(v_hat / (1 - b2**k)) + EPS)
        if t % every == 0:
            m, v, a = b1 * (m + (1 - b1) * a), b2 * (v + (1 - b2) * a * a), np.zeros_like(a)
        out.append(x)
    return np.array(out)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_it_follows_the_paper(every: int) -> None:
    start, gs = torch.rand(WIDTH, generator=torch.Generator().manual_seed(7)), gradients(STEPS)
    x = start.clone().requires_grad_()
    got = run_steps(AccumAdamW([x], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, every=every), x, gs)
    want = paper(start.double().numpy(), gs.double().numpy(), every)
    # A step moves x by at most c lr, c = (1 - b1) / sqrt(1 - b2) / (1 - b1) < 5 of them; m, v and the quotient are within about
    # 20 roundings of themselves, where signs in m cancel by at most 1 / (1 - b1) = 10 more: 200 u c lr; x itself, below 2, is
    # rounded three times: 6 u.
    assert float(np.abs(got.double().numpy() - want).max()) <= STEPS * (200 * U * 5 * LR + 6 * U)


def test_s_of_one_is_torchs_adamw() -> None:
    start, gs = torch.rand(WIDTH, generator=torch.Generator().manual_seed(8)), gradients(2 * STEPS)
    x, y = (start.clone().requires_grad_() for _ in range(2))
    ours = run_steps(AccumAdamW([x], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY), x, gs)
    theirs = run_steps(torch.optim.AdamW([y], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True), y, gs)
    assert float((ours - theirs).abs().max()) <= 2 * 2 * STEPS * (200 * U * 5 * LR + 6 * U)


def test_the_accumulator_costs_no_memory_where_s_is_one() -> None:
    x = torch.zeros(8, requires_grad=True)
    for every, numel in ((1, 0), (3, 8)):
        optimizer = AccumAdamW([x], lr=LR, every=every)
        run_steps(optimizer, x, torch.ones(1, 8))
        assert optimizer.state[x]["accumulated"].numel() == numel


def test_it_resumes_from_its_state_dict_and_keeps_fp32_moments_of_bf16_parameters() -> None:
    gs = torch.randn(8, 70, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = torch.rand(70, generator=torch.Generator().manual_seed(4)).bfloat16().requires_grad_()
    optimizer = AccumAdamW([x], lr=LR, every=3)
    run_steps(optimizer, x, gs[:4])
    y, saved = x.detach().clone().requires_grad_(), optimizer.state_dict()
    again = AccumAdamW([y], lr=1.0, every=3)
    again.load_state_dict(saved)
    assert again.state[y]["exp_avg"].dtype == torch.float32
    assert torch.equal(run_steps(optimizer, x, gs[4:]), run_steps(again, y, gs[4:]))


def test_a_copy_steps_by_itself_and_another_s_is_refused() -> None:
    x = torch.ones(8, requires_grad=True)
    optimizer = AccumAdamW([x], lr=LR, every=2)
    run_steps(optimizer, x, torch.ones(3, 8))
    twin = copy.deepcopy(optimizer)
    (y,) = twin.param_groups[0]["params"]
    assert torch.equal(run_steps(optimizer, x, torch.ones(3, 8)), run_steps(twin, y, torch.ones(3, 8)))
    with pytest.raises(ValueError, match=r"every = \[2\]"):
        AccumAdamW([x], lr=LR, every=3).load_state_dict(optimizer.state_dict())


def test_a_late_gradient_is_corrected_from_its_own_beginning() -> None:
    """As torch counts: a parameter that has had no gradient has taken no step."""
    parameters = [[torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)] for _ in range(2)]
    ours = AccumAdamW(parameters[0], lr=LR, betas=BETAS)
    theirs = torch.optim.AdamW(parameters[1], lr=LR, betas=BETAS, weight_decay=0.0)
    for step in range(12):
        for pair in parameters:
            pair[0].grad = torch.full((4,), 1.0 + step)
            pair[1].grad = torch.full((4,), 1.0) if step > 8 else None
        ours.step()
        theirs.step()
    for a, b in zip(*parameters, strict=True):
        assert float((a - b).detach().abs().max()) <= 12 * (200 * U * 5 * LR + 6 * U)


def test_groups_may_be_empty_or_come_later() -> None:
    x, late = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    optimizer = AccumAdamW([{"params": []}, {"params": [x]}], lr=LR)
    run_steps(optimizer, x, torch.ones(1, 4))
    optimizer.add_param_group({"params": [late]})
    run_steps(optimizer, late, torch.ones(1, 4))
    assert float(late.detach().max()) < 1.0


def test_a_second_join_of_one_optimizer_is_refused_and_a_second_close_is_harmless() -> None:
    start, a, c = problem(1)

    def island(connection: Connection) -> str:
        model = Quadratic(start, a[0], c[0], CUT)
        optimizer = AccumAdamW(model.parameters(), lr=LR)
        sync = dtrain.join(model, optimizer, recipe="dpsgd", topology="complete", link=connection)
        assert optimizer.taken_over is not None
        with pytest.raises(ValueError, match="still open"):
            take_over(optimizer, lambda: None, lambda: None)
        sync.close()
        optimizer.taken_over = later = lambda: None
        sync.close()
        return "kept" if optimizer.taken_over is later else "lost"

    assert run_islands(1, island) == ["kept"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"lr": -1.0}, "lr = -1.0"), ({"betas": (1.0, 0.9)}, "betas"), ({"eps": 0.0}, "eps"), ({"every": 0}, "every = 0")],
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], words: str) -> None:
    whole: dict[str, Any] = {"lr": 0.1} | settings
    with pytest.raises(ValueError, match=words):
        AccumAdamW([torch.zeros(1, requires_grad=True)], **whole)


# ---- with gossip


def problem(n: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    return torch.rand(WIDTH, generator=g), 0.25 + torch.rand(n, WIDTH, generator=g), 2 * torch.rand(n, WIDTH, generator=g) - 1


def trajectory(
    moments_every: int = 2, *, clip: float | None = None, skip: Callable[[int], bool] = lambda step: False, **axes: Any
) -> Tensor:
    """(steps + 1, n, width) of n islands after each step, and after the drain. Where ``skip`` says so, the second parameter has
    no gradient."""
    start, a, c = problem(N)

    def island(connection: Connection) -> Tensor:
        model = Quadratic(start, a[connection.node], c[connection.node], CUT)
        groups = [{"params": [model.left], "weight_decay": DECAY}, {"params": [model.right], "weight_decay": 0.0}]
        optimizer = AccumAdamW(groups, lr=LR, betas=BETAS, eps=EPS, every=moments_every)
        seen = []
        with dtrain.join(model, optimizer, clip=clip, link=connection, **axes):
            for step in range(STEPS):
                optimizer.zero_grad()
                model().backward()
                if skip(step):
                    model.right.grad = None
                optimizer.step()
                seen.append(model.flat())
        return torch.stack([*seen, model.flat()])

    return torch.stack(run_islands(N, island), dim=1)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry a fused round, whether one landed in it."""
    calls: list[bool] = []
    start = Core.start_fused

    def counted(self: Core, *args: Any, landing: bool) -> Any:
        calls.append(landing)
        return start(self, *args, landing=landing)

    monkeypatch.setattr(Core, "start_fused", counted)
    return calls


CASES: list[dict[str, Any]] = [
    {"recipe": "dpsgd", "topology": "ring", "codec": "identity", "delay": 1},
    {"recipe": "dpsgd", "topology": "one_peer_exponential", "codec": "int8:64", "delay": 1},
    {"recipe": "dpsgd", "topology": "random_pairs", "codec": "int4:64", "delay": 0},
    {"recipe": "dpsgd", "topology": "complete", "codec": "int8:64", "delay": 1},
]
CASES += [
    {"recipe": "choco", "codec": codec, "delay": delay, "gamma": gamma}
    for codec, delay, gamma in (("int8:64", 1, 0.75), ("sign:64", 1, 0.3), ("int4:64:stochastic", 0, 0.75), ("lut4:128", 1, 0.75))
]
CASES += [{"recipe": "dpsgd", "codec": codec} for codec in ("bf16", "e3m0:32")]
CASES += [{"recipe": "dpsgd", "codec": "int8:64", "every": every, "delay": delay} for every, delay in ((3, 2), (2, 1))]


@pytest.mark.parametrize("axes", CASES, ids=lambda axes: "-".join(map(str, axes.values())))
def test_the_fused_step_is_its_parts_to_the_bit(
    axes: dict[str, Any], fused_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = trajectory(bucket_bytes=512, **axes)
    assert len(fused_calls) > STEPS, "it was not fused"
    assert any(fused_calls) == (axes.get("delay", 1) == axes.get("every", 1)), "rounds land in the pass that starts the next"
    monkeypatch.setattr(engine, "fused_steps", lambda *args: None)
    assert torch.equal(fused, trajectory(bucket_bytes=512, **axes))


@pytest.mark.parametrize("recipe", ["dpsgd", "choco"])
def test_a_parameter_without_gradient_leaves_its_bucket_to_the_parts(
    recipe: str, fused_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def skip(step: int) -> bool:
        return step % 3 == 1

    axes = {"recipe": recipe, "codec": "int8:64", "bucket_bytes": 512}
    fused = trajectory(skip=skip, **axes)
    assert 0 < len(fused_calls) < 2 * N * STEPS, "some buckets at some steps"
    monkeypatch.setattr(engine, "fused_steps", lambda *args: None)
    assert torch.equal(fused, trajectory(skip=skip, **axes))


@pytest.mark.parametrize("recipe", ["dpsgd", "choco"])
def test_clipping_in_the_pass_is_torchs_global_norm(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    axes: dict[str, Any] = {"recipe": recipe, "codec": "identity", "topology": "ring"}
    # The norm is summed in another order and precision: 205 squares in fp32 are within 205 u, so is the factor, and then each
    # gradient; AdamW's quotient passes on at most the whole of it: c lr = 5 lr.
    bound = STEPS * (205 + 200) * U * 5 * LR + STEPS * 20 * U
    fused = trajectory(clip=0.5, **axes)
    assert float((fused - trajectory(**axes)).abs().max()) > 10 * bound, "it clips"
    monkeypatch.setattr(engine, "fused_steps", lambda *args: None)
    assert float((fused - trajectory(clip=0.5, **axes)).abs().max()) <= bound


def test_decentralized_adam_follows_the_matrix_recursion() -> None:
    """X <- W_{t-1} X - lr U(G(X)), the gradient at the un-mixed X, on a ring, with accumulated moments."""
    start, a, c = (v.double().numpy() for v in problem(N))
    W = (np.eye(N) + np.roll(np.eye(N), 1, axis=0) + np.roll(np.eye(N), -1, axis=0)) / 3
    decay = np.where(np.arange(WIDTH) < CUT, DECAY, 0.0)
    X, every, (b1, b2) = np.tile(start, (N, 1)), 2, BETAS
    M, V, A = (np.zeros_like(X) for _ in range(3))
    want = []
    for t in range(1, STEPS + 1):
        G, k = a * (X - c), -(-t // every)
        A += G / every
        quotient = (M + (1 - b1) * G) / (1 - b1**k) / (np.sqrt((V + (1 - b2) * G * G) / (1 - b2**k)) + EPS)
        X = (W @ X if t > 1 else X) * (1 - LR * decay) - LR * quotient
        if t % every == 0:
            M, V, A = b1 * (M + (1 - b1) * A), b2 * (V + (1 - b2) * A * A), np.zeros_like(A)
        want.append(X)
    got = trajectory(every, recipe="dpsgd", topology="ring", codec="identity", delay=1)[:-1].double().numpy()
    # As above a step; mixing adds 3 (1 + 1 + 2) roundings of values below 2. What was wrong moves the gradient by less than 1.25
    # times as much, and the quotient by c times that over its own size, which EPS bounds loosely: 10 covers c and the growth.
    assert float(np.abs(got - np.array(want)).max()) <= 10 * STEPS * (200 * U * 5 * LR + 30 * U)


@pytest.mark.parametrize("recipe", ["dpsgd", "choco"])
def test_a_round_in_flight_between_fused_steps_survives_a_checkpoint(recipe: str) -> None:
    start, a, c = problem(N)
    cut = 5

    def island(connection: Connection, saved: dict[int, dict[str, Any]] | None = None) -> tuple[Tensor, dict[str, Any]]:
        model = Quadratic(start, a[connection.node], c[connection.node], CUT)
        optimizer = AccumAdamW(model.parameters(), lr=LR, every=2)
        kept: dict[str, Any] = {}
        with dtrain.join(model, optimizer, recipe=recipe, codec="int4:64:stochastic", topology="ring", link=connection) as sync:
            if saved is not None:
                model.set_flat(saved[connection.node]["x"])
                optimizer.load_state_dict(saved[connection.node]["optimizer"])
                sync.load_state_dict(saved[connection.node]["sync"])
            for step in range(sync.step, STEPS):
                if step == cut:
                    state = {k: v.clone() for k, v in sync.state_dict().items()}
                    kept = {"x": model.flat(), "optimizer": copy.deepcopy(optimizer.state_dict()), "sync": state}
                    assert int(state["bucket0.land_step"]) == cut + 1, "a round flies"
                sgd_step(model, optimizer)
        return model.flat(), kept

    whole = run_islands(N, island)
    saved = {node: kept for node, (_, kept) in enumerate(whole)}
    resumed = run_islands(N, lambda connection: island(connection, saved))
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(whole, resumed, strict=True))


def test_accumulated_moments_are_asked_for_by_name() -> None:
    """A recipe that is defined with them refuses an optimizer without; decentralized AdamW takes AdamW, torch's too."""
    start, a, c = problem(1)

    def island(connection: Connection) -> None:
        model = Quadratic(start, a[0], c[0], CUT)
        for optimizer in (torch.optim.AdamW(model.parameters()), AccumAdamW(model.parameters(), lr=LR)):
            with pytest.raises(ValueError, match="recipe 'accum_adam' is defined with accumulated moments"):
                dtrain.join(model, optimizer, recipe="accum_adam", link=connection)
        accumulates = AccumAdamW(model.parameters(), lr=LR, every=2)
        with dtrain.join(model, accumulates, recipe="accum_adam", link=connection) as sync:
            assert isinstance(sync._fused, FusedSteps)
            sgd_step(model, accumulates)
        for other in (torch.optim.SGD(model.parameters(), lr=LR), torch.optim.Adam(model.parameters())):
            with pytest.raises(ValueError, match=f"recipe 'decent_adam' is defined with AdamW, and {type(other).__name__} is"):
                dtrain.join(model, other, recipe="decent_adam", link=connection)

    run_islands(2, island)

    def of_torch(connection: Connection) -> None:
        model = Quadratic(start, a[0], c[0], CUT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="decent_adam", link=connection):
            sgd_step(model, optimizer)

    run_islands(2, of_torch)


def test_a_job_does_not_take_accumulation_from_its_recipe() -> None:
    assert [moments_of(RECIPES["accum_adam"], said) for said in (None, 4, 8)] == [4, 4, 8]
    assert [moments_of(RECIPES["decent_adam"], said) for said in (None, 1, 4)] == [1, 1, 4]
    assert [moments_of(RECIPES["dpsgd"], said) for said in (None, 1)] == [None, 1]
    job = parse_job({"sync": {"recipe": "accum_adam"}, "train": {"moments_every": 1}})
    with pytest.raises(ValueError, match=r'train\.moments_every = 1 takes accumulation from sync\.recipe = "accum_adam"'):
        resolved(job)
    with pytest.raises(ValueError, match="takes accumulation"):
        build_optimizers(job, RECIPES["accum_adam"], torch.nn.Linear(2, 2))


def test_the_optimizer_is_given_back() -> None:
    start, a, c = problem(1)

    def island(connection: Connection) -> bool:
        model = Quadratic(start, a[0], c[0], CUT)
        optimizer = AccumAdamW(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="dpsgd", codec="int8", link=connection) as sync:
            assert isinstance(sync._fused, FusedSteps)
            sgd_step(model, optimizer)
        before = model.flat()
        sgd_step(model, optimizer)
        return optimizer.taken_over is None and not torch.equal(before, model.flat())

    assert all(run_islands(2, island))

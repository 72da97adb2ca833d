"""Is SAM's gradient taken where the papers say, and do islands that step by it follow the recursion of DFedSAM?

On the quadratic sum_k a_k / 2 (x_k - c_k)^2 both passes are known in closed form: g = a (x - c), then a (x + rho g / |g| - c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dtrain
from dtrain.connect import Connection, connect_local
from dtrain.optim import SAM, AccumAdamW
from dtrain.recipes import RECIPES, rho_of
from tests.islands import Quadratic, run_islands
from tests.oracle.test_gossip import BUCKET_BYTES, LR, WIDTH, Matrix, Problem, U, largest, problem
from tests.oracle.test_topology import w_of

ISLANDS, STEPS, RHO = 5, 11, 0.25


def closure_of(model: nn.Module) -> Callable[[], float]:
    def closure() -> float:
        model.zero_grad()
        loss = model()
        loss.backward()
        return float(loss.detach())

    return closure


def recursion(p: Problem, *, every: int, delay: int, gossip_steps: int, rho: float) -> tuple[Matrix, float]:
    """X after all has landed, and the smallest |g| on the way."""
    a, c = p.a.astype(np.float64), p.c.astype(np.float64)
    moved = np.linalg.matrix_power(w_of("ring", None, 0, ISLANDS), gossip_steps) - np.eye(ISLANDS)
    X = np.tile(p.start.astype(np.float64), (ISLANDS, 1))
    flying: dict[int, Matrix] = {}
    least = np.inf
    for t in range(1, STEPS + 1):
        g = a * (X - c)
        norms = np.linalg.norm(g, axis=1, keepdims=True)
        least = min(least, float(norms.min()))
        X = X + flying.pop(t, 0.0) - LR * a * (X + rho * g / norms - c)
        if t % every == 0 and delay == 0:
            X = X + moved @ X
        elif t % every == 0:
            flying[t + delay] = moved @ X
    return X + sum(flying.values()), least


def trajectory(p: Problem, axes: dict[str, Any], rho: float) -> NDArray[np.float32]:
    def island(connection: Connection) -> NDArray[np.float32]:
        model = p.model(connection.node)
        sam = SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=rho)
        with dtrain.join(model, sam, **axes, bucket_bytes=BUCKET_BYTES, link=connection):
            for _ in range(STEPS):
                sam.step(closure_of(model))
        return model.flat().numpy()

    return np.array(run_islands(ISLANDS, island))


@pytest.mark.parametrize(("recipe", "gossip_steps"), [("dfedsam", 1), ("dfedsam_mgs", 4)])
@pytest.mark.parametrize("delay", [0, 4])
def test_k_local_steps_and_then_gossip(recipe: str, gossip_steps: int, delay: int) -> None:
    p = problem(ISLANDS)
    want, least = recursion(p, every=4, delay=delay, gossip_steps=gossip_steps, rho=RHO)
    got = trajectory(p, {"recipe": recipe, "delay": delay}, RHO).astype(np.float64)
    # A step's derivative is I - lr (A + rho / |g| A P A), P the projection beside g: symmetric, with eigenvalues between 0 and 1
    # while lr a (1 + rho a / |g|) <= 1, so no two trajectories part in the 2-norm; gossip adds that of W^Q - I where it lands, at
    # most 2 in the 2-norm, and STEPS have two landings: errors grow 9-fold at most.
    assert LR * 2 * (1 + RHO * 2 / least) <= 1
    # Roundings of a step: 16 u M an element (the update's 8, as D-PSGD's, and as many at the point above), and |g| in any order
    # of summation W + 3, all of rho, times lr a <= 1/4. A gossip step: 3 terms of 4 u M, sent and mixed.
    M = max(largest(want), 1.0) + RHO
    step = (ISLANDS * WIDTH) ** 0.5 * 16 * U * M + ISLANDS**0.5 * RHO * (WIDTH + 3) * U / 4
    mix = (ISLANDS * WIDTH) ** 0.5 * 24 * U * M
    bound = 9 * (STEPS * step + 2 * gossip_steps * mix)
    assert np.linalg.norm(got - want) <= bound
    without, _ = recursion(p, every=4, delay=delay, gossip_steps=gossip_steps, rho=1e-9)
    assert np.linalg.norm(want - without) > 20 * bound, "the second pass matters"


def by_hand(z: Tensor, a: Tensor, c: Tensor, rho: float) -> Tensor:
    g = a * (z - c)
    return a * (z + g * (rho / torch.linalg.vector_norm(g)) - c)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AccumAdamW])
def test_any_optimizer_steps_with_it(kind: Callable[..., torch.optim.Optimizer]) -> None:
    """Against the same optimizer fed with the closed form. SAM's norm is taken over two tensors, so |g| may round otherwise, by
    W u at most: that moves the point above by rho W u, each gradient by a rho W u, and a step by lr / (1 - beta1) times its share
    in the smallest gradient, 0.05 at least, in both m and sqrt(v)."""
    draw = torch.Generator().manual_seed(3)
    start, a = torch.rand(WIDTH, generator=draw), 0.5 + torch.rand(WIDTH, generator=draw)
    c = start + 1 + torch.rand(WIDTH, generator=draw)  # so far off that no gradient comes near zero
    model, other = Quadratic(start, a, c, 70), nn.Parameter(start.clone())
    sam, plain = SAM(kind(model.parameters(), lr=0.01), rho=RHO), kind([other], lr=0.01)
    for _ in range(5):
        before = model.flat()
        loss = sam.step(closure_of(model))
        assert loss == pytest.approx(float((0.5 * a * (before - c).square()).sum()), rel=1e-5), "the loss where the model was"
        other.grad = by_hand(other.detach(), a, c, RHO)
        assert float(other.grad.abs().min()) > 0.05
        plain.step()
    most_a = 1.5
    assert float((model.flat() - other.detach()).abs().max()) <= 5 * 2 * 0.01 * 10 * most_a * RHO * WIDTH * U / 0.05


def test_the_norm_is_that_of_all_optimizers_and_parameters_come_back_to_the_bit() -> None:
    p = problem(2)
    model = p.model(0)
    start = model.flat().clone()
    optimizers = [torch.optim.SGD([model.left], lr=LR), torch.optim.SGD([model.right], lr=LR)]
    SAM(optimizers, rho=RHO).gradient(closure_of(model))
    assert torch.equal(model.flat(), start)
    want = by_hand(start, torch.from_numpy(p.a[0]), torch.from_numpy(p.c[0]), RHO)
    got = torch.cat([q.grad for q in (model.left, model.right) if q.grad is not None])
    torch.testing.assert_close(got, want, rtol=0, atol=2 * (RHO * (WIDTH + 3) + 8 * 2) * U)


def test_a_closure_that_fails_in_its_second_pass_leaves_the_parameters() -> None:
    model = problem(2).model(0)
    start, passes = model.flat().clone(), iter((closure_of(model), None))

    def closure() -> float:
        go_on = next(passes)
        if go_on is None:
            assert not torch.equal(model.flat(), start)
            raise RuntimeError("out of memory")
        return go_on()

    with pytest.raises(RuntimeError, match="out of memory"):
        SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO).step(closure)
    assert torch.equal(model.flat(), start)


def test_at_an_optimum_and_without_a_gradient_nothing_moves() -> None:
    c = torch.rand(WIDTH)
    model = Quadratic(c, torch.ones(WIDTH), c, 70)
    SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO).step(closure_of(model))
    assert torch.equal(model.flat(), c)
    idle = nn.Parameter(torch.ones(3))
    SAM(torch.optim.SGD([idle], lr=LR), rho=RHO).step(lambda: 0.0)
    assert torch.equal(idle.detach(), torch.ones(3))


class Normed(nn.Module):
    """Batch norm, a frozen bias, and a layer that no loss hangs on."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(8)
        self.batch = torch.randn(16, 6, generator=draw)
        self.norm, self.out, self.unused = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(2, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw))
        self.out.bias.requires_grad = False

    def forward(self) -> Tensor:
        return self.out(self.norm(self.batch)).square().mean()


def test_an_overflow_leaves_out_the_second_pass_and_the_step() -> None:
    """The statistics are those of one pass over the batch, and the next scale steps as if nothing had been."""
    model, plain = Normed(), Normed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    sam = SAM(torch.optim.SGD(model.parameters(), lr=LR), rho=RHO)
    scaler, passes = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=2.0**-120), list[float]()

    def closure() -> float:
        model.zero_grad()
        loss = model()
        (scaler.scale(loss) * 8).backward()
        passes.append(float(loss.detach()))
        return passes[-1]

    with dtrain.join(model, sam, recipe="local", scaler=scaler, link=connect_local(1)[0]) as sync:
        assert sam.gradient(closure) == passes[0]
        scaler.step(sam.optimizers[0])
        scaler.update()
        assert (len(passes), sync.step) == (1, 1)
        plain()
        for name, buffer in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        sam.gradient(closure)
        scaler.step(sam.optimizers[0])
    assert (len(passes), passes[1]) == (3, passes[0])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"norm.weight", "norm.bias", "out.weight"}, "what is frozen and what is unused stays"


def test_the_norm_may_be_of_more_than_this_ranks_parameters() -> None:
    """A stage of a pipeline holds a gradient of 4, and the other stage one of 3: |g| = 5."""
    z = torch.nn.Parameter(torch.tensor([7.0]))
    seen: list[float] = []

    def closure() -> None:
        seen.append(z.item())
        z.grad = torch.tensor([-4.0])

    SAM(torch.optim.SGD([z], lr=0.1), rho=0.5, joined=lambda norms: torch.cat((norms, torch.tensor([3.0])))).gradient(closure)
    assert seen == pytest.approx([7.0, 7.0 - 0.5 * 4 / 5], rel=2**-23)
    assert z.item() == 7.0


@pytest.mark.parametrize("size", [0.0, 2.0**-20, 300.0])
def test_the_norm_of_fp16_gradients_neither_overflows_nor_vanishes(size: float) -> None:
    """|g| = size sqrt(65536) is 256 size: 76,800 is beyond fp16, and (2^-20)^2 below it. All that is computed is exact."""
    x, seen = nn.Parameter(torch.zeros(65_536, dtype=torch.float16)), list[Tensor]()

    def closure() -> None:
        seen.append(x.detach().clone())
        x.grad = torch.full_like(x, size)

    SAM(torch.optim.SGD([x], lr=LR), rho=0.25).gradient(closure)
    want = 0.25 / 256 if size else 0.0
    assert [set(at.tolist()) for at in seen] == [{0.0}, {want}]
    assert not x.any()


@pytest.mark.parametrize("rho", [0.0, -1.0, float("nan"), float("inf")])
def test_no_rho_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="is not allowed; use a number above 0, or the optimizer without SAM"):
        SAM(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR), rho=rho)


@pytest.mark.parametrize("recipe", ["dfedsam", "dfedsam_mgs"])
def test_a_recipe_with_sam_needs_it(recipe: str) -> None:
    model = problem(2).model(0)
    with pytest.raises(ValueError, match=r"takes its gradients by SAM: give join dtrain.optim.SAM\(optimizer, rho=0.01\)"):
        dtrain.join(model, torch.optim.SGD(model.parameters(), lr=LR), recipe=recipe, link=connect_local(2)[0])
    with pytest.raises(ValueError, match=r"train\.sam_rho = 0 takes SAM from"):
        rho_of(RECIPES[recipe], 0.0)
    assert (rho_of(RECIPES[recipe], None), rho_of(RECIPES[recipe], 0.2)) == (0.01, 0.2)
    assert (rho_of(RECIPES["dpsgd"], None), rho_of(RECIPES["dpsgd"], 0.2)) == (0.0, 0.2)

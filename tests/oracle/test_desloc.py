"""Does DES-LOC average parameters and both of Adam's moments, each at its own rounds, and nothing else?

The rendering is plain torch with torch's own AdamW. With 2 or 4 islands products by 1/n are exact and the sums have one order:
there dtrain must agree to the bit."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.assemble import assemble
from dtrain.config import parse_job
from dtrain.connect import Connection, connect_local
from dtrain.launch.checks import check_answers
from dtrain.optim import AccumAdamW
from dtrain.plan.candidates import candidates
from dtrain.plan.sent import sent
from dtrain.recipe_fits import check_ranks
from dtrain.recipes import RECIPES, resolve
from dtrain.virtual import Simulation
from dtrain.virtual_link import LinkModel, VirtualLink
from dtrain.virtual_problem import Consensus
from dtrain.wire import HEADER_BYTES
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, WIDTH, Problem, problem
from tests.oracle.test_gossip import U

EVERY, STEPS = 2, 15
SAID = "2:3"
"""Parameters after every 2nd step, u after every 4th, v after every 6th."""
LR = 0.01


class Seen(NamedTuple):
    x: Tensor
    u: Tensor
    v: Tensor


def moments_of(model: Quadratic, optimizer: torch.optim.Optimizer) -> Seen:
    def both(name: str) -> Tensor:
        return torch.cat([optimizer.state[p][name].reshape(-1) for p in (model.left, model.right)])

    return Seen(model.flat(), both("exp_avg").clone(), both("exp_avg_sq").clone())


def paper(p: Problem, n: int) -> list[list[Seen]]:
    """By step, by island."""
    models = [Quadratic(p.start, p.a[i], p.c[i], CUT) for i in range(n)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=LR) for m in models]
    theta = p.start.clone()
    seen = []
    for t in range(1, STEPS + 1):
        for m, o in zip(models, optimizers, strict=True):
            sgd_step(m, o)
        if t % EVERY == 0:
            theta = theta - sum(((theta - m.flat()) / n for m in models), torch.zeros(WIDTH))
            for m in models:
                m.set_flat(theta)
        for name, period in (("exp_avg", 2 * EVERY), ("exp_avg_sq", 3 * EVERY)):
            for tensors in zip(*(m.parameters() for m in models), strict=True) if t % period == 0 else ():
                each = [o.state[x][name] for o, x in zip(optimizers, tensors, strict=True)]
                mean = sum((s / n for s in each), torch.zeros_like(each[0]))
                for s in each:
                    s.copy_(mean)
        seen.append([moments_of(m, o) for m, o in zip(models, optimizers, strict=True)])
    return seen


def islands_of_dtrain(p: Problem, n: int, steps: int, *, lr: float = LR, **axes: Any) -> list[list[Seen]]:
    """By step, by island."""

    def island(connection: Connection) -> list[Seen]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        seen = []
        with dtrain.join(model, optimizer, recipe="desloc", every=EVERY, moments=SAID, link=connection, **axes):
            for _ in range(steps):
                sgd_step(model, optimizer)
                seen.append(moments_of(model, optimizer))
        return seen

    return [list(at) for at in zip(*run_islands(n, island), strict=True)]


@pytest.mark.parametrize("reduce", ["all_to_all", "gather"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_it_is_its_paper_to_the_bit(n: int, reduce: str) -> None:
    """Over buckets that cut both parameters."""
    p = problem(n)
    want = paper(p, n)
    for got, at in zip(islands_of_dtrain(p, n, STEPS, reduce=reduce, bucket_bytes=256), want, strict=True):
        for one, two in zip(got, at, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    if n > 1:
        equal = [tuple(torch.equal(a, b) for a, b in zip(at[0], at[1], strict=True)) for at in want]
        assert equal == [(t % 2 == 0, t % 4 == 0, t % 6 == 0) for t in range(1, STEPS + 1)]


def test_moments_are_not_coded_with_the_parameters() -> None:
    """With a learning rate of 0, u = (1 - b1^t) g: it and v are means in fp32, whatever a codec makes of parameters."""
    n = 3
    p = problem(n)
    got = islands_of_dtrain(p, n, 6, lr=0.0, codec="int4:64", error_feedback=True)[-1]
    g = (p.a * (p.start - p.c)).double()
    # Adam rounds a moment 3 times a step, each relative to values up to the largest gradient; a mean n times more. The first
    # averages came after 4 steps, and two more steps took the islands apart again.
    M = float(g.abs().max())
    v = (1 - 0.999**6) * g.square().mean(dim=0)
    u4, u = (1 - 0.9**4) * g.mean(dim=0), None
    for node in range(n):
        u = 0.9**2 * u4 + (1 - 0.9**2) * g[node]
        assert float((got[node].u - u).abs().max()) <= 40 * U * M
        assert float((got[node].v - v).abs().max()) <= 40 * U * M**2
        assert (got[node].v >= 0).all()


@pytest.mark.parametrize(("at", "delay"), [(4, 0), (7, 0), (10, 0), (4, 2), (7, 2)])
def test_a_resume_knows_which_round_is_next(at: int, delay: int) -> None:
    """In new objects, saved after a round of u, and between rounds; with a delay while one of u or v is in flight."""
    p, n = problem(2), 2
    axes = {"every": EVERY, "moments": SAID, "delay": delay}

    def run(first: int, last: int, saved: list[Any] | None) -> list[Any]:
        def island(connection: Connection) -> Any:
            model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
            with dtrain.join(model, optimizer, recipe="desloc", link=connection, **axes) as sync:
                if saved is not None:
                    x, inner, state = saved[connection.node]
                    model.set_flat(x)
                    optimizer.load_state_dict(inner)
                    sync.load_state_dict(state)
                for _ in range(first, last):
                    sgd_step(model, optimizer)
                state = {k: v.clone() for k, v in sync.state_dict().items() if not k.startswith("counts")}
                return model.flat().clone(), copy.deepcopy(optimizer.state_dict()), state

        return run_islands(n, island)

    for (x, inner, state), (y, other, again) in zip(run(0, 13, None), run(at, 13, run(0, at, None)), strict=True):
        assert torch.equal(x, y)
        for k in inner["state"]:
            assert all(torch.equal(v, other["state"][k][name]) for name, v in inner["state"][k].items())
        assert all(torch.equal(v, again[key]) for key, v in state.items())


def test_a_moment_that_was_never_made_is_zero_and_stays_unmade() -> None:
    """Island 1 never uses ``right``: the mean has 0 for it."""
    p = problem(2)

    def island(connection: Connection) -> Any:
        model = Quadratic(p.start, p.a[0], p.c[0], CUT)
        model.right.requires_grad_(True)
        optimizer = AccumAdamW(model.parameters(), lr=0.0)
        seen = []
        with dtrain.join(model, optimizer, recipe="desloc", every=1, moments="2:2", link=connection):
            for _ in range(2):
                optimizer.zero_grad()
                model().backward()
                if connection.node == 1:
                    model.right.grad = None
                optimizer.step()
                state = optimizer.state[model.right]
                seen.append(state["exp_avg"].clone() if "exp_avg" in state else None)
        return seen

    (before, after), unmade = run_islands(2, island)
    assert unmade == [None, None]
    g = p.a[0, CUT:] * (p.start[CUT:] - p.c[0, CUT:])
    # AccumAdamW keeps u decayed already: b1 (1 - b1) g after a step.
    assert torch.allclose(before, 0.9 * 0.1 * g, rtol=1e-5, atol=1e-7)
    assert torch.allclose(after, 0.5 * 0.9 * (0.9 * 0.1 + 0.1) * g, rtol=1e-5, atol=1e-7)


def test_the_plan_counts_a_third_and_a_sixth_more() -> None:
    """What islands count themselves: test_plan_sent. Two rooms of 4 bytes an element beside fedavg's, and a word a bucket."""
    shapes = {"a": (300, 70), "b": (130,)}
    plain, found = (sent(resolve(name, {}, 4), shapes, 4) for name in ("fedavg", "desloc"))
    assert found.mean_round_bytes == 1.5 * plain.mean_round_bytes
    each = [e.sent_bytes / plain.period[0].sent_bytes for e in found.period]
    assert each == [1, 1, 2, 1, 1, 3]
    assert found.state_bytes == plain.state_bytes + 8 * (300 * 70 + 130) + 16 * len(found.period[0].rounds)
    assert found.wire_bytes >= plain.wire_bytes


BAD: list[tuple[dict[str, Any], str]] = [
    ({"moments": "3"}, "moments = '3' is not allowed; use two multiples of every, 1 or more, as \"3:6\""),
    ({"moments": "0:6"}, "moments = '0:6' is not allowed"),
    ({"moments": "3:x"}, "moments = '3:x' is not allowed"),
    ({"moments": 3}, "moments = '3' is not allowed"),
    ({"delay": 51}, "sync.delay = 51 is longer than sync.every = 50"),
    ({"landing": "eager"}, "sync.landing = 'eager' has no effect"),
    ({"outer": "nesterov"}, "sync.outer = 'nesterov' has no effect"),
]


@pytest.mark.parametrize(("axes", "said"), BAD)
def test_what_does_not_fit_is_one_line(axes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        resolve("desloc", axes, 4)
    assert said in str(caught.value)


def test_other_recipes_have_no_moments_and_islands_one_rank() -> None:
    with pytest.raises(ValueError, match=r"sync.moments = '3:6' has no effect with sync.algorithm = \"diloco\""):
        resolve("diloco", {"moments": "3:6"}, 4)
    check_ranks(RECIPES["desloc"], 1)
    with pytest.raises(ValueError, match=r'^islands.ranks = 2: sync.recipe = "desloc" averages the moments of one rank'):
        check_ranks(RECIPES["desloc"], 2)


def test_it_is_no_candidate_of_a_job_with_several_ranks() -> None:
    one, two = ({r.name for r in candidates(RECIPES["local"], 2, num_ranks=ranks)} for ranks in (1, 2))
    assert one - two == {"desloc", "decoupled_diloco"}, "and that one's quorum is of islands of one rank"


def test_a_simulation_by_plain_sgd_refuses_it() -> None:
    job = parse_job({"sync": {"recipe": "desloc"}, "sim": {"problem": "quadratic"}})
    with pytest.raises(ValueError, match=r'"desloc" is defined with AdamW; use sync.recipe = "fedavg"$'):
        check_answers(job, "sim")


def test_a_virtual_clock_sends_them_too() -> None:
    """12 steps are 6 rounds; u goes with three of them and v with two: 11 wires to each of two others."""
    recipe, link = resolve("desloc", {"every": EVERY, "moments": SAID, "reduce": "gather"}, 3), VirtualLink(LinkModel(), 3, 0)
    simulation = Simulation(
        assemble(recipe, 0, 3), 3, [("x", (50,))], Consensus(50, 0), lr=0.0, link=link, compute_s=lambda node: 1.0
    )
    simulation.run(12)
    assert [account.wire_bytes_received for account in simulation.accounts] == [2 * 11 * (4 * 50 + HEADER_BYTES)] * 3


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "SGD, which steps parameter a, has none; use torch.optim.AdamW"),
        (lambda m: torch.optim.AdamW([m.a], lr=0.1), "no optimizer that dtrain.join was given has parameter b"),
        (lambda m: [], "no optimizer that dtrain.join was given has parameter a; give join all"),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "amsgrad keeps a third, the largest that v was"),
        (lambda m: [torch.optim.AdamW([m.a]), torch.optim.SGD([m.b], lr=0.1)], "SGD, which steps parameter b"),
    ],
)
def test_a_loop_without_adams_moments_is_refused(make: Any, said: str) -> None:
    model = _Two()
    with pytest.raises(ValueError, match=r"^recipe 'desloc' averages Adam's [^\n]*$") as caught:
        dtrain.join(model, make(model), recipe="desloc", link=connect_local(1)[0])
    assert said in str(caught.value)

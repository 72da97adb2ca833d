"""Do a near level of gossip and a far outer loop, in flight together, move the parameters as both papers say?

Four islands are two groups, and the renderings are plain torch in float64 on one vector an island."""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

import dtrain
from dtrain import engine
from dtrain.connect import Connection
from dtrain.core import Core
from dtrain.engine import Sync
from dtrain.fused import FusedSteps
from dtrain.optim import AccumAdamW
from dtrain.transport.base import ROUND, Left, Tag, Transport, nobody
from dtrain.transport.c10d import GlooTransport
from dtrain.wire import HEADER_BYTES
from tests.islands import Quadratic, run_islands, sgd_step

N, GROUP, CUT, WIDTH, LR = 4, 2, 70, 153, 0.125
U = 2.0**-24
"""Unit roundoff of fp32."""
LEFT, RIGHT = CUT, WIDTH - CUT


class Problem(NamedTuple):
    start: Tensor
    a: Tensor
    c: Tensor


class Case(NamedTuple):
    near: int
    """Steps that a near round flies."""
    landing: str
    far: int
    every: int = 5
    steps: int = 24
    lr: float = 0.4
    momentum: float = 0.5


CASES = [
    *(Case(near, "keep", far) for near in (0, 1) for far in (0, 2, 5 - near)),
    *(Case(near, landing, 5) for near in (0, 1) for landing in ("eager", "pure")),
    Case(1, "eager", 2),
]


def problem(seed: int = 1) -> Problem:
    """0 < lr a <= 1/4, so that an inner step makes no difference larger."""
    g = torch.Generator().manual_seed(seed)
    start, a, c = torch.rand(WIDTH, generator=g), torch.rand(N, WIDTH, generator=g), torch.rand(N, WIDTH, generator=g)
    return Problem(2 * start - 1, 0.25 + 1.75 * a, 2 * c - 1)


def levels_of(case: Case, **near: Any) -> list[dict[str, Any]]:
    far = {"recipe": "diloco", "codec": "identity", "error_feedback": False, "every": case.every, "delay": case.far}
    far |= {"landing": case.landing, "outer_lr": case.lr, "outer_momentum": case.momentum}
    return [{"recipe": "dpsgd", "islands": GROUP, "delay": case.near, **near}, far]


def joined(connection: Connection, levels: list[dict[str, Any]], model: Quadratic, optimizer: Any, **said: Any) -> Sync:
    """As a script of a job file with these levels joins."""
    return dtrain.join(model, optimizer, link=replace(connection, job_axes={"level": levels}), **said)


def islands_of_dtrain(
    p: Problem, levels: list[dict[str, Any]], steps: int, moved: Callable[[int, Quadratic], None] = lambda node, model: None
) -> Tensor:
    """(steps + 1, n, width): x after each step, and after the drain. ``moved`` changes a model after it has joined."""

    def island(connection: Connection) -> Tensor:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with joined(connection, levels, model, optimizer):
            moved(connection.node, model)
            for _ in range(steps):
                sgd_step(model, optimizer)
                seen.append(model.flat())
        return torch.stack([*seen, model.flat()])

    return torch.stack(run_islands(N, island), dim=1)


class Loop:
    """The outer loop: deltas are of all islands alike, whatever their group."""

    def __init__(self, case: Case, x: Tensor) -> None:
        self.case, self.theta, self.u = case, x.clone(), torch.zeros_like(x)
        self.own = self.late = self.mean = torch.zeros_like(x)
        self.sent, self.begun, self.first = x, x.clone(), True

    def outer(self, g: Tensor) -> None:
        self.u = self.case.momentum * self.u + g
        self.theta = self.theta - self.case.lr * (g + self.case.momentum * self.u)

    def send(self, x: Tensor) -> Tensor:
        if self.case.landing == "pure":
            if not self.first:
                self.outer(self.mean)
            delta, self.mean = self.begun - x, (self.begun - x).mean(0, keepdim=True).expand_as(x)
            x = x + 0 * delta if self.first else self.theta
            self.begun, self.first = x, False
            return x
        self.own, self.sent = self.theta - x, x
        self.mean = self.own.mean(0, keepdim=True).expand_as(x)
        if self.case.landing == "eager":
            self.outer(self.own / N + self.late)
            return self.theta
        return x

    def land(self, x: Tensor) -> Tensor:
        if self.case.landing == "eager":
            self.late = self.mean - self.own / N
        if self.case.landing == "keep":
            self.outer(self.mean)
            return x - self.sent + self.theta
        return x


def paper(p: Problem, case: Case, mixes: bool = True) -> Tensor:
    """Gossip X <- W X of each group's islands beneath the outer loop; what lands was sent ``delay`` steps before."""
    w = torch.block_diag(*[torch.full((GROUP, GROUP), 1 / GROUP)] * (N // GROUP)).double() if mixes else torch.eye(N).double()
    x = p.start.double().expand(N, WIDTH).clone()
    loop, seen, near, lands = Loop(case, x), [], torch.zeros_like(x), 0

    def far(x: Tensor) -> Tensor:
        x = loop.send(x)
        return loop.land(x) if case.far == 0 else x

    for t in range(1, case.steps + 1):
        g = p.a.double() * (x - p.c.double())
        if case.near:
            x = x + near
        if case.far and t == lands:
            x = loop.land(x)
        x = x - LR * g
        if case.near == 0:
            x = w @ x
        if t % case.every == 0:
            x, lands = far(x), t + case.far
        near = (w - torch.eye(N).double()) @ x
        seen.append(x)
    x = x + near if case.near else x
    return torch.stack([*seen, loop.land(x) if case.far and lands > case.steps else x])


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"near{c.near}-{c.landing}{c.far}")
def test_both_levels_follow_the_plain_rendering(case: Case) -> None:
    """A step rounds each number ten times at most, all below 4 here. No part of a step makes an error larger but the outer one,
    by less than (1 + lr (1 + mu))^2 < 3 in each of four rounds' spans, which the mean of islands alone has in full."""
    p = problem()
    got, want = islands_of_dtrain(p, levels_of(case), case.steps), paper(p, case)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=10 * 4 * case.steps * 3 * U)
    assert float((want[-2] - paper(p, case, mixes=False)[-2]).abs().max()) > 0.01, "the near level is seen"
    assert float((want[-2] - paper(p, case._replace(lr=1e-9))[-2]).abs().max()) > 0.01, "and the far one"


@pytest.mark.parametrize("landing", ["keep", "eager", "pure"])
def test_islands_that_were_pushed_apart_come_together_and_their_mean_goes_its_way(landing: str) -> None:
    """One quadratic on all islands, so that the mean is one island's own outer loop, whatever is mixed, and disagreement has no
    source: beneath a far round every 5th step it is gone."""
    a, c = problem().a[:1].expand(N, WIDTH), problem().c[:1].expand(N, WIDTH)
    p, case = Problem(problem().start, a, c), Case(1, landing, 5 if landing != "keep" else 4, steps=200)
    push = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(5))
    push -= push.mean(0)
    seen = islands_of_dtrain(p, levels_of(case), case.steps, lambda node, model: model.set_flat(model.flat() + push[node]))
    torch.testing.assert_close(seen.double().mean(1), paper(p, case).mean(1), rtol=0, atol=1e-4)
    apart = (seen - seen.mean(1, keepdim=True)).square().sum((1, 2)).sqrt()
    assert float(apart[0]) > 1
    assert float(apart[-2]) < 1e-4
    assert all(float(later) < 1.2 * float(apart[0]) for later in apart)


@pytest.fixture
def fused_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose near rounds began in the optimizer's own pass, of all islands."""
    steps: list[int] = []
    start = Core.start_fused

    def counted(self: Core, lane: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        steps.append(step)
        return start(self, lane, step, *args, **kwargs)

    monkeypatch.setattr(Core, "start_fused", counted)
    return steps


@pytest.mark.parametrize("case", [Case(1, "keep", 2), Case(1, "keep", 0), Case(1, "eager", 5), Case(1, "pure", 5)])
def test_one_pass_and_its_parts_agree_beneath_an_outer_loop(
    case: Case, fused_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far rounds land before the pass and start after it; where one takes the parameters' place, the step is done in parts."""
    p = problem()

    def run(connection: Connection) -> tuple[bool, Tensor]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = AccumAdamW(model.parameters(), lr=0.01, every=1)
        with joined(connection, levels_of(case), model, optimizer, clip=1.0) as sync:
            for _ in range(case.steps):
                sgd_step(model, optimizer)
            return isinstance(sync._fused, FusedSteps), model.flat()

    one = run_islands(N, run)
    assert all(fused for fused, _ in one)
    far = {t for t in range(1, case.steps + 1) if t % case.every == 0}
    alone = far if case.landing != "keep" or case.far == 0 else set[int]()
    assert set(fused_steps) == set(range(1, case.steps + 1)) - alone
    monkeypatch.setattr(engine, "fused_steps", lambda *args: None)
    for (_, x), (_, y) in zip(one, run_islands(N, run), strict=True):
        # Another order of the same sums; AdamW's steps are not longer than 0.01 each, whatever it is told.
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)


def test_each_link_carries_what_is_said_and_each_island_owns_half() -> None:
    """Two far buckets, one a parameter: the odd places of the groups own the left one, the even ones the right one. Between two
    groups all-to-all sends the other group its part, and both the mean of its own."""
    steps, every = 12, 5
    case, h = Case(1, "keep", 2, every=every, steps=steps), HEADER_BYTES
    levels = levels_of(case)
    levels[1] |= {"bucket_bytes": 4, "codec": "int8:64"}
    p = problem()

    def island(connection: Connection) -> tuple[int, int]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with joined(connection, levels, model, optimizer) as sync:
            for _ in range(steps):
                sgd_step(model, optimizer)
            sync.settle()
            stats = sync.stats()
            assert stats.wire_bytes_sent == stats.wire_bytes_sent_near + stats.wire_bytes_sent_far
            return stats.wire_bytes_sent_near, stats.wire_bytes_sent_far

    gossip, rounds = h + 4 * WIDTH, steps // every
    both = (h + 4 * LEFT) + (h + 4 * RIGHT)  # one up as a member, one down as an owner

    def int8(numel: int) -> int:
        """A byte each, and a scale of two for each block."""
        return h + numel + 2 * -(-numel // 64)

    for node, (sent_near, sent_far) in enumerate(run_islands(N, island)):
        owns = LEFT if node % GROUP == 1 else RIGHT
        assert sent_near == steps * gossip + rounds * both
        parts = cuts(owns)
        assert sent_far == rounds * (int8(parts[1 - node // GROUP]) + int8(parts[node // GROUP]))


def cuts(numel: int) -> tuple[int, int]:
    """In whole blocks of 64, as nearly in half as it goes."""
    first = min(numel, (numel // 2 + 32) // 64 * 64)
    return first, numel - first


@pytest.mark.parametrize("case", [Case(1, "keep", 4), Case(1, "eager", 5), Case(1, "pure", 5), Case(0, "keep", 3)])
def test_a_run_that_is_resumed_with_both_levels_in_flight_is_the_same_to_the_bit(case: Case) -> None:
    save_at, p = 2 * case.every + 1, problem()
    levels = levels_of(case, codec="int8:64")
    levels[1] |= {"codec": "int4:64", "error_feedback": True}

    def model_of(connection: Connection) -> tuple[Quadratic, torch.optim.Optimizer]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        return model, torch.optim.SGD(model.parameters(), lr=LR)

    def whole(connection: Connection) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        model, optimizer = model_of(connection)
        with joined(connection, levels, model, optimizer) as sync:
            for _ in range(save_at):
                sgd_step(model, optimizer)
            at, state = model.flat(), {k: v.clone() for k, v in sync.state_dict().items()}
            for _ in range(save_at, case.steps):
                sgd_step(model, optimizer)
        return model.flat(), at, state

    runs = run_islands(N, whole)
    states = [state for *_, state in runs]
    flying = {key.split(".")[0] for key, value in states[0].items() if key.endswith("land_step") and int(value) > save_at}
    assert flying == ({"near", "far"} if case.near else {"far"})
    # Who owns no part of a bucket has no residual of it.
    assert ["residual" in " ".join(state) for state in states] == [False, True, False, True]

    def again(connection: Connection) -> Tensor:
        model, optimizer = model_of(connection)
        with joined(connection, levels, model, optimizer) as sync:
            model.set_flat(runs[connection.node][1])
            sync.load_state_dict(states[connection.node])
            for _ in range(case.steps - save_at):
                sgd_step(model, optimizer)
        return model.flat()

    assert all(torch.equal(x, y) for x, (y, *_) in zip(run_islands(N, again), runs, strict=True))


def test_a_state_of_one_level_is_not_taken_for_one_of_two() -> None:
    p, case = problem(), Case(1, "keep", 2)

    def island(connection: Connection) -> str:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        with joined(connection, levels_of(case), model, torch.optim.SGD(model.parameters(), lr=LR)) as sync:
            own = sync.state_dict()
            flat = {k.removeprefix("far."): v for k, v in own.items()}
            with pytest.raises(ValueError, match="the saved state is of another recipe, model or number of ranks") as caught:
                sync.load_state_dict(flat)
        return str(caught.value)

    assert all("has shape none there" in said for said in run_islands(N, island))


def test_a_loop_says_no_answer_of_two_levels_itself_and_may_have_another_recipe() -> None:
    p, case = problem(), Case(1, "keep", 2)

    def island(connection: Connection) -> str:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with pytest.raises(ValueError, match=r"sync\.every = 3 beside \[\[sync\.level\]\]: of which level\?"):
            joined(connection, levels_of(case), model, optimizer, every=3)
        with joined(connection, levels_of(case), model, optimizer, recipe="fedavg", every=3) as sync:
            return sync.recipe.title

    assert run_islands(N, island) == ["fedavg"] * N


def test_a_near_level_that_averages_gradients_keeps_its_groups_equal() -> None:
    """All-reduce within groups, in time, beneath the outer loop: two islands of twice the batch."""
    p, case = problem(), Case(0, "keep", 2)
    halves = Problem(p.start, p.a.view(2, 2, -1).mean(1), (p.a * p.c).view(2, 2, -1).mean(1) / p.a.view(2, 2, -1).mean(1))
    seen = islands_of_dtrain(p, [{"recipe": "allreduce", "islands": GROUP}, levels_of(case)[1]], case.steps)
    assert torch.equal(seen[:, 0], seen[:, 1])
    assert torch.equal(seen[:, 2], seen[:, 3])
    doubled = Problem(p.start, halves.a.repeat_interleave(2, 0), halves.c.repeat_interleave(2, 0))
    torch.testing.assert_close(seen.double(), paper(doubled, case, mixes=False), rtol=0, atol=10 * 4 * case.steps * 3 * U)


class Held:
    """A transport whose rounds' wires to other groups leave when they are let go."""

    def __init__(self, inner: Transport, group: Container[int]) -> None:
        self.inbox, self.wires_on = inner.inbox, inner.wires_on
        self._inner, self._group = inner, group
        self._held: list[tuple[int, Tag, Tensor]] | None = []
        self._lock = threading.Lock()

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        with self._lock:
            if self._held is not None and tag.kind == ROUND and peer not in self._group:
                self._held.append((peer, tag, wire))
                return
        self._inner.post(peer, tag, wire)

    def let_go(self) -> None:
        with self._lock:
            held, self._held = self._held or [], None
        for wire in held:
            self._inner.post(*wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        self._inner.expect(peer, tag, wire_bytes)

    def forget(self, peer: int, tag: Tag) -> None:
        self._inner.forget(peer, tag)

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        self._inner.close(drain_s=drain_s, left=left)


def test_over_gloo_near_rounds_land_while_a_far_one_flies_however_long() -> None:
    """No wire of the far round leaves before the last step of its flight, and followers have expected its result since it began:
    near rounds land in each step between all the same. All is as where wires come at once."""
    p, case, store = problem(), Case(1, "keep", 4, steps=12), HashStore()
    levels = levels_of(case)
    levels[1]["bucket_bytes"] = 4  # both places own one of two buckets, and follow in the other

    def island(connection: Connection) -> Tensor:
        node = connection.node
        gloo = GlooTransport(store, "levels", node, N, interface="lo", connect_s=20.0)
        held = Held(gloo, range(node - node % GROUP, node - node % GROUP + GROUP))
        model = Quadratic(p.start, p.a[node], p.c[node], CUT)
        optimizer, seen = torch.optim.SGD(model.parameters(), lr=LR), list[Tensor]()
        with joined(replace(connection, transport=held), levels, model, optimizer):
            for step in range(1, case.steps + 1):
                sgd_step(model, optimizer)
                seen.append(model.flat())
                if step == case.every + case.far - 1:
                    held.let_go()
        return torch.stack([*seen, model.flat()])

    over_gloo = torch.stack(run_islands(N, island, timeout_s=20.0), dim=1)
    assert torch.equal(over_gloo, islands_of_dtrain(p, levels, case.steps))

"""Does a round that has a quorum go on without a slow or lost island, do all land the same, and is nothing of what the slow one
learned lost?

Islands are threads here, and one is held by an event before it has launched what the others launch: so it is no member."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.config import parse_job
from dtrain.connect import Connection
from dtrain.engine import Sync
from dtrain.errors import PeerLost
from dtrain.launch.checks import How, check_answers
from dtrain.quorum import MOST_MISSED
from dtrain.recipes import RECIPES, resolve
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, LR, Problem, Settings, U, bound, islands_of_dtrain, problem, size_of

N, SLOW, LONG_S = 4, 2, 60.0
LONGEST = f"{LONG_S / 2:g}s"
"""A grace may last for half of the time after which an island is lost, run_islands' limit."""
ALL, OTHERS = frozenset(range(N)), frozenset({0, 1, 3})
AXES: dict[str, Any] = {"recipe": "diloco", "reduce": "gather", "quorum": 3, "outer_lr": 0.5, "outer_momentum": 0.5}
Members = Callable[[int], frozenset[int]]


def paper(
    p: Problem, s: Settings, delay: int, members: Members, nodes: frozenset[int] = ALL, *, feedback: bool = False
) -> Tensor:
    """(steps, n, width), fp64: x after each step. Who is no member keeps its progress, in x, or in what its feedback kept."""
    theta, u = p.start.double(), torch.zeros_like(p.start).double()
    x, e = [theta.clone() for _ in range(N)], [torch.zeros_like(theta) for _ in range(N)]
    seen, flight = [], None
    for t in range(1, s.steps + 1):
        steps = [LR * a * (x_i - c) for x_i, a, c in zip(x, p.a.double(), p.c.double(), strict=True)]
        if flight is not None and t == flight[0] + delay:
            at, sent, kept = flight
            delta = torch.stack([theta - sent[i] + kept[i] for i in members(at)]).mean(dim=0)
            old, u = theta, s.outer_momentum * u + delta
            theta = theta - s.outer_lr * (delta + s.outer_momentum * u)
            for i in nodes:
                stays = i not in members(at) and not feedback
                e[i] = kept[i] + old - sent[i] if i not in members(at) and feedback else torch.zeros_like(theta)
                x[i] = theta + x[i] - (old if stays else sent[i])
        x = [x_i - g for x_i, g in zip(x, steps, strict=True)]
        if t % s.every == 0:
            flight = (t, list(x), list(e))
        seen.append(torch.stack(x))
    return torch.stack(seen)


class Island:
    """One of four, and what it saw after each step."""

    def __init__(self, connection: Connection, p: Problem, **axes: Any) -> None:
        self.node = connection.node
        self.inbox = connection.transport.inbox
        self.model = Quadratic(p.start, p.a[self.node], p.c[self.node], CUT)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.sync: Sync = dtrain.join(self.model, self.optimizer, link=connection, bucket_bytes=4 * CUT, **{**AXES, **axes})
        self.seen, self.anchors, self.members = list[Tensor](), list[Tensor](), dict[int, frozenset[int] | None]()

    def steps_to(self, last: int) -> None:
        while self.sync.step < last:
            flying = [lane.flight for lane in self.sync.core.in_flight() if lane.flight is not None]
            sgd_step(self.model, self.optimizer)
            self.members |= {f.step: f.link.members for f in flying if f.done}
            self.seen.append(self.model.flat())
            self.anchors.append(torch.cat([lane.state["anchor"] for lane in self.sync.core.lanes]).clone())

    def counts(self) -> tuple[int | None, int | None]:
        """Rounds with it, and without it, as it counts them."""
        stats = self.sync.stats()
        return stats.rounds_joined, stats.rounds_left_out


@pytest.mark.parametrize("feedback", [False, True])
def test_others_go_on_without_an_island_that_is_held_and_what_it_learned_comes_with_its_next_round(feedback: bool) -> None:
    """Three rounds are without it, and it has done no step before they have landed; the fourth is of all."""
    s, p, delay = Settings(every=4, steps=19, outer_lr=0.5, outer_momentum=0.5), problem(N), 2
    held, caught_up, launched = (threading.Barrier(N) for _ in range(3))

    def island(connection: Connection) -> Island:
        one = Island(connection, p, every=s.every, delay=delay, codec="identity", error_feedback=feedback)
        with one.sync:
            if one.node != SLOW:
                one.steps_to(15)
            held.wait(LONG_S)
            one.steps_to(15)
            caught_up.wait(LONG_S)
            one.steps_to(16)
            launched.wait(LONG_S)  # so that all wires are here before anybody needs the round
            one.steps_to(s.steps)
        return one

    got = run_islands(N, island)
    want = paper(p, s, delay, lambda step: OTHERS if step < 16 else ALL, feedback=feedback)
    # In the last round the mean is of three islands that rounded for a round and of one that did for four: (3 + 4) / 4.
    limit = bound(s, size_of(want, p), gain=1.75) + 3 * s.every * 8 * U * size_of(want, p)
    assert limit < 1e-3
    for one in got:
        assert one.members == {4: OTHERS, 8: OTHERS, 12: OTHERS, 16: ALL}
        assert one.counts() == ((1, 3) if one.node == SLOW else (4, 0)), "of each round one, though it is of several buckets"
        assert all(torch.equal(a, b) for a, b in zip(one.anchors, got[0].anchors, strict=True))
        assert float((torch.stack(one.seen).double() - want[:, one.node]).abs().max()) <= limit
        assert (one.inbox._wires, one.inbox._unwanted) == ({}, set()), "late wires are thrown away"
    lost = paper(p, s, delay, lambda step: OTHERS, feedback=feedback)
    assert float((want[-1, 0] - lost[-1, 0]).abs().max()) > 100 * limit, "it matters"


@pytest.mark.parametrize("delay", [0, 2])
def test_with_all_islands_in_time_it_is_what_it_is_without_a_quorum_to_the_bit(delay: int) -> None:
    p, axes = problem(N), {**AXES, "every": 4, "delay": delay}
    got = islands_of_dtrain(p, N, 15, **{**axes, "grace": LONGEST})
    assert torch.equal(got, islands_of_dtrain(p, N, 15, **{**axes, "quorum": "100%"}))


@pytest.mark.parametrize(("grace", "without"), [("0s", MOST_MISSED), (LONGEST, 0)])
def test_a_slow_island_is_waited_for_after_a_few_rounds_without_it_and_as_long_as_the_grace_lasts(
    grace: str, without: int
) -> None:
    """It goes on when another has said, where it is to land the first round that is of all, that it waits for it."""
    waited = threading.Event()

    def island(connection: Connection) -> Island:
        def on_wait(missing: tuple[int, ...], waited_s: float, limit_s: float) -> None:
            if missing == (SLOW,) and one.sync.step == 2 * without + 2:
                waited.set()

        one = Island(replace(connection, on_wait=on_wait), problem(N), every=2, delay=1, grace=grace)
        with one.sync:
            if one.node == SLOW:
                assert waited.wait(LONG_S)
            one.steps_to(2 * without + 3)
        return one

    for one in run_islands(N, island):
        assert one.members == {2 * k: OTHERS if k <= without else ALL for k in range(1, without + 2)}
        assert one.counts() == ((1, without) if one.node == SLOW else (without + 1, 0))


@pytest.mark.parametrize("failed", [False, True], ids=["ended", "failed"])
def test_without_an_island_that_is_gone_the_others_go_on_as_long_as_there_is_a_quorum(failed: bool) -> None:
    s = Settings(every=2, steps=2 * MOST_MISSED + 5, outer_lr=0.5, outer_momentum=0.5)
    p = problem(N)

    def island(connection: Connection) -> Island:
        one = Island(connection, p, every=s.every, delay=1)
        if one.node == SLOW:
            one.sync.close(failed=failed)
            return one
        with one.sync:
            one.steps_to(s.steps)
        return one

    want = paper(p, s, 1, lambda step: OTHERS, OTHERS)
    for one in run_islands(N, island):
        if one.node != SLOW:
            assert one.members == dict.fromkeys(range(2, s.steps, 2), OTHERS)
            assert float((torch.stack(one.seen).double() - want[:, one.node]).abs().max()) <= bound(s, size_of(want, p), gain=1.0)


@pytest.mark.parametrize("failed", [False, True], ids=["ended", "failed"])
def test_without_a_quorum_it_is_as_ever(failed: bool) -> None:
    """Of who ended, rounds are dropped; who failed ends the others, naming itself."""

    def island(connection: Connection) -> str:
        one = Island(connection, problem(N), every=2, delay=1)
        if one.node >= 2:
            one.sync.close(failed=failed)
            return ""
        try:
            one.steps_to(5)
            one.sync.close()
        except PeerLost as e:
            one.sync.close(failed=True)
            return str(e)
        assert torch.equal(one.anchors[-1], problem(N).start)
        return "went on without further rounds"

    for text in run_islands(N, island)[:2]:
        assert text.startswith("lost island") if failed else text == "went on without further rounds"


def test_a_resume_in_mid_flight_lands_the_members_that_were_decided() -> None:
    p, axes = problem(N), {"every": 4, "delay": 2}
    held, saved = threading.Barrier(N), dict[int, tuple[Tensor, dict[str, Tensor]]]()

    def first(connection: Connection) -> tuple[Tensor, object]:
        one = Island(connection, p, **axes)
        with one.sync:
            for is_late in (False, True):
                if (one.node == SLOW) == is_late:
                    one.steps_to(5)
                    saved[one.node] = (one.model.flat(), {k: v.clone() for k, v in one.sync.state_dict().items()})
                held.wait(LONG_S)
            one.steps_to(7)
        return torch.stack(one.seen[-2:]), one.counts()

    def again(connection: Connection) -> tuple[Tensor, object]:
        one = Island(connection, p, **axes)
        with one.sync:
            x, state = saved[one.node]
            one.model.set_flat(x)
            one.sync.load_state_dict(state)
            one.steps_to(7)
        return torch.stack(one.seen), one.counts()

    whole, resumed = run_islands(N, first), run_islands(N, again)
    want = paper(p, Settings(4, 7, 0.5, 0.5), 2, lambda step: OTHERS)
    for node in range(N):
        assert torch.equal(whole[node][0], resumed[node][0])
        assert whole[node][1] == resumed[node][1] == ((0, 1) if node == SLOW else (1, 0))
        assert float((whole[node][0][-1].double() - want[-1, node]).abs().max()) < 1e-5


def test_a_round_counts_once_also_where_several_fly_at_a_wait() -> None:
    """Two fragments, of which the second's round has started before the first's when all are waited for."""

    def island(connection: Connection) -> Island:
        one = Island(connection, problem(N), every=4, delay=3, fragments=2, grace=LONGEST)
        with one.sync:
            for last in (8, 13):
                one.steps_to(last)
                begun = [lane.flight.step for lane in one.sync.core.in_flight() if lane.flight is not None]
                assert last == 13 or begun[0] > begun[-1], "the order of the lanes is not that of the rounds"
                one.sync.settle()
                assert one.counts() == (len(one.members.keys() | set(begun)), 0)
        return one

    for one in run_islands(N, island):
        assert len(one.members) > 4


def test_without_a_quorum_nothing_is_counted() -> None:
    for one in run_islands(N, lambda connection: Island(connection, problem(N), every=2, quorum="100%")):
        with one.sync:
            assert one.counts() == (None, None)
            assert not [key for key in one.sync.state_dict() if "rounds" in key]


def test_the_row_has_a_quorum_of_a_majority_and_rounds_that_fly() -> None:
    row = RECIPES["decoupled_diloco"]
    assert (row.quorum, row.grace) == ("60%", "0s")
    assert row.delay_steps > 0


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"recipe": "diloco", "quorum": 3}, 'sync.reduce = "all_to_all" cannot: use reduce = "gather", or quorum = "100%"'),
        ({"recipe": "eager_diloco", "quorum": 1}, 'and sync.reduce = "all_to_all" and sync.landing = "eager" cannot: use reduce'),
        ({"recipe": "eager_diloco", "quorum": 1}, 'cannot: use reduce = "gather" and landing = "keep", or quorum = "100%"'),
        ({"recipe": "diloco", "reduce": "gather", "quorum": 5}, "sync.quorum = 5 is more than islands.count = 4; use 4 at most"),
        ({"recipe": "eager_diloco", "reduce": "gather", "quorum": 3}, 'cannot: use landing = "keep", or quorum = "100%"'),
        ({"recipe": "dpsgd", "quorum": 3}, 'sync.quorum = 3 has no effect with sync.algorithm = "dpsgd"; leave it out'),
        ({"recipe": "diloco", "grace": "2s"}, 'sync.grace = \'2s\' has no effect with sync.quorum = "100%"; leave it out'),
        ({"recipe": "decoupled_diloco", "grace": "2 days"}, "'2 days' is not a time; write"),
    ],
)
def test_what_cannot_leave_an_island_out_is_refused(axes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(text)}[^\n]*$"):
        resolve(axes["recipe"], {k: v for k, v in axes.items() if k != "recipe"}, N)


def test_a_grace_is_over_before_who_is_late_is_taken_for_lost() -> None:
    said = r"^sync\.grace = 31 s of link\.timeout_s = 60: .* use a grace of 30 s at most, or a longer timeout$"
    job = {"sync": {"recipe": "decoupled_diloco", "grace": "31s"}, "islands": {"count": 4}, "link": {"timeout_s": 60}}
    with pytest.raises(ValueError, match=said):
        check_answers(parse_job(job), "run")
    check_answers(parse_job(job, ["sync.grace=30s"]), "run")
    check_answers(parse_job(job, ["link.timeout_s=62"]), "run")

    def joins(connection: Connection) -> None:
        with pytest.raises(ValueError, match=said):
            Island(connection, problem(N), every=2, delay=1, grace="31s")

    run_islands(N, joins)


@pytest.mark.parametrize(
    ("how", "changes", "said"),
    [
        ("run", {"islands": {"count": 4, "ranks": 2}}, "islands.ranks = 2: with sync.quorum = '60%'"),
        ("sim", {"islands": {"count": 4}, "sim": {"step_s": 0.1}}, "on a virtual clock each round waits for all"),
        ("sim", {"islands": {"count": 4}, "sim": {"problem": "quadratic"}}, "on a virtual clock each round waits for all"),
    ],
)
def test_where_nobody_can_be_left_out_is_said_before_anything_starts(how: How, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^[^\n]*{re.escape(said)}[^\n]*$"):
        check_answers(parse_job({"sync": {"recipe": "decoupled_diloco"}, **changes}), how)
    check_answers(parse_job({"sync": {"recipe": "decoupled_diloco", "quorum": "100%"}, **changes}), how)

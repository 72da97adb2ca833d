"""Do rounds with participants average those alone that were drawn, give the result to all, and draw all alike?

Each island moves an element of its own, so what lands says whose progress counted, and by how much. Starts, steps and weights
are eighths and halves, which fp32 holds exactly."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.assemble import assemble
from dtrain.connect import Connection
from dtrain.recipes import resolve
from dtrain.wire import HEADER_BYTES
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, LR, U, problem

N, ROUNDS, SEED = 5, 6, 3


class Seen(NamedTuple):
    x: list[Tensor]
    """After each round."""
    sent: list[int]
    """Bytes in each."""
    states: list[dict[str, Tensor]]


def run(n: int, every: int, moves: Any, width: int, speeds: tuple[float, ...] = (), **axes: Any) -> list[Seen]:
    """Each step takes ``moves(node)``, (width), from x."""

    def island(connection: Connection) -> Seen:
        model = Quadratic(torch.zeros(width), torch.ones(width), torch.ones(width), width // 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        cut, gone = width // 2, moves(connection.node)
        xs, sent, states = [], [0], []
        with dtrain.join(
            model, optimizer, recipe="fedavg", every=every, speeds=speeds, seed=SEED, link=connection, reduce="gather", **axes
        ) as sync:
            while sync.step < every * ROUNDS:
                if sync.idle:
                    sync.sit_out()
                else:
                    model.left.grad, model.right.grad = gone[:cut].clone(), gone[cut:].clone()
                    optimizer.step()
                if sync.step % every == 0:
                    xs.append(model.flat())
                    sent.append(sync.stats().wire_bytes_sent)
                    states.append({k: v.clone() for k, v in sync.state_dict().items()})
        return Seen(xs, [b - a for a, b in pairwise(sent)], states)

    return run_islands(n, island)


def drawn(participants: int, index: int, n: int = N) -> list[int]:
    return sorted(random.Random(f"server/{SEED}/{index}").sample(range(n), participants))


@pytest.mark.parametrize("participants", [1, 2, 4])
@pytest.mark.parametrize("speeds", [(), (1.0, 0.5, 1.0, 0.5, 1.0)])
def test_all_take_the_mean_of_those_drawn(participants: int, speeds: tuple[float, ...]) -> None:
    """Of unequal islands each counts by the steps that it trained: n_k / n over those drawn."""
    every, width = 2, 8
    steps = [round(every * v) for v in speeds] or [every] * N
    each = run(N, every, lambda node: torch.eye(width)[node], width, speeds, participants=participants)
    want = torch.zeros(width, dtype=torch.float64)
    for index in range(ROUNDS):
        chosen = drawn(participants, index)
        total = sum(steps[node] for node in chosen)
        for node in chosen:
            want[node] -= steps[node] * steps[node] / total
        for node, seen in enumerate(each):
            assert torch.equal(seen.x[index], each[0].x[index]), "the same bits on all islands, whatever they trained"
            assert float((seen.x[index].double() - want).abs().max()) <= 4 * (index + 1) * 4 * ROUNDS * U
            assert seen.sent[index] == (node in chosen) * (N - 1) * (4 * width + HEADER_BYTES)


def test_each_island_is_drawn_as_often_and_rounds_differ() -> None:
    """Of R rounds each is in a share K / n, by R K / n (1 - K / n) of variance; five deviations, one in two million."""
    recipe, rounds, k = resolve("fedavg", {"reduce": "gather", "participants": 2}, N), 2000, 2
    rows = assemble(recipe, SEED, N).topology
    often, pairs = [0] * N, set[tuple[int, ...]]()
    for index in range(rounds):
        told = [bool(rows(index, node, N).sends) for node in range(N)]
        assert sum(told) == k
        pairs.add(tuple(node for node in range(N) if told[node]))
        often = [a + b for a, b in zip(often, told, strict=True)]
        for node in range(N):
            assert {peer for peer, _ in rows(index, node, N).recvs} == {j for j in range(N) if told[j] and j != node}
    deviation = (rounds * k / N * (1 - k / N)) ** 0.5
    assert max(abs(count - rounds * k / N) for count in often) <= 5 * deviation
    assert len(pairs) == 10, "all of them"
    other = assemble(recipe, SEED + 1, N).topology
    assert any(rows(i, 0, N) != other(i, 0, N) for i in range(20)), "the job's seed draws"


def plain(p: Any, steps: int, chosen: Any) -> Tensor:
    """Averaging after each step, of the islands that ``chosen(index)`` names, in float64."""
    x = p.start.clone()
    for index in range(steps):
        ran = [x - LR * a * (x - c) for a, c in zip(p.a, p.c, strict=True)]
        x = torch.stack([ran[node] for node in chosen(index)]).mean(0)
    return x


@pytest.mark.parametrize("axes", [{}, {"reduce": "gather"}, {"reduce": "gather", "participants": 2}])
def test_with_one_local_step_it_averages_that_step(axes: dict[str, Any]) -> None:
    """A step and a round round 12 times, of numbers below 2."""
    n, steps = 4, 9
    p = problem(n)

    def island(connection: Connection) -> Tensor:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="fedavg", every=1, seed=SEED, link=connection, **axes):
            for _ in range(steps):
                sgd_step(model, optimizer)
        return model.flat()

    want = plain(p.double(), steps, lambda index: drawn(2, index, n) if "participants" in axes else range(n))
    for x in run_islands(n, island):
        assert float((x.double() - want).abs().max()) <= 12 * steps * 2 * U


def test_all_of_them_are_full_participation_to_the_bit() -> None:
    def moved(node: int) -> Tensor:
        return torch.randn(130, generator=torch.Generator().manual_seed(node))

    outer = {"outer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.5}
    axes: dict[str, Any] = {"codec": "int4:64", "error_feedback": True, **outer}
    whole, all_drawn = run(3, 2, moved, 130, **axes), run(3, 2, moved, 130, **axes, participants=3)
    for one, two in zip(whole, all_drawn, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.x, two.x, strict=True))
        assert one.sent == two.sent


def test_who_is_not_drawn_keeps_what_its_codec_lost_before() -> None:
    def moved(node: int) -> Tensor:
        return torch.randn(130, generator=torch.Generator().manual_seed(node))

    each = run(3, 2, moved, 130, codec="int4:64", error_feedback=True, participants=1)
    for node, seen in enumerate(each):
        before = {key: torch.zeros_like(value) for key, value in seen.states[0].items()}
        for index, state in enumerate(seen.states):
            kept = [key for key in state if key.endswith("residual")]
            assert kept
            for key in kept:
                assert torch.equal(state[key], before[key]) == (node not in drawn(1, index, 3)), (node, index)
            before = state
    assert {drawn(1, index, 3)[0] for index in range(ROUNDS)} == {0, 1, 2}, "or nothing would be seen"


@pytest.mark.parametrize(
    ("recipe", "axes", "said"),
    [
        ("fedavg", {"participants": 5}, "sync.participants = 5 of 4 islands; use fewer, or leave it out"),
        ("fedavg", {"participants": 0}, "participants = 0 is not allowed; use 1 or more"),
        ("fedavg", {"participants": 2}, 'with sync.reduce = "all_to_all" all islands would have a part in each mean; use reduce'),
        ("dilocox", {"participants": 2}, 'with sync.reduce = "low_rank" and sync.delay = "round" all islands would have'),
        ("dilocox", {"participants": 2}, 'what they have; use reduce = "gather" and delay = 0'),
        ("fedavg", {"participants": 2, "reduce": "gather", "delay": 1}, "what they have; use delay = 0"),
        ("streaming_diloco", {"participants": 2, "reduce": "gather", "delay": 0}, 'what they have; use landing = "keep"'),
        ("dpsgd", {"participants": 2}, 'sync.participants = 2 has no effect with sync.algorithm = "dpsgd"'),
        ("local_sgd", {"participants": 2}, 'sync.participants = 2 has no effect with sync.algorithm = "dpsgd"'),
    ],
)
def test_what_it_does_not_fit_is_refused(recipe: str, axes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"participants = ") as refused:
        resolve(recipe, axes, 4)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)

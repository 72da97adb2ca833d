"""Does ``dtrain sim`` show and keep what the virtual clock found, and refuse what would have no effect?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain.algorithm import Algorithm
from dtrain.assemble import assemble
from dtrain.config import parse_job
from dtrain.errors import PeerLost, WireError
from dtrain.launch.cli import run_command
from dtrain.recipes import resolve
from dtrain.virtual import Simulation
from dtrain.virtual_clock import VirtualClock
from dtrain.virtual_link import LinkModel, VirtualLink
from dtrain.virtual_problem import Still
from dtrain.virtual_run import account_of_model
from tests.unit.small_run import refused, write_job_file

WIRE_BYTES = 32 + 4 * 50
PROBLEM = ("sim", "job.toml", "sim.problem=consensus", "sim.numel=50", "sync.recipe=dpsgd", "sim.step_s=0.1")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


def test_a_problem_is_shown_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    link = ("link.rate=1mbit", "link.rtt=40ms", "sim.links=0-1:2mbit/80ms")
    assert run_command([*PROBLEM, "--islands", "8", *link]) == 0
    shown = capsys.readouterr().out
    assert "20 steps of 8 islands" in " ".join(shown.split())
    assert "Islands apart" in shown
    assert "Loss above" not in shown
    kept = json.loads(Path("runs/small/virtual.json").read_text())
    assert [account["wire_bytes_sent"] for account in kept["accounts"]] == [20 * WIRE_BYTES] * 8
    assert kept["end"]["consensus_distance"] < 1e-3 * kept["start"]["consensus_distance"]
    assert refused(capsys, *PROBLEM).startswith("runs/small holds a run already")
    assert run_command([*PROBLEM, "--islands", "8", *link, "--resume"]) == 0  # which is from the start: it keeps no checkpoints
    again = json.loads(Path("runs/small/virtual.json").read_text())
    assert {**again, "real_s": 0} == {**kept, "real_s": 0}
    assert run_command(["report", "runs/small"]) == 2
    assert "simulation of a problem without a model" in capsys.readouterr().err
    assert run_command([*PROBLEM, "sim.problem=quadratic", "train.lr=0.5", "--fresh"]) == 0
    kept = json.loads(Path("runs/small/virtual.json").read_text())
    assert kept["end"]["gap"] < 0.1 * kept["start"]["gap"]  # a constant step ends near the optimum, not at it


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sim", "sim.numel=5"], "on the command line: sim.numel = 5 has no effect without sim.problem, "),
        (["sim", "sim.jitter=5ms"], "on the command line: sim.jitter = '5ms' has no effect without sim.step_s"),
        (["sim", "sim.step_noise=0.1"], "on the command line: sim.step_noise = 0.1 has no effect without sim.step_s"),
        (["sim", "sim.problem=consensus", "sim.stragglers=1"], "on the command line: sim.stragglers = 1.0 has no effect without"),
        (["sim", "sim.step_s=1", "sim.straggler_factor=3"], "on the command line: sim.straggler_factor = 3.0 has no effect with"),
        (["sim", "sim.step_s=1", "sim.stragglers=3"], "on the command line: sim.stragglers = 3 of 2 islands; use a whole number"),
        (["sim", "sim.step_s=1", "sim.stragglers=1.5"], "on the command line: sim.stragglers = 1.5 of 2 islands; use a whole nu"),
        (["sim", "sim.step_s=1", "sim.stragglers=0.25"], "on the command line: sim.stragglers = 0.25 of 2 islands; use a whole"),
        (["sim", "sim.step_s=-1"], "on the command line: sim.step_s = -1.0 is not allowed"),
        (["sim", "sim.step_s=nan"], "on the command line: sim.step_s = nan is not allowed"),
        (["sim", "sim.problem=cubic"], "on the command line: sim.problem = 'cubic' is not allowed; use 'gpt', 'quadratic', "),
        (["sim", "sim.loss=1"], "on the command line: sim.loss = 1.0 is not allowed; use less than 1"),
        (["sim", "sim.jitter=5"], "on the command line: sim.jitter = 5 is not allowed"),
        (["sim", "sim.jitter=fast"], "on the command line: sim.jitter = 'fast' is not allowed: 'fast' is not a time"),
        (["sim", "sim.links=0-0:1mbit/1ms"], "on the command line: sim.links = '0-0:1mbit/1ms' is not allowed: '0-0:1mbit/1ms'"),
        (["sim", "sim.links=0-1:1mbit"], "on the command line: sim.links = '0-1:1mbit' is not allowed: '0-1:1mbit' is no link o"),
        (["sim", "sim.links=0-1:no/1ms"], "on the command line: sim.links = '0-1:no/1ms' is not allowed: 'no' is not a rate"),
        (["sim", "sim.step_s=1", "sim.links=0-1:1mbit/1ms,1-0:none/1ms"], "on the command line: sim.links = '0-1:1mbit/1ms,1-0:"),
        (["sim", "sim.step_s=1", "sim.links=0-2:1mbit/1ms"], "on the command line: sim.links = '0-2:1mbit/1ms' names island 2;"),
        (["sim", "sim.problem=quadratic", "sync.recipe=accum_adam"], 'sim.problem = "quadratic" steps by plain SGD, and'),
        (["sim", "sim.problem=consensus", "sync.recipe=allreduce", "sync.every=1"], 'sim.problem = "consensus" has no gradients'),
        (["sim", "sim.problem=consensus", "sync.recipe=local", "sync.every=1"], 'sim.problem = "consensus" has no gradients'),
        *(
            (["sim", f"sim.problem={problem}", f"sim.clock={clock}", "sync.recipe=dpsgd", *changes], f"{said} has no effect")
            for problem, clock in (("quadratic", "steps"), ("consensus", "steps"), ("ridge", "poisson"))
            for changes, said in (
                (["islands.start=own"], "islands.start = 'own'"),
                (["islands.start=own", "train.merge=variance_corrected"], "islands.start = 'own'"),
                (["train.moments_every=4"], "train.moments_every = 4"),
                (["train.sam_rho=0.1"], "train.sam_rho = 0.1"),
                (["train.optimizer=muon"], "train.optimizer = 'muon'"),
                (['sync.exclude=["x"]'], "sync.exclude = ['x']"),
            )
        ),
        (["sim", "sim.processes=2"], "on the command line: sim.processes = 2 has no effect without sim.step_s"),
        (["sim", "sim.problem=ridge", "sim.clock=poisson", "sim.processes=2"], "on the command line: sim.processes = 2 has no e"),
        (["sim", "sim.step_s=1", "sim.processes=3"], "on the command line: sim.processes = 3 of 2 islands; use as many as there"),
        (["run", "sim.step_s=1"], "sim.step_s = 1.0 has no effect with dtrain run, profile and plan; use dtrain sim"),
        (["run", "sim.problem=consensus"], "sim.problem = 'consensus' has no effect with dtrain run, profile and plan"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command, *changes = arguments
    assert refused(capsys, command, "job.toml", *changes).startswith(said)


def test_a_loss_that_diverges_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*PROBLEM, "sim.problem=quadratic", "train.lr=1e9"]
    assert run_command(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "holds inf or NaN" in said
    assert run_command([*words, "sync.recipe=local", "--fresh"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the parameters of island 0 hold inf or NaN after 20 steps of train.lr = 1e+09; use a smaller train.lr" in said


def lonely(other_bytes: int) -> Simulation:
    """Island 1 expects 8 bytes each step; island 0 posts so many, none where it is 0."""

    def send(b: Any, state: Any, link: Any) -> Iterator[None]:
        if link.node == 0 and other_bytes:
            link.post(1, torch.zeros(other_bytes, dtype=torch.uint8))
        if link.node == 1:
            link.expect(0, 8)
        yield

    def bind(layout: Any, peers: Any) -> Algorithm:
        return Algorithm(lambda b: {}, send, lambda b, state: None)

    plan = replace(assemble(resolve("dpsgd", {}, 2), 0, 2), methods=(bind,))
    link = VirtualLink(LinkModel(), 2, 0)
    return Simulation(plan, 2, [("x", (4,))], Still(4), lr=0.0, link=link, compute_s=lambda node: 1.0)


def test_a_method_that_waits_for_nothing_or_for_other_bytes_is_told() -> None:
    lonely(8).run(3)
    with pytest.raises(PeerLost, match="lost island 0: island 1 expects a wire from it in step 1, and none was posted"):
        lonely(0).run(3)
    with pytest.raises(WireError, match="island 0 sent, for bucket 0, 9 bytes, not 8"):
        lonely(9).run(3)


@pytest.mark.parametrize(
    ("recipe", "axes", "numbers"),
    [("dpsgd", {"every": 2, "delay": 1}, [2, 3]), ("gradient_tracking", {}, [5, 6, 7]), ("allreduce", {}, [5, 6, 7])],
)
def test_a_simulation_that_begins_later_has_the_rounds_of_then(recipe: str, axes: dict[str, Any], numbers: list[int]) -> None:
    """Steps 6, 7 and 8: with every = 2, rounds 0 and 1 began after steps 2 and 4; otherwise one round a step."""
    plan, seen = assemble(resolve(recipe, axes, 4), 0, 4), set[int]()

    def topology(number: int, node: int, num_nodes: int) -> Any:
        seen.add(number)
        return plan.topology(number, node, num_nodes)

    told = replace(plan, topology=topology)
    link = VirtualLink(LinkModel(), 4, 0)
    Simulation(told, 4, [("x", (64,))], Still(64), lr=0.0, link=link, compute_s=lambda node: 1.0, first_step=5).run(8)
    assert sorted(seen) == numbers


def test_an_account_that_begins_later_is_of_its_own_steps() -> None:
    job = parse_job({}, ["train.steps=8", "islands.count=2", "sim.step_s=0.5", "sync.recipe=dpsgd", "sync.delay=0"])
    virtual = account_of_model(job, torch.nn.Linear(3, 2), first_step=5)
    assert (virtual.steps, virtual.virtual_s) == (3, 1.5)
    assert [account.rounds for account in virtual.accounts] == [3, 3]


def test_events_come_in_order_of_time_wave_source_and_asking() -> None:
    clock, seen = VirtualClock(), list[tuple[float, str]]()

    def note(name: str) -> None:
        seen.append((clock.now_s, name))
        if name == "b":
            clock.at(clock.now_s, 0, note, "d")

    for time_s, source, name in ((2.0, 0, "c"), (1.0, 7, "a"), (1.0, 3, "b"), (1.0, 7, "c"), (1.0, 3, "e")):
        clock.at(time_s, source, note, name)
    clock.run(2.0)
    assert seen == [(1.0, "b"), (1.0, "e"), (1.0, "a"), (1.0, "c"), (1.0, "d")]
    assert clock.next_s == 2.0
    clock.run()
    assert seen[-1] == (2.0, "c")
    assert clock.next_s == math.inf

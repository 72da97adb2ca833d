"""Do processes that share a simulation give what one gives, and does none outlive the command, whatever ends it?"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.config import parse_job
from dtrain.errors import WireError
from dtrain.launch.cli import run_command
from dtrain.virtual import Shapes
from dtrain.virtual_processes import Islands
from dtrain.virtual_run import simulate_job
from tests.unit.small_run import write_job_file

TWO = ("sim", "job.toml", "sim.problem=consensus", "sim.numel=50", "sync.recipe=dpsgd", "sim.step_s=0.1", "sim.processes=2")

LONELY = '''
from dtrain.algorithm import Algorithm
from dtrain.recipes import Recipe
from dtrain.errors import WireError


def method(recipe, mixing):
    """Island 3 has enough at its second round, if it does not wait for a wire that never comes."""

    def bind(layout, peers):
        def send(b, state, link):
            state["rounds"] += 1
            if link.node == 3 and state["rounds"] == 2:
                if FAILS:
                    raise WireError("enough")
                link.expect(1, 8)
            yield

        return Algorithm(lambda b: {"rounds": b.x.new_zeros(1)}, send, lambda b, state: None)

    return bind


row = Recipe("mine", "a lonely island", "my own", "own", "parameters", 1, "neighbours", "one_peer_ring", combine="gossip",
             delay=1, method=method)
'''


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the processes that were started."""
    ids: list[int] = []
    start = Islands._start

    def noted(islands: Islands, shapes: Shapes, first_step: int) -> None:
        start(islands, shapes, first_step)
        ids.extend(other.process.pid for other in islands._others)

    monkeypatch.setattr(Islands, "_start", noted)
    return ids


def are_gone(ids: list[int]) -> bool:
    return bool(ids) and not any(Path(f"/proc/{number}").exists() for number in ids)


def test_two_processes_give_what_one_gives(started: list[int]) -> None:
    changes = ["sim.problem=quadratic", "sim.numel=40", "train.steps=6", "islands.count=6", "sync.recipe=beer", "train.lr=0.1"]
    changes += ["sim.step_s=0.1", "sim.step_noise=0.3", "sim.jitter=20ms", "sim.loss=0.1", "link.rate=1mbit", "link.rtt=20ms"]
    one, two = (simulate_job(parse_job({}, [*changes, f"sim.processes={n}"])) for n in (1, 2))
    assert two == replace(one, real_s=two.real_s)
    assert sum(one.resent_bytes) > 0
    assert len(started) == 1
    assert are_gone(started)


def test_a_process_that_is_killed_ends_the_command_with_one_line(
    started: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Islands._run

    def killed(islands: Islands, steps: int) -> float:
        os.kill(started[0], signal.SIGKILL)
        return run(islands, steps)

    monkeypatch.setattr(Islands, "_run", killed)
    assert run_command([*TWO, "--islands", "6"]) == 75
    said = "dtrain: a process of the simulation, which had 3 islands, was ended by SIGKILL; start it again (sim.processes=1 needs"
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert are_gone(started)


def test_no_process_is_left_after_ctrl_c(
    started: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(islands: Islands, steps: int) -> float:
        assert os.getpgid(started[0]) == started[0], "Ctrl-C at a terminal is for this process's group"
        raise KeyboardInterrupt

    monkeypatch.setattr(Islands, "_run", stopped)
    assert run_command([*TWO, "--islands", "6"]) == 130
    assert capsys.readouterr().err.startswith("dtrain: stopped")
    assert are_gone(started)


@pytest.mark.slow  # two starts of a process, 3 s each
@pytest.mark.parametrize(
    ("fails", "said"),
    [(True, "enough"), (False, "lost island 1: island 3 expects a wire from it in step 2, and none was posted")],
)
def test_what_befalls_an_island_elsewhere_is_what_the_command_says(
    fails: bool, said: str, started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(f"FAILS = {fails}\n{LONELY}")
    for processes in (1, 2):
        words = [*TWO[:-1], f"sim.processes={processes}", "sync.recipe=mine.py:row", "--islands", "4", "--fresh"]
        if fails:
            with pytest.raises(WireError, match=said):
                run_command(words)
        else:
            assert run_command(words) == 75
            assert said in capsys.readouterr().err
    assert len(started) == 1
    assert are_gone(started)

"""What happens when an island is killed, when a person presses Ctrl-C, and when a checkpoint is not what was written?

The others wait where one can see it and go on, or the job ends resumably; nothing is lost."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from dtrain import checkpoint
from dtrain.config import load_job
from dtrain.launch.cli import run_command
from dtrain.sim import simulate
from tests.dist.job import (
    QUICKSTART,
    SMALL,
    alive,
    assert_same_weights,
    descendants,
    logs,
    run,
    started,
    steps_written,
    until,
)

JOB = (*SMALL, "train.steps=150", "train.checkpoint_every=40", "sync.every=10", "sync.delay=5", "train.batch=4")


def processes_of_island(launcher: int, island: int, *more: str) -> list[int]:
    """``more``: other variables that they have."""
    marks = {mark.encode() for mark in (f"DTRAIN_ISLAND={island}", *more)}
    found = []
    for pid in descendants(launcher):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if marks <= {*environment}:
            found.append(pid)
    return found


def kill_island(launcher: int, island: int) -> None:
    lost = processes_of_island(launcher, island)
    assert lost
    for pid in lost:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in lost), f"island {island} to be dead")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same job, left in peace; in this process, which is quicker and the same to the bit (test_same_bits)."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_command(["sim", str(QUICKSTART), "--islands", "2", f"job.dir={folder}", "job.name=calm", *JOB]) == 0
    return folder / "calm"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_island_comes_back_and_everyone_goes_on(tmp_path: Path, calm: Path) -> None:
    with started(tmp_path, "lost", *JOB) as process:
        until(lambda: steps_written(tmp_path / "lost") >= 60, "60 lines of metrics")
        kill_island(process.pid, 1)
        process.wait(timeout=120)
    said = (tmp_path / "lost.out").read_text()
    assert process.returncode == 0, said + logs(tmp_path / "lost")
    assert "waiting for island 1" in said
    assert "island 1 was lost and is started again" in said
    assert_same_weights(calm, tmp_path / "lost")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_rank_of_two_that_is_killed_takes_its_island_back_and_everyone_goes_on(tmp_path: Path) -> None:
    job = (*JOB, "islands.ranks=2")
    undisturbed = run(tmp_path, "undisturbed", *job)
    with started(tmp_path, "lost", *job) as process:
        until(lambda: steps_written(tmp_path / "lost") >= 60, "60 lines of metrics")
        (rank,) = processes_of_island(process.pid, 1, "RANK=1")
        os.kill(rank, signal.SIGKILL)
        process.wait(timeout=200)
    said = (tmp_path / "lost.out").read_text()
    assert process.returncode == 0, said + logs(tmp_path / "lost")
    assert "island 1 was lost and is started again" in said
    assert_same_weights(undisturbed, tmp_path / "lost")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_an_island_that_stays_away_ends_the_job_resumably(tmp_path: Path, calm: Path) -> None:
    with started(tmp_path, "lost", *JOB, "islands.max_restarts=0", "link.timeout_s=4") as process:
        until(lambda: steps_written(tmp_path / "lost") >= 90, "90 lines of metrics")
        kill_island(process.pid, 1)
        process.wait(timeout=60)
    said = (tmp_path / "lost.out").read_text()
    assert process.returncode == 75, said
    assert "waiting for island 1" in said
    assert "island 1" in said.splitlines()[-1] or "island 1" in said.splitlines()[-2], said
    assert "--resume" in said
    resumed = run(tmp_path, "lost", "--resume", "link.timeout_s=60")
    assert_same_weights(calm, resumed)


CTRL_C_S = 5.0

# A round then waits a quarter of a second: 11 of them lie between the checkpoint and the last step, so that a test that is kept
# off the cores meets the job alive, and the run takes 3 s more.
LONG = ("link.rtt=500ms",)


@pytest.mark.timeout(240)
def test_after_ctrl_c_the_run_goes_on_unless_its_checkpoint_is_damaged_or_foreign(tmp_path: Path, calm: Path) -> None:
    stopped = tmp_path / "stopped"
    with started(tmp_path, "stopped", *JOB, *LONG) as process:
        until(lambda: (checkpoint.newest_commit(stopped) or 0) >= 40, "a checkpoint at step 40")
        everyone = descendants(process.pid)
        assert len(everyone) >= 4, "a torchrun and a rank for each of two islands"
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
        took_s = time.monotonic() - begun
        assert not [pid for pid in everyone if alive(pid)]
    said = (tmp_path / "stopped.out").read_text()
    assert process.returncode == 130, said + logs(stopped)
    assert took_s < CTRL_C_S, "a promise of the README"
    assert "resume with: dtrain run" in said.splitlines()[-1]
    step = checkpoint.newest_commit(stopped)
    assert step is not None

    folder = checkpoint.island_folder(stopped, step, 1)
    data = next(folder.glob("*.distcp"))
    whole = data.read_bytes()
    data.write_bytes(whole[:-1000])
    # In this process, which is quicker: an island looks at its checkpoint in the same way. That an error of a live one is its
    # last word and ends the command with one line is asked in test_launch_local and test_worker.
    with pytest.raises(ValueError, match=rf"^checkpoint .*is damaged: {re.escape(data.name)} is not what was written; remove "):
        simulate(load_job(stopped / "job.toml"), stopped, resume_step=step)
    data.write_bytes(whole)

    own = checkpoint.load_island(stopped, step, 1)
    smaller = {key: value for key, value in own.items() if not key.startswith("model.blocks.1.")}
    checkpoint.save_island(stopped, step, 1, smaller, rank=0, num_ranks=1)
    with pytest.raises(ValueError, match=r"island1 holds another model: blocks\.1\..*; resume with the \[model\] section"):
        simulate(load_job(stopped / "job.toml"), stopped, resume_step=step)
    assert checkpoint.newest_commit(stopped) == step, "nothing was removed"

    checkpoint.save_island(stopped, step, 1, own, rank=0, num_ranks=1)
    assert_same_weights(calm, run(tmp_path, "stopped", "--resume", "link.rtt=0ms"))


SCRIPT = """
import pathlib, sys
import torch
import dtrain

model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with dtrain.join(model, optimizer, recipe="fedavg", every=5) as sync:
    begun = pathlib.Path(sys.argv[1], f"begun{sync.island}")
    begun.write_text(begun.read_text() + "x" if begun.exists() else "x")
    for step in range(50):
        if sync.island == 1 and step == 20 and begun.read_text() == "x":
            pathlib.Path(sys.argv[1], "stuck").touch()
            while True:  # until the test kills it
                pass
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().mean().backward()
        optimizer.step()
    sync.merge()
pathlib.Path(sys.argv[1], f"ended{sync.island}").write_text(str(sync.step))
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_script_begins_anew_on_every_island(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with started(tmp_path, "script", "islands.threads=1", "--", str(script), str(tmp_path)) as process:
        until((tmp_path / "stuck").exists, "island 1 to be stuck")
        kill_island(process.pid, 1)
        process.wait(timeout=120)
    said = (tmp_path / "script.out").read_text()
    assert process.returncode == 0, said + logs(tmp_path / "script")
    assert [(tmp_path / f"begun{i}").read_text() for i in (0, 1)] == ["xx", "xx"]
    assert [(tmp_path / f"ended{i}").read_text() for i in (0, 1)] == ["50", "50"]

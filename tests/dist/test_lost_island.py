"""What happens when an island is killed, and when the line is cut? The others wait where one can see it, and go on or
end resumably."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.dist.job import (
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

JOB = (*SMALL, "train.steps=150", "train.checkpoint_every=20", "sync.every=10", "sync.delay=5", "train.batch=4")


def processes_of_island(launcher: int, island: int) -> list[int]:
    mark = f"DTRAIN_ISLAND={island}".encode()
    found = []
    for pid in descendants(launcher):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if mark in environment:
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
    """The same job, left in peace."""
    return run(tmp_path_factory.mktemp("calm"), "calm", *JOB)


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

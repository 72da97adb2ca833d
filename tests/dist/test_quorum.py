"""Do real processes go on without one that stands still, and take it along again? Rounds of two of three islands are enough."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.dist import job
from tests.dist.test_interrupted import kill_island, processes_of_island

STEPS, EVERY, DELAY = 200, 10, 3
QUORUM = (
    *("sync.recipe=decoupled_diloco", f"sync.every={EVERY}", f"sync.delay={DELAY}", "islands.count=3", f"train.steps={STEPS}"),
    "train.checkpoint_every=40",
)


def steps_of(run: Path) -> dict[int, list[int]]:
    """Of each island, those that it has written so far."""
    whole = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n")[:-1]]
    return {island: [line["step"] for line in whole if line["island"] == island] for island in range(3)}


def stopped_between_rounds(run: Path, pids: Sequence[int]) -> bool:
    """Whether island 1 stands still at a step where the last round has landed on all and the next is not near. Else it goes on:
    a member whose wires have not reached all yet would be waited for."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    last = {island: of[-1] for island, of in steps_of(run).items()}
    since = last[1] % EVERY
    if DELAY < since < EVERY - 1 and min(last.values()) >= last[1] - since + DELAY:
        return True
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    return False


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_others_go_on_while_an_island_is_stopped_and_it_catches_up(tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    with job.started(tmp_path, "stopped", *job.SMALL, *QUORUM) as process:
        job.until(lambda: job.steps_written(run) >= 90, "90 lines of metrics")
        stopped = processes_of_island(process.pid, 1)
        job.until(lambda: stopped_between_rounds(run, stopped), "a stop between rounds")
        at = steps_of(run)[1][-1]
        job.until(lambda: min(steps_of(run)[n][-1] for n in (0, 2)) >= at + 3 * EVERY, "the others to go on", pause_s=0.02)
        assert steps_of(run)[1][-1] == at
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        job.until(lambda: process.poll() is not None, "the run to end", timeout_s=180, pause_s=0.05)
        assert process.returncode == 0, job.logs(run)
    assert "lost" not in (tmp_path / "stopped.out").read_text()
    assert all(of == list(range(1, STEPS + 1)) for of in steps_of(run).values())


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_island_comes_back_and_all_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The others stand still for it as soon as they hear of it: at the end they would have to go back all the way."""
    run = tmp_path / "lost"
    with job.started(tmp_path, "lost", *job.SMALL, *QUORUM) as process:
        job.until(lambda: job.steps_written(run) >= 180, "180 lines of metrics")
        kill_island(process.pid, 1)
        job.until(lambda: process.poll() is not None, "the run to end", timeout_s=180, pause_s=0.05)
        assert process.returncode == 0, job.logs(run)
    output = (tmp_path / "lost.out").read_text()
    assert "island 1 was lost and is started again" in output, output
    assert all(of == list(range(1, STEPS + 1)) for of in steps_of(run).values())

"""Does ``dtrain run`` end where pairs meet when both are ready? Three real processes, their desk at the meeting point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist import job
from tests.dist.test_interrupted import kill_island

STEPS = 60
READY = ("sync.recipe=a2cid2", "sync.schedule=ready", "islands.count=3", f"train.steps={STEPS}")


@pytest.mark.slow
def test_a_run_ends_and_its_report_counts_meetings(tmp_path: Path) -> None:
    """All islands save their checkpoints after the same steps, and some have a partner just then."""
    run = job.run(tmp_path, "ready", *job.SMALL, *READY, "train.checkpoint_every=10")
    summary = json.loads((run / "summary.json").read_text())
    meetings = summary["meetings"]
    assert isinstance(meetings, int)
    assert 0 < meetings <= 3 * STEPS // 2, "an island meets at most once a step; how often depends on who is ready when"
    # Each of two sends its fp32 parameters, of 3 islands in the mean; checksums and headers add little.
    each = 2 * meetings / 3 * 4 * summary["parameters"]
    assert each <= summary["wire_bytes_sent"] <= 1.01 * each
    parts = [json.loads((run / "logs" / f"island{k}" / "part.json").read_text()) for k in range(3)]
    assert sum(part["meetings"] for part in parts) == 2 * meetings
    assert (run / "checkpoints").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_island_comes_back_and_all_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The others are between two steps, or wait for its wire; nobody waits for it in a round that all share."""
    run = tmp_path / "lost"
    with job.started(tmp_path, "lost", *job.SMALL, *READY, "train.steps=150", "train.checkpoint_every=20") as process:
        job.until(lambda: job.steps_written(run) >= 120, "120 lines of metrics")
        kill_island(process.pid, 1)
        job.until(lambda: process.poll() is not None, "the run to end", timeout_s=180, pause_s=0.05)
        assert process.returncode == 0, job.logs(run)
    output = (tmp_path / "lost.out").read_text()
    assert "island 1 was lost and is started again" in output, output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {island: [line["step"] for line in lines if line["island"] == island] for island in range(3)}
    assert all(of == sorted(set(of)) and of[-1] == 150 for of in steps.values())
    assert json.loads((run / "summary.json").read_text())["meetings"] > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_killed_island_comes_back_long_before_the_end(tmp_path: Path) -> None:
    """The launcher says that it was lost and the others stand still; with their steps alone they would know at the last merge."""
    run, steps = tmp_path / "early", 20_000
    with job.started(tmp_path, "early", *job.SMALL, *READY, f"train.steps={steps}", "train.checkpoint_every=20") as process:
        job.until(lambda: job.steps_written(run) >= 120, "120 lines of metrics")
        kill_island(process.pid, 1)
        output = tmp_path / "early.out"
        again = "island 1 was lost and is started again"
        job.until(lambda: again in output.read_text() or process.poll() is not None, "island 1 to be started again")
        assert again in output.read_text(), output.read_text() + job.logs(run)
        written = job.steps_written(run)
        job.until(lambda: job.steps_written(run) >= written + 90 or process.poll() is not None, "all to go on")
        assert process.poll() is None, job.logs(run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:-1]]
        newest = {island: max(line["step"] for line in lines if line["island"] == island) for island in range(3)}
        assert max(newest.values()) < steps // 2, newest

"""Does a run that is killed at any moment and resumed end with the bits of one that was left in peace?

The whole tree is killed with SIGKILL again and again: at seeded numbers of steps, in the middle of writing a
checkpoint, and with rounds on the wire (the link is slow enough that one is under way most of the time where there is
a delay)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dtrain import checkpoint, metrics
from dtrain.launch.cli import run_command
from tests.dist.job import QUICKSTART, SMALL, assert_same_weights, run, started, steps_written, until

STEPS = 120
COMMON = (
    *SMALL,
    f"train.steps={STEPS}",
    "train.checkpoint_every=7",
    "sync.every=10",
    "link.rate=2mbit",
    "train.batch=4",
)


def kill_at(folder: Path, name: str, arguments: tuple[str, ...], moment: int | None) -> bool:
    """Start or resume the run and kill it after ``moment`` more lines of metrics, or (None) while a checkpoint is
    being written.

    Returns whether a half-written checkpoint was left behind."""
    run_folder = folder / name
    began = (run_folder / "metrics.jsonl").exists()
    with started(folder, name, *(("--resume",) if began else arguments)) as process:
        if moment is None:
            seen = set((run_folder / "checkpoints").glob(".writing-*"))
            until(
                lambda: (
                    bool(set((run_folder / "checkpoints").glob(".writing-*/*")) - seen) or process.poll() is not None
                ),
                "a checkpoint being written",
                pause_s=0.0,
            )
        else:
            before = steps_written(run_folder)
            until(
                lambda: steps_written(run_folder) >= before + moment or process.poll() is not None,
                f"{moment} more lines",
            )
        assert process.poll() is None, "the run ended before it could be killed: the moments do not fit the steps"
    return bool(list((run_folder / "checkpoints").glob(".writing-*")))


def killed_and_resumed(folder: Path, arguments: tuple[str, ...], moments: list[int | None]) -> tuple[Path, int]:
    half_written = sum(kill_at(folder, "killed", arguments, moment) for moment in moments)
    return run(folder, "killed", "--resume"), half_written


def check(tmp_path: Path, arguments: tuple[str, ...], moments: list[int | None]) -> None:
    calm = run(tmp_path, "calm", *arguments)
    stormy, half_written = killed_and_resumed(tmp_path, arguments, moments)
    assert_same_weights(calm, stormy)
    assert half_written >= 1, "no kill hit the writing of a checkpoint"
    for of_run in (calm, stormy):
        lines = metrics.read(of_run / "metrics.jsonl")
        assert sorted((line["island"], line["step"]) for line in lines) == [
            (i, s) for i in (0, 1) for s in range(1, STEPS + 1)
        ]
    losses = [
        {(line["island"], line["step"]): line["loss"] for line in metrics.read(of_run / "metrics.jsonl")}
        for of_run in (calm, stormy)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    check(tmp_path, (*COMMON, "sync.delay=6"), [25, None])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("delay", ["0", "6", "round"])
def test_ten_kills_at_seeded_moments_leave_no_trace(tmp_path: Path, delay: str, ranks: int) -> None:
    rng = random.Random(f"{delay}/{ranks}")
    moments: list[int | None] = [rng.randint(3, 18) for _ in range(8)]
    for _ in range(2):
        moments.insert(rng.randint(0, len(moments)), None)
    check(tmp_path, (*COMMON, f"sync.delay={delay}", f"islands.ranks={ranks}"), moments)


def test_three_islands_go_on_from_the_merged_weights_of_two(tmp_path: Path) -> None:
    """In one process, which is quicker: the run folder, the islands and their checkpoints are the same."""
    words = ["sim", str(QUICKSTART), f"job.dir={tmp_path}", "job.name=grown"]
    first = ("train.steps=20", "train.checkpoint_every=20", "sync.every=6", "train.batch=4")
    assert run_command([*words, *SMALL, *first]) == 0
    two = tmp_path / "grown"
    islands = [checkpoint.load_island(two, 20, i) for i in range(2)]
    assert run_command([*words, "--resume", "islands.count=3", "train.steps=30"]) == 0
    merged = checkpoint.load_weights(two / "init.safetensors")
    for name, value in merged.items():
        exact = torch.stack([state[f"model.{name}"].to(torch.float64) for state in islands]).mean(dim=0)
        assert torch.equal(value, exact.to(torch.float32))
    lines = metrics.read(two / "metrics.jsonl")
    assert {(line["island"], line["step"]) for line in lines if line["step"] > 20} == {
        (i, s) for i in range(3) for s in range(21, 31)
    }
    summary = metrics.read_json(two / "summary.json")
    assert (summary["islands"], summary["steps"]) == (3, 30)

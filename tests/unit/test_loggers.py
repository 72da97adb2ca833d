"""Do TensorBoard and Weights & Biases hear what metrics.jsonl has, each island by its own name?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dtrain import checkpoint
from dtrain.config import parse_job
from dtrain.launch.checks import check_answers
from dtrain.metrics import cut_back
from tests.unit.by_hand import job_of, lines_of, train
from tests.unit.small_run import refused

pytestmark = pytest.mark.usefixtures("one_thread")
WATCHED = ("loss", "lr", "eval_loss", "wire_bytes_sent", "wait_s", "tokens")


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(run: Path, island: int, name: str) -> list[tuple[int, float]]:
    """TensorBoard keeps numbers as fp32."""
    return [(line["step"], float(np.float32(line[name]))) for line in lines_of(run, island) if name in line]


def test_tensorboard_reads_back_each_islands_lines_and_a_resume_goes_on(texts: Path, tmp_path: Path) -> None:
    rounds = ("sync.recipe=diloco", "sync.every=2", "train.eval_every=2", "train.checkpoint_every=3")
    job = job_of(texts, "log.tensorboard=true", *rounds)
    run = train(job, tmp_path / "run")
    for island in range(2):
        found = events(run / "tensorboard" / f"island{island}")
        for name in WATCHED:
            assert found[name] == expected(run, island, name), name
            assert len(found[name]) == (2 if name == "eval_loss" else 6)
        assert "step" not in found
        assert "island" not in found
    assert expected(run, 0, "loss") != expected(run, 1, "loss")
    (run / "logs").rename(run / "old")
    (run / "checkpoints" / "step_00000006").rename(tmp_path / "away")
    cut_back(run / "metrics.jsonl", 3)
    assert checkpoint.newest_commit(run) == 3
    train(job, run, resume_step=3)
    again = events(run / "tensorboard" / "island0")["loss"]
    assert again == expected(run, 0, "loss")
    assert [step for step, _ in again] == [1, 2, 3, 4, 5, 6], "what was beyond the checkpoint is there once"


class Heard:
    """A run of a wandb that is not there."""

    def __init__(self, **said: Any) -> None:
        self.said, self.lines, self.finished = said, list[tuple[int, dict[str, float]]](), 0

    def log(self, numbers: Mapping[str, float], *, step: int) -> None:
        self.lines.append((step, dict(numbers)))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_hears_of_each_island_as_a_run_of_the_jobs_group(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = list[Heard]()

    def init(**said: Any) -> Heard:
        runs.append(Heard(**said))
        return runs[-1]

    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init = init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = train(job_of(texts, "log.wandb=mine", "job.name=night"), tmp_path / "run")
    assert sorted(heard.said["name"] for heard in runs) == ["night-island0", "night-island1"]
    assert len({heard.said["id"] for heard in runs}) == 2
    for heard in runs:
        island = int(heard.said["name"][-1])
        assert (heard.said["project"], heard.said["group"], heard.finished) == ("mine", "night", 1)
        assert heard.said["config"]["train"]["steps"] == 6
        assert heard.lines == [
            (line["step"], {k: v for k, v in line.items() if k not in ("step", "island")}) for line in lines_of(run, island)
        ]
    first = {heard.said["name"]: heard.said["id"] for heard in runs}
    train(job_of(texts, "log.wandb=mine", "job.name=night", "islands.count=1"), tmp_path / "other")
    assert runs[-1].said["id"] not in first.values(), "another folder is another run"


def test_nobody_is_told_unasked(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    run = train(job_of(texts), tmp_path / "run")
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize(
    ("package", "change", "asked"),
    [("tensorboard", "log.tensorboard=true", "log.tensorboard = true"), ("wandb", "log.wandb=mine", 'log.wandb = "mine"')],
)
def test_what_is_asked_for_and_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, change: str, asked: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    Path("job.toml").write_text("[train]\nsteps = 2\n")
    said = refused(capsys, "run", "job.toml", change)
    assert said == f"{asked} needs {package}, which is not installed; in a checkout: pip install '.[log]'"


def test_where_no_metrics_are_written_logging_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^log\.wandb = 'x' has no effect with sim\.problem = .*, which writes no metrics"):
        check_answers(parse_job({"log": {"wandb": "x"}, "sim": {"problem": "quadratic"}}), "sim")
    with pytest.raises(ValueError, match=r"^log\.tensorboard = True has no effect on a script, which says it itself by a logger"):
        check_answers(parse_job({"log": {"tensorboard": True}}), "script")

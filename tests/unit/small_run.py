"""A small job and a run folder as its islands leave it, in the current working directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrain import checkpoint, metrics
from dtrain.launch.cli import run_command
from dtrain.launch.run_folder import Choice, Opened, open_run
from dtrain.metrics import Part

RUN = Path("runs/small")


def write_job_file() -> None:
    Path("job.toml").write_text(
        '[job]\nname = "small"\n[islands]\ncount = 2\n[train]\nsteps = 20\n[sync]\nevery = 5\ndelay = 0\n'
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits 2 and writes nothing."""
    before = contents(Path())
    assert run_command(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dtrain: ")
    assert err.count("\n") == 1
    assert contents(Path()) == before
    return err.removeprefix("dtrain: ").strip()


def contents(folder: Path) -> list[tuple[Path, bytes]]:
    return sorted((path, path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


def opened(*overrides: str, job_file: Path = Path("job.toml"), **choice: bool) -> Opened:
    with open_run(job_file, overrides, Choice(**choice)) as run:
        return run


def commit(run: Path, step: int, num_islands: int) -> None:
    """A checkpoint as the islands and the launcher leave it; island i's only weight is i."""
    for island in range(num_islands):
        checkpoint.save_island(run, step, island, {"model.w": torch.tensor([float(island)])}, rank=0, num_ranks=1)
    checkpoint.commit_ready(run, num_islands, keep=2)


def write_metrics(run: Path, steps: int) -> None:
    lines = [json.dumps({"step": step, "island": 0, "loss": 1.0}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def finish(run: Path, steps: int, num_islands: int = 2) -> None:
    """What the end of training leaves, but for a checkpoint."""
    write_metrics(run, steps)
    for island in range(num_islands):
        checkpoint.save_weights(run / "islands" / f"island{island}.safetensors", {"w": torch.zeros(1)}, step=steps)
        logs = run / "logs" / f"island{island}"
        logs.mkdir(parents=True, exist_ok=True)
        metrics.write_part(logs, _part(island, steps, num_islands))
    checkpoint.save_weights(run / "model.safetensors", {"w": torch.zeros(1)}, step=steps)
    for name in ("summary.json", "loss.png"):
        (run / name).write_text("{}")


def _part(island: int, steps: int, num_islands: int) -> Part:
    values: dict[str, Any] = {field.name: 0 for field in fields(Part)}
    values |= {"island": island, "islands": num_islands, "ranks": 1, "steps": steps, "parameters": 4}
    return Part(**(values | {"bytes_per_token": 1.0, "recipe": "local", "corpus_hash": "c0ffee"}))


def killed_anywhere(run: Path, command: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Do a command in as many copies of a run as it has steps that change the disk, killed before the first, the second ..."""
    shutil.copytree(run, "template")
    for moment in range(1000):
        shutil.rmtree(run)
        shutil.copytree("template", run)
        if not killed_at(moment, command, monkeypatch):
            assert moment > 3
            return
        yield moment


def killed_at(moment: int, command: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    left = iter(range(moment))

    def deadly(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: Any, **options: Any) -> None:
            if next(left, None) is None:
                raise Killed
            change(*arguments, **options)

        return changed

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patch.setattr(os, name, deadly(getattr(os, name)))
        try:
            command()
        except Killed:
            return True
    return False


class Killed(BaseException):
    pass

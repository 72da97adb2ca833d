"""What does a run folder hold while its islands train? Made line by line, without a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dtrain.config import dump_job, parse_job
from dtrain.launch.checks import resolved
from dtrain.launch.launcher_word import WordFile, path_of
from dtrain.metrics import StatusFile


def make_run(run: Path, *overrides: str, job: Mapping[str, Any] | None = None) -> WordFile:
    """A run that this process says it launches; no island has written yet."""
    made = resolved(parse_job(dict(job or {}), ["train.steps=3000", *overrides]))
    run.mkdir(parents=True)
    (run / "job.toml").write_text(dump_job(made), encoding="utf-8")
    return WordFile(run, made.islands.count, 0)


def record(island: int, step: int, **more: Any) -> dict[str, Any]:
    """After step t of 2 s each: a loss of 6 - t / 1000 - island, 128 tokens and 1000 bytes a step, half a second waited."""
    said = {"step": step, "island": island, "loss": 6 - step / 1000 - island, "tokens": 128, "tokens_per_s": 64.0, "lr": 0.1}
    counts = {"wire_bytes_sent": 1000 * step, "wire_bytes_received": 900 * step, "wait_s": 0.5 * step, "time_s": 2.0 * step}
    return said | counts | more


def write_lines(run: Path, records: Iterable[dict[str, Any]]) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in records)


def status_file(run: Path, island: int) -> StatusFile:
    folder = run / "logs" / f"island{island}"
    folder.mkdir(parents=True, exist_ok=True)
    return StatusFile(folder / "status.json", 3000, 300.0)


def launcher_gone(run: Path) -> None:
    """Another process has the launcher's number now: it started at another time."""
    word = json.loads(path_of(run).read_text())
    path_of(run).write_text(json.dumps(word | {"started": word["started"] + 1}))


def training_run(run: Path) -> WordFile:
    """Three islands in a ring, 1 and 2 a step behind island 0, which waits for island 2; island 1 was started again once."""
    word = make_run(run, "islands.count=3", "sync.recipe=choco")
    merged = {"eval_loss_merged": 4.125}  # after step 10
    write_lines(run, (record(i, t, **(merged if t == 10 else {})) for t in range(1, 21) for i in range(3) if i == 0 or t < 20))
    write_lines(run, [record(2, 20, eval_loss=3.25, loss=3.5)])
    status_file(run, 0).update("waiting", 0, waiting_for=(2,), waited_s=10.0)
    status_file(run, 1).update("training", 19)
    status_file(run, 2).update("training", 20)
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    (run / "checkpoints" / "step_00000010" / "COMMIT").touch()
    (run / "checkpoints" / "step_00000020").mkdir()  # not all islands have written it
    word.say(1, 10, [0, 1, 0], ["", "", ""])
    return word


def site_run(run: Path, island: int, meet: str = "10.0.0.1:4711") -> WordFile:
    """At the site of one of three islands in a ring: what it writes itself, and nothing of the others."""
    make_run(run, "islands.count=3", "sync.recipe=choco")
    write_lines(run, (record(island, t, **({"eval_loss_merged": 4.125} if t == 10 else {})) for t in range(1, 21)))
    status_file(run, island).update("waiting", 20, waiting_for=(0,), waited_s=10.0)
    return WordFile(run, 3, 0, part=island, meet=meet)

"""How long is it from the command until every island has trained a step?

    python -m tests.bench.first_step                 (about two minutes on 2 cores)

`dtrain run` with the quickstart's job, from its start until the last island's first line of metrics; three runs of 2 islands and
one of 16. The first run before them is not counted: it makes what is made once on a machine."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dtrain import metrics
from tests.bench.runs import JOB, ROOT, arguments, hardware, save

RUNS = {2: 3, 16: 1}
LIMIT_S = 300.0


def first_step_s(folder: Path, islands: int) -> float:
    overrides = ("train.steps=3", "train.eval_every=0", "train.checkpoint_every=0", f"islands.count={islands}", "job.name=first")
    command = [sys.executable, "-m", "dtrain.launch", "run", str(JOB), "--fresh-name", f"job.dir={folder}", *overrides]
    before = {*folder.glob("*")}
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL) as process:
        try:
            while True:
                took_s = time.monotonic() - began
                if any(_islands_in(run) == islands for run in {*folder.glob("*")} - before):
                    return took_s
                assert process.poll() in (None, 0), f"exit status {process.returncode}"
                assert took_s < LIMIT_S, f"no step of all islands within {LIMIT_S:g} s"
                time.sleep(0.02)
        finally:
            process.wait(timeout=LIMIT_S)


def _islands_in(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len({line["island"] for line in metrics.read(path)}) if path.exists() else 0


def main() -> None:
    arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        first_step_s(Path(folder), 2)
        rows = [
            {"islands": islands, "first_step_s": [round(first_step_s(Path(folder), islands), 1) for _ in range(times)]}
            for islands, times in RUNS.items()
        ]
    path = save("first_step", {"command": "python -m tests.bench.first_step", "hardware": hardware(), "rows": rows})
    print(*rows, f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()

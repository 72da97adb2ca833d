"""How is the training of ``dtrain sim`` shown? Islands are threads of this process; another thread draws what they write."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from dtrain.config import Job
from dtrain.launch.launcher_word import WordFile
from dtrain.launch.processes import die_with_parent
from dtrain.launch.progress import Progress
from dtrain.launch.view import LiveView

_DRAW_EVERY_S = 0.5


def run_simulated(job: Job, run: Path, *, resume_step: int, console: Console) -> None:
    from dtrain.sim import simulate

    die_with_parent()  # where a program started it and says so
    word = WordFile(run, job.islands.count, resume_step)
    with _drawn(job, run, console):
        simulate(job, run, resume_step=resume_step)
    word.end(0)  # of one that fails, that its process is gone says enough


@contextmanager
def _drawn(job: Job, run: Path, console: Console) -> Iterator[None]:
    for island in range(job.islands.count):  # of an earlier start, which must not pass for news
        (run / "logs" / f"island{island}").mkdir(parents=True, exist_ok=True)
        for name in ("status.json", "error.json", "part.json"):
            (run / "logs" / f"island{island}" / name).unlink(missing_ok=True)
    progress = Progress(run, job.islands.count, job.train.steps)
    ended = threading.Event()

    def draw() -> None:
        with LiveView(console) as view:
            while not ended.wait(_DRAW_EVERY_S):
                view.show(progress.read(), time.monotonic())
            view.show(progress.read(), time.monotonic())

    thread = threading.Thread(target=draw, name="view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

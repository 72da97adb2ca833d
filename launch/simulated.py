"""How is ``dtrain sim`` shown? The islands train in threads of this process; another thread draws what they write."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from dtrain import metrics
from dtrain.config import Job
from dtrain.launch.processes import die_with_parent
from dtrain.launch.progress import Progress
from dtrain.launch.view import LiveView

_DRAW_EVERY_S = 0.5


def run_virtual(job: Job, run: Path) -> list[list[str]]:
    """The problem of ``[sim]``, on its clock; returns the rows of the last screen."""
    if job.sim.clock == "poisson":
        from dtrain.event_run import event_rows, run_events, write_events

        timed = run_events(job)
        write_events(run, timed)
        return event_rows(timed)
    from dtrain.virtual_run import rows, simulate_job, write

    virtual = simulate_job(job)
    write(run, virtual)
    return [list(row) for row in rows(virtual)]


def account(job: Job, run: Path) -> list[list[str]]:
    """What the rounds of a GPT that was trained would have taken, and sent, on the virtual clock."""
    from dtrain.data.corpus import load_corpus
    from dtrain.train import build_model
    from dtrain.virtual_run import account_of_model, rows, write

    first_step = metrics.read_part(run / "logs" / "island0").first_step
    virtual = account_of_model(job, build_model(job, load_corpus(job.data.source)), first_step=first_step)
    write(run, virtual)
    return [list(row) for row in rows(virtual)]


def run_simulated(job: Job, run: Path, *, resume_step: int, console: Console) -> None:
    from dtrain.sim import simulate

    die_with_parent()  # where a program started it and says so
    with _drawn(job, run, console):
        simulate(job, run, resume_step=resume_step)


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

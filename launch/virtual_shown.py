"""What did a virtual clock find? ``[sim]`` is run or reckoned, kept as ``virtual.json``, and becomes rows of the last screen.

What needs torch is imported inside: the command line is read without it."""

from __future__ import annotations

from pathlib import Path

from dtrain import metrics
from dtrain.config import Job


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
    from dtrain.build import build_model
    from dtrain.data.corpus import corpus_of
    from dtrain.virtual_run import account_of_model, rows, write

    first_step = metrics.read_part(run / "logs" / "island0").first_step
    virtual = account_of_model(job, build_model(job, corpus_of(job.data)), first_step=first_step)
    write(run, virtual)
    return [list(row) for row in rows(virtual)]

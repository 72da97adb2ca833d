"""How are many islands trained in one process? One thread an island, the same code, an in-memory link without a rate.

The arithmetic of an island does not depend on when its wires arrive, so parameters equal those of separate processes
bit for bit. Where a round goes on without those who are late (``sync.quorum``), who that is is left to chance here too."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import replace
from pathlib import Path

import torch

from dtrain import checkpoint
from dtrain.config import Job
from dtrain.connect import Connection, connect_local
from dtrain.data.corpus import corpus_of
from dtrain.metrics import StatusFile
from dtrain.train import cpu_threads, train_island

_POLL_S = 0.2


def cores() -> int:
    """That this process may run on; not every system has a say in it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say_wait(status: StatusFile, missing: tuple[int, ...], waited_s: float, limit_s: float) -> None:
    status.update("waiting", 0, waiting_for=missing, waited_s=waited_s)


def simulate(job: Job, run: Path, *, resume_step: int) -> None:
    """Train all islands of a job in this process; raises the first island's error."""
    assert job.islands.ranks == 1, "the launcher refuses it, before it writes anything"
    torch.set_num_threads(cpu_threads(job))
    corpus = corpus_of(job.data)
    # As many islands compute at once as there are cores: 8 islands that take each other's core and cache after each operation
    # need 1.2 times the time (a GPT of 180 thousand parameters, 2 cores).
    computing = threading.Semaphore(max(1, cores() // cpu_threads(job)))
    cpu, errors = torch.device("cpu"), list[Exception]()

    def island(connection: Connection) -> None:
        status = StatusFile(
            run / "logs" / f"island{connection.node}" / "status.json", job.train.steps, job.link.timeout_s
        )
        connection = replace(connection, on_wait=functools.partial(_say_wait, status))
        try:
            train_island(
                job, connection, corpus, run, status, device=cpu, resume_step=resume_step, computing=computing
            )
        except Exception as e:  # noqa: BLE001  (a thread's error is raised again below, on the caller's thread)
            errors.append(e)

    connections = connect_local(job.islands.count, timeout_s=job.link.timeout_s)
    threads = [threading.Thread(target=island, args=(c,), name=f"island{c.node}", daemon=True) for c in connections]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        threads[0].join(timeout=_POLL_S)
        checkpoint.commit_ready(run, job.islands.count, job.train.keep)
        if not threads[0].is_alive():
            for thread in threads:
                thread.join(timeout=_POLL_S)
    checkpoint.commit_ready(run, job.islands.count, job.train.keep)
    if errors:
        raise errors[0]

"""Who hears of a step's numbers besides ``metrics.jsonl``? TensorBoard and Weights & Biases, where [log] asks for them.

Rank 0 of each island tells them, under its own name. Their packages are imported inside: only jobs that ask wait for them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from dtrain.config import Job
from dtrain.extras import require
from dtrain.metrics import Logger


def check_loggers(job: Job) -> None:
    """Raises ValueError where one is asked for and not installed."""
    if job.log.tensorboard:
        require("tensorboard", asked="log.tensorboard = true", extra="log")
    if job.log.wandb:
        require("wandb", asked=f'log.wandb = "{job.log.wandb}"', extra="log")


def loggers_of(job: Job, run: Path, island: int, done: int) -> list[Logger]:
    """Those that a job asks for, of an island that goes on after ``done`` steps."""
    check_loggers(job)
    loggers = list[Logger]()
    if job.log.tensorboard:
        loggers.append(TensorBoard(run / "tensorboard" / f"island{island}", done))
    if job.log.wandb:
        loggers.append(WeightsAndBiases(job, run, island))
    return loggers


class TensorBoard:
    """A folder of events; what an earlier start wrote beyond ``done`` steps is shown no more."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None, flush_secs=10)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._writer.add_scalar(name, number, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project, the same one when the island is started again; a job's islands are a group."""

    def __init__(self, job: Job, run: Path, island: int) -> None:
        name = f"{job.job.name}-island{island}"
        self._run: Any = import_module("wandb").init(
            project=job.log.wandb, name=name, group=job.job.name, dir=str(run), config=job.model_dump(exclude_none=True),
            id=hashlib.sha256(f"{run.absolute()} {island}".encode()).hexdigest()[:16], resume="allow", reinit="create_new",
        )  # fmt: skip

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()

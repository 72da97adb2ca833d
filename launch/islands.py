"""How is one island started, and what did it leave behind when it ended?"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.config import Job
from dtrain.launch import gpus
from dtrain.launch.processes import PARENT_VARIABLE, TAG_VARIABLE
from dtrain.metrics import ErrorNote, read_error, write_whole

_TRACEBACK = "Traceback (most recent call last)"
_PRINTS = "prints"
"""A file that names another: where rank 0 of an island prints to. Of several nodes only it knows."""
# what an earlier start of the same island may have left, and what the launcher or a report would take for news
_NEWS = ("status.json", "error.json", "part.json", _PRINTS)

TORCHRUN_VARIABLE = "DTRAIN_TORCHRUN"
"""Holds the words that start the torchruns of an island of several nodes, in place of the one torchrun here. A scheduler's script
says them, which alone knows its nodes, to what keeps that island: its part of the launcher, or ``follow`` on another node."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where an island's processes run: as a command that stands before theirs puts them there."""

    prefix: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Launch:
    """What all islands of one launch share."""

    job: Job
    run: Path  # absolute
    meet: str  # host:port of the store
    tag: str  # names the launch in the environment of its processes
    script: tuple[str, ...] = ()  # somebody's own training script and its arguments, instead of the job's model
    options: tuple[str, ...] = ()  # of the hidden command that each rank is
    sites: tuple[Site, ...] = ()  # of each island; empty: all run here
    torchruns: tuple[str, ...] = ()  # of an island of several nodes: what starts them; empty: one torchrun, here


def take_torchruns() -> tuple[str, ...]:
    """What TORCHRUN_VARIABLE holds, which is gone then: ranks may launch jobs of their own, and those have other nodes."""
    return tuple(shlex.split(os.environ.pop(TORCHRUN_VARIABLE, "")))


def folder(run: Path, island: int) -> Path:
    return run / "logs" / f"island{island}"


def start(launch: Launch, island: int, epoch: int, step: int) -> subprocess.Popen[bytes]:
    """Start an island's torchrun, in a session of its own so that Ctrl-C in the terminal reaches the launcher only."""
    logs = folder(launch.run, island)
    logs.mkdir(parents=True, exist_ok=True)
    forget_news(launch.run, island)
    with (logs / "agent.log").open("ab") as log:
        return subprocess.Popen(
            command(launch, island, epoch),
            env={**os.environ, **environment(launch, island, epoch, step)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def forget_news(run: Path, island: int) -> None:
    for name in _NEWS:
        (folder(run, island) / name).unlink(missing_ok=True)


def command(launch: Launch, island: int, epoch: int) -> list[str]:
    ours = ("dtrain.launch", "train", str(launch.run / "job.toml"), *launch.options)
    site = launch.sites[island] if launch.sites else Site()
    ranks = launch.job.island(island).ranks
    here = [sys.executable, "-m", "dtrain.launch.agent", "--nnodes=1", f"--nproc-per-node={ranks}"]
    return [
        *site.prefix,
        *(launch.torchruns or here),
        f"--rdzv-id={_start_name(launch, epoch)}",  # names the log folder
        "--max-restarts=0",  # an island that is lost goes back to a checkpoint, which only the launcher can arrange
        f"--log-dir={folder(launch.run, island) / 'torchrun'}",
        "--redirects=3",  # 1 stdout + 2 stderr, to files
        "-m",
        *(("dtrain.launch.worker", *launch.script) if launch.script else ours),
    ]


def environment(launch: Launch, island: int, epoch: int, step: int) -> Mapping[str, str]:
    job = launch.job
    threads = job.islands.threads or max(1, (os.cpu_count() or 1) // job.ranks_beside(island))
    return {
        "DTRAIN_RUN": str(launch.run),
        "DTRAIN_JOB": str(launch.run / "job.toml"),
        "DTRAIN_ISLAND": str(island),
        "DTRAIN_NUM_ISLANDS": str(job.islands.count),
        "DTRAIN_MEET": launch.meet,
        "DTRAIN_EPOCH": str(epoch),
        "DTRAIN_RESUME_STEP": str(step),
        "GLOO_SOCKET_IFNAME": job.island(island).interface or "lo",
        "OMP_NUM_THREADS": str(threads),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1",  # seconds from SIGTERM to SIGKILL; torchrun's 30 would outlast the launcher's 5
        **({"DTRAIN_NUM_LANES": str(max(job.island(k).ranks for k in range(job.islands.count)))} if job.uneven else {}),
        **(gpus.asked(job, island) if not launch.torchruns else {}),
        TAG_VARIABLE: launch.tag,
        PARENT_VARIABLE: str(os.getpid()),
    }


def last_word(run: Path, island: int) -> ErrorNote:
    """Why an island that failed says it did; one that was killed says nothing."""
    return read_error(folder(run, island)) or ErrorNote("bug", "it left no message")


def last_lines(run: Path, island: int, count: int = 12) -> tuple[Path, list[str]]:
    """The end of what the island's newest start wrote to stderr, or, where no rank came that far, of torchrun's own log.

    Of several ranks with a traceback the first to end is shown: what the others say is its echo."""
    starts = sorted(folder(run, island).glob("torchrun/*"), key=_changed)
    ranks = sorted(starts[-1].glob("attempt_0/*/stderr.log"), key=_changed) if starts else []
    texts = [(log, log.read_text(encoding="utf-8", errors="replace")) for log in ranks]
    texts.sort(key=lambda entry: _TRACEBACK not in entry[1])
    agent = folder(run, island) / "agent.log"
    if agent.exists():
        texts.append((agent, agent.read_text(encoding="utf-8", errors="replace")))
    log, text = next(((log, text) for log, text in texts if text.strip()), (folder(run, island), ""))
    return log, text.splitlines()[-count:]


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def _start_name(launch: Launch, epoch: int) -> str:
    """Where an island has several torchruns, which need to name it alike, one that all can know."""
    return f"epoch{epoch}" if launch.torchruns else f"epoch{epoch}-{launch.tag}"


def say_stdout(run: Path, island: int) -> None:
    """By rank 0: that it prints to where its stdout goes."""
    write_whole(folder(run, island) / _PRINTS, os.fsencode(os.readlink("/proc/self/fd/1")), durable=False)


def stdout_log(run: Path, island: int) -> Path | None:
    """Where rank 0 of an island's newest start prints to; None before it has said so."""
    try:
        return Path(os.fsdecode((folder(run, island) / _PRINTS).read_bytes()))
    except FileNotFoundError:
        return None

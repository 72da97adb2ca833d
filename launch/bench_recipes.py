"""Who runs the recipes that are compared? Processes side by side, each a ``dtrain sim``; a finished run is a row at once."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from dtrain import comparison
from dtrain.comparison import BASELINE, Entry, Row
from dtrain.config import Job, dump_job
from dtrain.data.corpus import corpus_of
from dtrain.data.tokens import BYTES
from dtrain.launch.checks import check_answers, check_text, read_job, resolved
from dtrain.launch.hardware import cpu_name
from dtrain.launch.processes import PARENT_VARIABLE
from dtrain.methods import RULES
from dtrain.outer_rows import OUTER
from dtrain.own_name import OWN_AXES, is_own
from dtrain.recipes import RECIPES
from dtrain.topology import is_file

JOB = Path(__file__).resolve().parent / "jobs" / "bench.toml"
JOBS = {"gossip": JOB, "diloco": JOB.with_name("bench_diloco.toml")}
"""Family -> its job: the outer loops' has fewer islands and a larger model, as a round is many steps and many parameters."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One run that is not in the file yet."""

    entry: Entry
    budget: float
    seed: int
    job: Job
    digest: str
    """Of the job file, and of all files that the job names."""


@dataclass(frozen=True, slots=True)
class Failed:
    wanted: Wanted
    said: str
    """The last line of its stderr."""


def family(name: str) -> list[str]:
    """All-reduce, islands that never talk, and the recipes of a family."""
    if name not in JOBS:
        raise ValueError(f"--family {name} is not known; use one of {', '.join(JOBS)}")
    outer = {row.name for row in OUTER} | {"demo"}
    both = (BASELINE, "local", "single_merge")
    trains = [row.name for row in RECIPES.values() if row.name not in both and RULES[row.algorithm].simulated is None]
    return [*both, *(row for row in trains if (row in outer) == (name == "diloco"))]


def wanted(
    job_file: Path,
    entries: Sequence[Entry],
    budgets: Sequence[float],
    seeds: Sequence[int],
    islands: int | None,
    done: Sequence[Row],
) -> list[Wanted]:
    """The runs that ``done`` has not, the cheapest budgets first, then seed by seed, so that pairs are soon complete.

    Raises ValueError where one of them cannot run."""
    have, digest_of = {row.key for row in done}, digests(job_file, entries, islands)
    runs = []
    for budget in sorted(budgets):
        for seed in seeds:
            for entry in entries:
                job = _job(job_file, entry, budget, seed, islands)
                _check(job)
                if (entry.name, budget, seed, job.islands.count, digest_of[entry.name]) not in have:
                    runs.append(Wanted(entry, budget, seed, job, digest_of[entry.name]))
    for run in runs[:1]:  # all share islands, model and text
        check_text(run.job)
    return runs


def _check(job: Job) -> None:
    if job.sim.problem != "gpt":
        raise ValueError(f'sim.problem = "{job.sim.problem}" has no text to compare recipes on; leave it out, or use "gpt"')
    if job.data.source.endswith(".bin") and job.data.tokenizer == BYTES:
        raise ValueError(
            f'data.source = "{job.data.source}" is tokens that stand for nobody knows how many bytes, and recipes are compared '
            "by bits a byte; say what made it, data.tokenizer=tokenizer.json"
        )
    check_answers(job, "sim")


def digests(job_file: Path, entries: Sequence[Entry], islands: int | None) -> dict[str, str]:
    """Entry's name -> digest of its runs."""
    said = comparison.digest(job_file.read_text(encoding="utf-8"))
    return {entry.name: _with_files(said, _job(job_file, entry, 1.0, 0, islands)) for entry in entries}


def _with_files(said: str, job: Job) -> str:
    """The digest ``said`` of the job file, and of the files that the job names, where there are any. What an own recipe's file
    imports is not seen, nor is the library of another Python, where data.source = "stdlib"."""
    content = dict[str, str]()
    for axis in OWN_AXES:
        name = getattr(job.sync, axis)
        if name is not None and is_own(name):
            content[axis] = _sha256(Path(name.rpartition(":")[0]))
    if job.sync.graph is not None and is_file(job.sync.graph):
        content["graph"] = _sha256(Path(job.sync.graph))
    if job.data.source != "stdlib":
        content["text"] = corpus_of(job.data).hash
    return hashlib.sha256(json.dumps([said, content]).encode()).hexdigest()[:12] if content else said


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _job(job_file: Path, entry: Entry, budget: float, seed: int, islands: int | None) -> Job:
    steps = round(read_job(job_file, simulated=True).train.steps * budget)
    more = [f"train.steps={steps}", f"job.seed={seed}", *([] if islands is None else [f"islands.count={islands}"])]
    return resolved(read_job(job_file, [f"sync.recipe={entry.recipe}", *entry.overrides, *more], simulated=True))


def run_all(runs: Sequence[Wanted], rows_file: Path, at_once: int, say: Callable[[str], None]) -> Iterator[Row | Failed]:
    """Each run's row, when it is finished and in the file; what failed leaves none."""
    alive = list[subprocess.Popen[bytes]]()
    # None is started once those alive are ended: a start and its entry in the list are one.
    starting, ended = threading.Lock(), threading.Event()

    def finish(run: Wanted, home: Path) -> Row | Failed:
        say(f"{run.entry.name}, {run.budget:g}x, seed {run.seed}: {run.job.train.steps} steps")
        with starting:
            if ended.is_set():
                return Failed(run, "it was not started")
            process = _start(run, home)
            alive.append(process)
        if process.wait():
            return Failed(run, _last_line(home / "stderr"))
        return _row(run, json.loads((home / "run" / "summary.json").read_text(encoding="utf-8")))

    with tempfile.TemporaryDirectory(prefix="dtrain-bench-") as folder, ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(finish, run, Path(tempfile.mkdtemp(dir=folder))) for run in runs]
        try:
            for future in as_completed(futures):
                found = future.result()
                if isinstance(found, Row):
                    comparison.append_row(rows_file, found)
                yield found
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            with starting:
                ended.set()
                for process in alive:
                    process.kill()


def _start(run: Wanted, home: Path) -> subprocess.Popen[bytes]:
    section = run.job.job.model_copy(update={"dir": str(home), "name": "run"})
    (home / "job.toml").write_text(dump_job(run.job.model_copy(update={"job": section})), encoding="utf-8")
    command = [sys.executable, "-m", "dtrain.launch", "sim", str(home / "job.toml")]
    environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
    with (home / "stderr").open("wb") as stderr:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)


def _row(run: Wanted, summary: dict[str, object]) -> Row:
    alone = summary["eval_bits_per_byte_islands"]
    assert isinstance(alone, list)
    return Row(
        entry=run.entry.name,
        budget=run.budget,
        seed=run.seed,
        islands=run.job.islands.count,
        steps=run.job.train.steps,
        job=run.digest,
        parameters=int(_number(summary["parameters"])),
        bits_per_byte=_finite(summary["eval_bits_per_byte"]),
        bits_per_byte_islands=None if None in alone else mean(alone),
        consensus_distance=_finite(summary["consensus_distance"]),
        sent_bytes=_number(summary["wire_bytes_sent"]),
        date=datetime.date.today().isoformat(),
        cpu=f"{os.cpu_count()} x {cpu_name()}",
    )


def _number(value: object) -> float:
    assert isinstance(value, int | float), value
    return value


def _finite(value: object) -> float | None:
    return None if value is None else _number(value)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"

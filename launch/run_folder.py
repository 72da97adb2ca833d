"""May this job use its run folder, and from which step does it go on?

A run is never overwritten unasked. ``--resume`` goes on with the job that the folder holds, and lets only those keys change that
do not change what is being trained.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dtrain.config import Job, dump_job, load_job
from dtrain.recipes import AXES, of_section

_MAY_CHANGE = {
    ("train", "steps"),
    ("train", "checkpoint_every"),
    ("train", "keep"),
    ("train", "eval_every"),
    ("train", "consensus_every"),
    ("islands", "count"),
    ("islands", "max_restarts"),
    ("islands", "threads"),
}
# what --fresh removes; a person's own notes in a run folder stay
_OURS = ("job.toml*", "metrics.jsonl", "summary.json", "loss.png", "*.safetensors", "islands", "checkpoints*", "logs")


@dataclass(frozen=True, slots=True)
class Opened:
    """A run folder that is ready for its islands."""

    job: Job
    run: Path
    resume_step: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """What the command line says about a run folder that is there already."""

    resume: bool = False
    fresh: bool = False
    fresh_name: bool = False

    def __post_init__(self) -> None:
        if self.resume + self.fresh + self.fresh_name > 1:
            raise ValueError("--resume, --fresh and --fresh-name exclude each other; give one of them")


@contextmanager
def open_run(job_path: Path, overrides: Sequence[str], choice: Choice, *, script: bool = False) -> Iterator[Opened]:
    """Check the job, lock its run folder as long as the launch lasts, and write job.toml into it."""
    job = load_job(job_path, overrides)
    if not script:  # a script may choose a recipe and data of its own
        job = resolved(job)
        check_input(job)
    if choice.fresh_name:
        job = _with_free_name(job)
    run = Path(job.job.dir, job.job.name)
    if (run / "job.toml").exists() and not choice.resume and not choice.fresh:
        raise ValueError(
            f"{run} holds a run already; go on with --resume, replace it with --fresh, or take another name with --fresh-name"
        )
    if choice.resume and not (run / "job.toml").exists():
        raise ValueError(f"{run} holds no run to resume; leave --resume out to start it")
    if run.is_dir() and not (run / "job.toml").exists() and any(run.iterdir()):
        raise ValueError(f"{run} is not empty and holds no run; choose another job.name or job.dir")
    kept = _resumed_job(run, overrides) if choice.resume else None
    if kept is not None and not script:
        check_input(kept)
    with _writing(run):
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, run)
        with _writing(run):
            opened = _prepare(run, job, kept)
        yield opened
    finally:
        os.close(descriptor)  # and with it the lock


def resume_step_of(run: Path) -> int:
    """The step that a start goes on from: the newest commit, else merged weights of another number of islands, else 0."""
    if not (run / "checkpoints").is_dir() and not (run / "init.safetensors").exists():
        return 0
    from dtrain.checkpoint import newest_commit, weights_step

    step = newest_commit(run)
    if step is not None:
        return step
    merged = run / "init.safetensors"
    return weights_step(merged) if merged.exists() else 0


def resolved(job: Job) -> Job:
    """The job with every answer of its recipe written out, so that a run stays what it is when a recipe's row changes.

    Raises ValueError for answers that do not fit together."""
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    answers = {"recipe": recipe.name} | {axis: getattr(recipe, axis) for axis in AXES}
    return job.model_copy(update={"sync": job.sync.model_copy(update=answers)})


def check_input(job: Job) -> None:
    """What would make every island fail at once is said before anything is written."""
    source = job.data.source
    if source != "stdlib" and not Path(source).exists():
        raise ValueError(f'data.source = "{source}" is not there; name a text file, a folder or a token file, or use "stdlib"')


def _with_free_name(job: Job) -> Job:
    names = (job.job.name, *(f"{job.job.name}-{number}" for number in range(2, 10_000)))
    free = next(name for name in names if not Path(job.job.dir, name).exists())
    return job.model_copy(update={"job": job.job.model_copy(update={"name": free})})


def _resumed_job(run: Path, overrides: Sequence[str]) -> Job:
    """The folder's job with the overrides; raises ValueError naming a key that may not change."""
    old, new = load_job(run / "job.toml"), load_job(run / "job.toml", overrides)
    if old.sync.algorithm is not None:  # not a script's
        new = resolved(new)
    for section in Job.model_fields:
        before, after = getattr(old, section).model_dump(), getattr(new, section).model_dump()
        for key in before:
            if before[key] != after[key] and section != "link" and (section, key) not in _MAY_CHANGE:
                allowed = ", ".join(f"{s}.{k}" for s, k in sorted(_MAY_CHANGE))
                raise ValueError(
                    f"{section}.{key} = {after[key]!r} differs from the run's {before[key]!r}; a resumed run may change "
                    f"{allowed} and link.*; start another run with --fresh-name"
                )
    return new


def _prepare(run: Path, job: Job, kept: Job | None) -> Opened:
    if kept is not None:
        _write_job(run / "job.toml.new", kept)  # first, so that a folder that cannot be written is left as it was
        step, notes = _resume(run, load_job(run / "job.toml"), kept)
        os.replace(run / "job.toml.new", run / "job.toml")
        return Opened(kept, run, step, (*notes, *_kept_note(job, kept)))
    for entry in (path for pattern in _OURS for path in run.glob(pattern)):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    _write_job(run / "job.toml", job)
    return Opened(job, run, 0)


def _resume(run: Path, old: Job, new: Job) -> tuple[int, tuple[str, ...]]:
    from dtrain import checkpoint
    from dtrain.metrics import cut_back

    checkpoint.commit_ready(run, old.islands.count, old.train.keep)  # the launcher may have been killed just before it did
    checkpoint.discard_partial(run)
    notes: list[str] = []
    commit = checkpoint.newest_commit(run)
    if commit is not None and new.islands.count != old.islands.count:
        notes.append(checkpoint.merge_for_resume(run, commit, old.islands.count))
        _set_aside(run, old.islands.count)
    step = resume_step_of(run)
    notes.append(f"resuming from step {step}" if step else "there is no checkpoint yet: starting from step 0")
    cut_back(run / "metrics.jsonl", step)
    return step, tuple(notes)


def _kept_note(asked: Job, kept: Job) -> tuple[str, ...]:
    """A job file that was edited since is not what goes on; that must not pass in silence."""
    ours, theirs = kept.model_dump(), asked.model_dump()
    names = [f"{section}.{key}" for section in ours for key in ours[section] if ours[section][key] != theirs[section][key]]
    return (f"kept as the run has it, not as the job file says: {', '.join(names)}",) if names else ()


def _set_aside(run: Path, num_islands: int) -> None:
    names = (f"checkpoints.islands{num_islands}", *(f"checkpoints.islands{num_islands}-{n}" for n in range(2, 10_000)))
    (run / "checkpoints").rename(run / next(name for name in names if not (run / name).exists()))


def _write_job(path: Path, job: Job) -> None:
    path.write_text(dump_job(job), encoding="utf-8")


def _lock(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{run} is in use by another dtrain; wait for its end, or take another name with --fresh-name") from None


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ValueError(f"the run folder {run} cannot be written: {e.strerror or e}; set job.dir to a folder that can") from None

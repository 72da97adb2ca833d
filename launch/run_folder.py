"""May this job use its run folder? A run is never overwritten unasked, and nothing is deleted before all else is known to be
right."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.config import Job, runs_a_script
from dtrain.launch.checks import How, check_input, read_job, resolved, roundless, with_absolute_paths
from dtrain.launch.left_out import left_out
from dtrain.launch.resume import go_on, is_finished, remove, resumed_job, write_job

# What --fresh removes, what a kill left behind among it; a person's own notes in a run folder stay. First what a resume would go
# on from: were the launcher killed in between, the old run would begin anew, and not go on without its past.
_OURS = (
    *("checkpoints", "init.safetensors", "logs", "checkpoints.islands*"),
    *("metrics.jsonl", "summary.json", "virtual.json", "loss.png", "model.safetensors", "config.json", "islands", "trace.json"),
    *("tensorboard", "wandb"),
    *(".removing-*", ".writing-*", ".job.toml.*", ".metrics.jsonl.*", ".summary.json.*", ".virtual.json.*", ".loss.png.*"),
)

_LOCK = ".lock"
"""Stays in the folder: who removed it would let in a launch that holds the removed one."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A run folder that is ready for its islands."""

    job: Job
    run: Path
    resume_step: int
    notes: tuple[str, ...] = ()
    finished: bool = False  # no island has anything left to do
    text: str = ""  # the hash of what is trained on; empty where nothing is left to do, or a script reads data of its own


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
def open_run(job_path: Path, overrides: Sequence[str], choice: Choice, *, how: How = "run") -> Iterator[Opened]:
    """Check the job, lock its run folder as long as the launch lasts, and write job.toml into it."""
    job = read_job(job_path, overrides, simulated=how == "sim")
    if how != "script":  # a script may choose a recipe of its own
        job = resolved(job)
    with ExitStack() as held:
        run = _folder_of(job_path, job, choice)
        if choice.fresh_name:
            job = job.model_copy(update={"job": job.job.model_copy(update={"name": run.name})})
        with _usable(run):
            if run.is_dir():
                _hold(run, choice, held)
            else:
                _refuse_what_is_there(run, choice)
        kept = resumed_job(run, overrides) if choice.resume else None
        if kept is not None and runs_a_script(kept) != (how == "script"):
            ran = "a script" if runs_a_script(kept) else "the job's own model"
            remedy = "name it: --resume -- SCRIPT ARGS" if runs_a_script(kept) else "leave -- SCRIPT out"
            raise ValueError(f"{run} is a run of {ran}; to go on with it {remedy}")
        if kept is not None and is_finished(run, kept):
            said = f"all {kept.train.steps} steps are done: nothing is left but to show what came out"
            yield Opened(kept, run, kept.train.steps, (said, *_kept_note(job, kept)), finished=True)
            return
        text = check_input(kept or job, how)
        with _usable(run):
            if not run.is_dir():
                _make(run)
                _hold(run, choice, held)  # and refuse what a launch that was quicker has left
            opened = _begin(run, job) if kept is None else Opened(kept, run, *go_on(run, kept))
        opened = replace(opened, text=text)
        said = left_out(job_path, overrides, how) if kept is None else _kept_note(job, kept)
        opened = replace(opened, notes=(*opened.notes, *said))
        if how != "script":
            opened = replace(opened, notes=(*opened.notes, *roundless(opened.job)))
        yield opened


@contextmanager
def open_part(job_path: Path, overrides: Sequence[str], choice: Choice, island: int, *, how: How = "run") -> Iterator[Opened]:
    """``open_run`` for one island of a job whose launcher is elsewhere, in a folder NAME-islandK of its own. From which step it
    goes on the launcher says later, and nothing is dropped before: with ``choice.resume`` a folder is used as it is."""
    if choice.fresh_name:
        raise ValueError("--fresh-name is the launcher's to say; give its run's name here, job.name=NAME-2")
    job = read_job(job_path, overrides)
    if how != "script":
        job = resolved(job)
    if island >= job.islands.count:
        raise ValueError(f"--island {island} of {job.islands.count} islands; the last is island {job.islands.count - 1}")
    run = Path(job.job.dir, f"{job.job.name}-island{island}")
    own = job_path.name == "job.toml" and job_path.resolve().parent.name.endswith(f"-island{island}")
    if choice.resume and own and (job_path.parent / "logs" / f"island{island}").is_dir():
        run = job_path.parent
    job = job.model_copy(update={"job": job.job.model_copy(update={"name": run.resolve().name})})
    resumes = choice.resume and (run / "job.toml").exists()
    with ExitStack() as held:
        text = check_input(job, how, island)
        with _usable(run):
            if not run.is_dir():
                _make(run)
            _hold(run, choice if resumes else Choice(fresh=choice.fresh), held)
            if not resumes:
                opened = _begin(run, job)
            else:
                opened = Opened(with_absolute_paths(job), run, 0)
                write_job(run, opened.job)
        yield replace(opened, text=text)


def _folder_of(job_path: Path, job: Job, choice: Choice) -> Path:
    """Where the job says; but a run that is resumed by its own job.toml may have been renamed or moved since."""
    # A job file of a person's own may lie beside a folder named logs; none of hers holds an island.
    if choice.resume and job_path.name == "job.toml" and (job_path.parent / "logs" / "island0").is_dir():
        return job_path.parent
    run = Path(job.job.dir, job.job.name)
    if not choice.fresh_name:
        return run
    with _usable(run):
        names = (run.name, *(f"{run.name}-{number}" for number in range(2, 10_000)))
        return next(path for name in names if not (path := run.with_name(name)).exists())


def _refuse_what_is_there(run: Path, choice: Choice) -> None:
    if (run / "job.toml").exists():
        if not choice.resume and not choice.fresh:
            raise ValueError(
                f"{run} holds a run already; go on with --resume, replace it with --fresh, or take another name with --fresh-name"
            )
        return
    if choice.resume:
        raise ValueError(f"{run} holds no run to resume; leave --resume out to start it")
    unfinished = {run / _LOCK, *run.glob(".job.toml.*")}  # of a launch that was killed in its first moment
    if run.is_dir() and set(run.iterdir()) - unfinished:
        raise ValueError(f"{run} is not empty and holds no run; choose another job.name or job.dir")


def _make(run: Path) -> None:
    """Where it cannot be made, the folders above it are not left behind either."""
    above = [folder for folder in run.parents if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError:
        for folder in above:
            if folder.exists():
                folder.rmdir()
        raise


def _begin(run: Path, job: Job) -> Opened:
    """job.toml is what makes a folder a run: it is replaced last, and never missing in between."""
    kept = with_absolute_paths(job)
    remove(_ours(run))
    write_job(run, kept)
    return Opened(kept, run, 0)


def _ours(run: Path) -> list[Path]:
    return [path for pattern in _OURS for path in run.glob(pattern)]


def _kept_note(asked: Job, kept: Job) -> tuple[str, ...]:
    """A job file that was edited since is not what goes on; that must not pass in silence."""
    ours, theirs = kept.model_dump(), with_absolute_paths(asked).model_dump()
    places = {("job", "dir"), ("job", "name")}  # of a folder that was moved
    names = [
        f"{section}.{key}"
        for section in ours
        for key in ours[section]
        if ours[section][key] != theirs[section][key] and (section, key) not in places
    ]
    return (f"kept as the run has it, not as the job file says: {', '.join(names)}",) if names else ()


def _hold(run: Path, choice: Choice, held: ExitStack) -> None:
    """Keep other launches out until ``held`` is left. A lock of the folder leaves no file in one that is refused, but over NFS it
    holds on one machine alone; one of a file that is open for writing holds on all (flock(2)), as jobs of Slurm need."""
    held.enter_context(_locked(run, run, os.O_RDONLY | os.O_DIRECTORY))
    _refuse_what_is_there(run, choice)
    held.enter_context(_locked(run, run / _LOCK, os.O_RDWR | os.O_CREAT))


@contextmanager
def _locked(run: Path, path: Path, flags: int) -> Iterator[None]:
    descriptor = os.open(path, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{run} is in use by another dtrain; wait for its end, or take another name with --fresh-name"
            ) from None
        yield
    finally:
        os.close(descriptor)  # and with it the lock


@contextmanager
def _usable(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ValueError(f"the run folder {run} cannot be written: {e.strerror or e}; set job.dir to a folder that can") from None

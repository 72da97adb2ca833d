"""From where does a run go on, and what may be different when it does?

A resumed run keeps the job that its folder holds; only those keys may change that do not change what is being trained. Whatever
moment the launcher is killed at, the folder can be resumed again and nothing is lost but what was said to be dropped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dtrain import metrics, schedule
from dtrain.config import Job, dump_job, runs_a_script
from dtrain.launch.checks import read_job, resolved, with_absolute_paths
from dtrain.launch.islands import folder

_MAY_CHANGE = {
    ("train", "steps"),
    ("train", "checkpoint_every"),
    ("train", "keep"),
    ("train", "eval_every"),
    ("train", "eval_merged"),
    ("train", "consensus_every"),
    ("islands", "count"),
    ("islands", "max_restarts"),
    ("islands", "threads"),
}
# what the end of a run leaves, and what would pass for the result of one that goes on
_RESULTS = ("summary.json", "loss.png", "model.safetensors", "islands")


def resumed_job(run: Path, overrides: Sequence[str]) -> Job:
    """The folder's job with the overrides; raises ValueError naming a key that may not change."""
    old, new = (with_absolute_paths(read_job(run / "job.toml", changes)) for changes in ((), overrides))
    if not runs_a_script(old):
        _refuse_another_budget(old, new)
        old, new = resolved(old), resolved(new)  # a run's file may be older than a key
    # Of as many islands as before, what each has trained is counted by its speed.
    may_change = _MAY_CHANGE if old.islands.count == new.islands.count else _MAY_CHANGE | {("islands", "speeds")}
    one_by_one = min(old.islands.count, new.islands.count) if old.islands.each or new.islands.each else 0
    for section in Job.model_fields:
        before, after = _answers(old, section, one_by_one), _answers(new, section, one_by_one)
        for key in before | after:
            now, was = after.get(key), before.get(key)
            if now != was and section not in ("link", "log") and (section, key) not in may_change:
                allowed = ", ".join(f"{s}.{k}" for s, k in sorted(may_change))
                raise ValueError(
                    f"{section}.{key} = {now!r} differs from the run's {was!r}; a resumed run may change "
                    f"{allowed}, log.* and link.*; start another run with --fresh-name"
                )
    return new


def _answers(job: Job, section: str, one_by_one: int) -> dict[str, object]:
    """What may not change without a word: of levels by their keys, but for what their links are like; of the first ``one_by_one``
    islands what each is, and not where."""
    said = getattr(job, section).model_dump()
    if said.pop("each", None) is not None or (section == "islands" and one_by_one):
        del said["ranks"], said["engine"]
        for k in range(one_by_one):
            said |= {f"each.{k}.ranks": job.island(k).ranks, f"each.{k}.engine": job.island(k).engine}
    levels: list[dict[str, object]] = said.pop("level", None) or []
    for k, level in enumerate(levels):
        said |= {f"level.{k}.{key}": value for key, value in level.items() if key not in ("rate", "rtt")}
    return said


def is_finished(run: Path, job: Job) -> bool:
    """Whether nothing is left to do for the islands."""
    merged_here = job.island(0).here
    return (not merged_here or (run / "model.safetensors").exists()) and _steps_done(run, job.islands.count) == job.train.steps


def go_on(run: Path, kept: Job) -> tuple[int, tuple[str, ...]]:
    """Make the folder ready to go on with the job ``kept``: the step to go on from, and what a person should know.

    Raises ValueError before anything is lost. The order counts: job.toml changes after all that reads by the old number of
    islands is done, and before checkpoints of the old number are put aside, which a resume that finds them does again."""
    from dtrain import checkpoint

    old = read_job(run / "job.toml")
    checkpoint.commit_ready(run, old.islands.count, old.train.keep)  # the launcher may have been killed just before it did
    commit = checkpoint.newest_commit(run)
    _refuse_going_back(run, old, kept)
    num_islands = kept.islands.count if commit is None else checkpoint.commit_islands(run, commit)
    if num_islands != kept.islands.count and (old.elsewhere or kept.elsewhere):
        raise ValueError(
            f"islands.count = {kept.islands.count} differs from the run's {num_islands}, whose checkpoints lie on several hosts "
            "and cannot be merged here; start another run with --fresh-name"
        )
    if commit is not None and num_islands != kept.islands.count:
        checkpoint.merge_for_resume(run, commit, num_islands)
    checkpoint.discard_partial(run)
    write_job(run, kept)
    if num_islands != kept.islands.count:
        _set_aside(run, num_islands)
    step = resume_step_of(run)
    notes = [*_changes(old, kept)]
    if checkpoint.newest_commit(run) is None and (run / "init.safetensors").exists():
        notes.append(checkpoint.merged_note(run / "init.safetensors"))
    notes.append(f"resuming from step {step}" if step else "there is no checkpoint yet: starting from step 0")
    if step < kept.train.steps or num_islands != kept.islands.count:
        remove(run / name for name in _RESULTS)
    metrics.cut_back(run / "metrics.jsonl", step)
    return step, tuple(notes)


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


def write_job(run: Path, job: Job) -> None:
    metrics.write_whole(run / "job.toml", dump_job(job).encode())


def remove(entries: Iterable[Path]) -> None:
    """Each whole or not at all: a kill in between leaves no folder that lacks half of its files and still looks like one."""
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            gone = entry.with_name(f".removing-{entry.name}")
            if gone.exists():
                shutil.rmtree(gone)
            entry.rename(gone)
            shutil.rmtree(gone)
        else:
            entry.unlink(missing_ok=True)


def _refuse_another_budget(old: Job, new: Job) -> None:
    said = old.sync.schedule
    if said is not None and schedule.parse(said) is not None and new.train.steps != old.train.steps:
        raise ValueError(
            f'train.steps = {new.train.steps} differs from the run\'s {old.train.steps}, over which sync.schedule = "{said}" '
            f"spends its rounds; go on with train.steps={old.train.steps}, or start another run with --fresh-name"
        )


def _refuse_going_back(run: Path, old: Job, kept: Job) -> None:
    start, steps = resume_step_of(run), kept.train.steps
    reached = max(start, _steps_done(run, old.islands.count) or 0)
    if steps < reached:
        raise ValueError(
            f"train.steps = {steps} is less than the {reached} steps that {run} has behind it; use {reached} or more, or start "
            f"another run with --fresh-name"
        )
    if (steps, kept.islands.count) == (old.train.steps, old.islands.count) or not (run / "model.safetensors").exists():
        return
    from dtrain.checkpoint import weights_step

    ended = weights_step(run / "model.safetensors")
    if ended > start:
        raise ValueError(
            f"{run} ended at step {ended} and kept no checkpoint to go on from, so that its training would be thrown away; "
            f"begin again with --fresh and train.checkpoint_every above 0"
        )


def _steps_done(run: Path, num_islands: int) -> int | None:
    """The steps after which all islands ended; None where one has not, or the number of islands was another."""
    steps: list[int] = []
    for island in range(num_islands):
        try:
            part = metrics.read_part(folder(run, island))
        except ValueError:  # not there, or of another version
            return None
        if part.islands != num_islands:
            return None
        steps.append(part.steps)
    return min(steps)


def _changes(old: Job, kept: Job) -> Iterator[str]:
    """What a changed key does that one would not expect of it."""
    if kept.train.steps != old.train.steps:
        yield (
            f"train.steps is {kept.train.steps}, was {old.train.steps}: the learning rate follows the schedule of the new length "
            f"from here on"
        )
    if kept.islands.threads != old.islands.threads:
        yield f"islands.threads is {kept.islands.threads}, was {old.islands.threads}: results may differ in the last bits"


def _set_aside(run: Path, num_islands: int) -> None:
    names = (f"checkpoints.islands{num_islands}", *(f"checkpoints.islands{num_islands}-{n}" for n in range(2, 10_000)))
    (run / "checkpoints").rename(run / next(name for name in names if not (run / name).exists()))

"""How does a run stand, seen from another process? Its folder is read, a little at a time, into a frozen State; never written."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dtrain.config import Job, load_job, runs_a_script
from dtrain.launch.islands import folder
from dtrain.launch.launcher_word import Word, goes_on, is_seen_here, path_of, read_word
from dtrain.launch.progress import IslandView, Progress
from dtrain.launch.status_links import Level, Link, links

MOST_POINTS = 500
"""Of a curve; a longer one is of means."""
RATE_OVER_S = 30.0
"""A link's rate is a mean over so many seconds of the island's clock."""
STOPPED, LOST, ELSEWHERE = "stopped", "lost", "elsewhere"
"""What is said of islands that had not finished when their run ended; and of those of which a site is told nothing."""
LATELY_S = 600.0
"""A run that goes on writes more often, also while islands wait."""
Point = tuple[int, float]


@dataclass(frozen=True, slots=True)
class IslandState:
    """What is known of one island; bytes, tokens and seconds are counted from the start of the run."""

    view: IslandView
    restarts: int
    tokens: int
    wire_bytes_received: int
    time_s: float
    eval_loss: float | None
    """The newest of its own model on the held-out text, in nats a token."""
    curve: tuple[Point, ...]
    """(step, training loss in nats a token), MOST_POINTS at most."""
    level_bytes_per_s: tuple[tuple[Level, float], ...] = ()

    @property
    def lost(self) -> bool:
        return bool(self.view.note) and self.view.note != STOPPED


@dataclass(frozen=True, slots=True)
class State:
    """A run at one moment."""

    run: Path
    name: str
    recipe: str
    phase: Literal["running", "ended"]
    how: str
    """Of a run that has ended; empty while it goes on."""
    epoch: int
    """How often all islands were set back to a commit."""
    committed_step: int | None
    """The newest checkpoint that all islands have written."""
    quiet_s: float
    """Seconds since anything was written."""
    islands: tuple[IslandState, ...]
    merged: tuple[Point, ...]
    """(step, the merged model's loss on the held-out text)."""
    links: tuple[Link, ...] | None
    """None where they are too many to be shown."""
    part: int | None = None
    """The one island of which anything is known, where the run's folder is its site's and not the launcher's."""
    launcher: str = ""
    """Of a part's folder: HOST:PORT of the launcher."""

    @property
    def seen(self) -> tuple[IslandState, ...]:
        """The islands of which anything is known."""
        return self.islands if self.part is None else (self.islands[self.part],)

    @property
    def unseen(self) -> str:
        """What cannot be known here, in words; empty where all is."""
        if self.part is None:
            return ""
        return f"this is the site of island {self.part}: what the others do is seen where the launcher is, {self.launcher}"

    def bytes_per_s(self, link: Link) -> float | None:
        """What its sender sends on that level, by the link's share; None where nothing is sent."""
        rate = dict(self.islands[link.sender].level_bytes_per_s).get(link.level)
        return None if rate is None else rate * link.share


class Reader:
    """Reads one run again and again, and of what islands append only what is new. Not for two threads at once."""

    def __init__(self, run: Path) -> None:
        if not (run / "job.toml").is_file():
            raise ValueError(f"{run} is no run folder (it holds no job.toml); name one, as in runs/quickstart")
        self.run = run
        self._job_file: tuple[int, int, int] | None = None

    def read(self) -> State:
        """Raises ValueError where the folder holds no run any more, or a file in it is broken."""
        self._begin_again_where_the_job_changed()
        word = read_word(self.run)
        part = None if word is None else word.part
        for record in self._progress.records():
            if 0 <= record["island"] < len(self._tracks):
                self._tracks[record["island"]].add(record)
            if record["island"] == (part or 0) and record.get("eval_loss_merged") is not None:  # the same on all
                self._merged.add(record["step"], record["eval_loss_merged"])
        running = word is not None and goes_on(word)
        islands = tuple(self._island(view, word, running=running) for view in self._progress.views())
        return State(
            run=self.run,
            name=self.run.resolve().name,
            recipe=_recipe(self._job),
            phase="running" if running else "ended",
            how="" if running else _how(self.run, word),
            epoch=0 if word is None else word.epoch,
            committed_step=newest_commit(self.run),
            quiet_s=max(0.0, time.time() - max(_changed(self.run))),
            islands=islands,
            merged=_with_the_end(self._merged.points(), self.run, part or 0),
            links=self._links,
            part=part,
            launcher="" if word is None else word.meet,
        )

    def _begin_again_where_the_job_changed(self) -> None:
        """A run may be replaced, or resumed with other islands, while it is watched."""
        try:
            now = (self.run / "job.toml").stat()
        except FileNotFoundError:
            raise ValueError(f"{self.run} holds no run any more") from None
        job_file = now.st_ino, now.st_mtime_ns, now.st_size
        if job_file != self._job_file:
            self._job_file, self._job = job_file, load_job(self.run / "job.toml")
            self._links = links(self._job)
            count = self._job.islands.count
            self._progress = Progress(self.run, count, self._job.train.steps)
            self._tracks, self._merged = [Track() for _ in range(count)], Curve()

    def _island(self, view: IslandView, word: Word | None, *, running: bool) -> IslandState:
        track = self._tracks[view.island]
        if word is not None and word.part not in (None, view.island):
            view = replace(view, state=ELSEWHERE)
        note = word.notes[view.island] if word is not None and view.island < len(word.notes) else ""
        if not running:
            note = "" if view.state in ("done", ELSEWHERE) else LOST if note else STOPPED
        sends = not note and view.state not in ("done", ELSEWHERE)
        rates = track.rates(view.waited_s if view.state == "waiting" else 0.0) if sends else {}
        rate = None if not rates else sum(rates.values())
        return IslandState(
            view=replace(view, note=note, wire_bytes_per_s=rate),
            restarts=word.restarts[view.island] if word is not None and view.island < len(word.restarts) else 0,
            tokens=track.curve.tokens(),
            wire_bytes_received=track.wire_bytes_received,
            time_s=track.time_s,
            eval_loss=track.eval_loss,
            curve=track.curve.points(),
            level_bytes_per_s=tuple(rates.items()),
        )


@dataclass(slots=True)
class _Mean:
    """Of the steps of one point."""

    step: int  # the last of them
    total: float
    count: int
    tokens: int


class Curve:
    """A loss over steps. Points are single steps as long as MOST_POINTS do, then means of 2, 4, 8 ... of them."""

    def __init__(self) -> None:
        self._stride = 1
        self._means: list[_Mean] = []

    def add(self, step: int, loss: float | None, tokens: int = 0) -> None:
        """A step that was made before is made anew: what it and later ones came to is dropped, by whole points."""
        while self._means and self._means[-1].step >= step:
            self._means.pop()
        self._put(self._means, _Mean(step, loss or 0.0, int(loss is not None), tokens))
        while len(self._means) > MOST_POINTS:
            self._stride *= 2
            coarser: list[_Mean] = []
            for mean in self._means:
                self._put(coarser, mean)
            self._means = coarser

    def points(self) -> tuple[Point, ...]:
        """Each mean stands at the last of its steps; idle steps have no loss."""
        return tuple((mean.step, mean.total / mean.count) for mean in self._means if mean.count)

    def tokens(self) -> int:
        return sum(mean.tokens for mean in self._means)

    def _put(self, means: list[_Mean], one: _Mean) -> None:
        if means and (means[-1].step - 1) // self._stride == (one.step - 1) // self._stride:
            last = means[-1]
            last.step, last.total = one.step, last.total + one.total
            last.count, last.tokens = last.count + one.count, last.tokens + one.tokens
        else:
            means.append(one)


@dataclass(slots=True)
class Track:
    """What one island's lines come to."""

    curve: Curve = field(default_factory=Curve)
    time_s: float = 0.0
    wire_bytes_received: int = 0
    eval_loss: float | None = None
    _step: int = 0
    _sent: deque[tuple[float, int, int | None]] = field(default_factory=deque)  # (time_s, all bytes, near ones), the newest last

    def add(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self.curve.add(step, record.get("loss"), record.get("tokens", 0))
        if step <= self._step:
            self._sent.clear()
            self.eval_loss = None
        self._step = step
        self.time_s = record.get("time_s", self.time_s)
        self.wire_bytes_received = record.get("wire_bytes_received", 0)
        self.eval_loss = record.get("eval_loss", self.eval_loss)
        self._sent.append((self.time_s, record.get("wire_bytes_sent", 0), record.get("wire_bytes_sent_near")))
        while len(self._sent) > 1 and self._sent[1][0] <= self.time_s - RATE_OVER_S:
            self._sent.popleft()

    def rates(self, waited_s: float) -> dict[Level, float]:
        """Bytes a second between the newest line and the last that is RATE_OVER_S older (the first, of a younger run). An island
        that waits writes no line, and what it has waited counts as time; nothing where there is none yet."""
        if len(self._sent) < 2:
            return {}
        (began_s, sent_then, near_then), (ended_s, sent_now, near_now) = self._sent[0], self._sent[-1]
        taken_s = ended_s - began_s + waited_s
        if taken_s <= 0:
            return {}
        if near_then is None or near_now is None:
            return {"only": (sent_now - sent_then) / taken_s}
        near = near_now - near_then
        return {"near": near / taken_s, "far": (sent_now - sent_then - near) / taken_s}


def newest_run(runs: Path) -> Path:
    """The newest run below a folder of those that go on, a launcher's first; of all, where none does. One whose launcher's word
    cannot be read, as another version's, is left out. ValueError where none is left."""
    found: list[tuple[int, float, str, Path]] = []
    why = ValueError(f"there is no run in {runs}; start one with dtrain run JOB.toml, or name its folder: dtrain status RUN")
    for run in (path.parent for path in runs.glob("*/job.toml")):
        try:
            changed = max(_changed(run))
            found.append((_goes_on(run, time.time() - changed), changed, run.name, run))
        except ValueError as e:
            why = e
    if not found:
        raise why
    return max(found)[-1]


def _goes_on(run: Path, quiet_s: float) -> int:
    """2 where its launcher does; 1 where a part does, whose launcher's run may be beside it; else 0. Of a process that cannot be
    seen from here, which may have died with its machine, only where the run changed lately."""
    word = read_word(run)
    if word is None or not goes_on(word) or (quiet_s > LATELY_S and not is_seen_here(word)):
        return 0
    return 2 if word.part is None else 1


def _changed(run: Path) -> Iterator[float]:
    """When each file was written that says how far the run is."""
    islands = (path / "status.json" for path in (run / "logs").glob("island*"))
    for path in (run / "job.toml", run / "metrics.jsonl", path_of(run), *islands):
        try:
            yield path.stat().st_mtime
        except FileNotFoundError:
            continue


def _recipe(job: Job) -> str:
    if runs_a_script(job):
        return "a script"
    return " + ".join(str(level.recipe) for level in job.sync.level or [job.sync])


def _how(run: Path, word: Word | None) -> str:
    if word is None:
        if (run / "virtual.json").exists():
            return f"finished, on a virtual clock: its numbers are in {run / 'virtual.json'}"
        finished = (run / "summary.json").exists()
        return "finished" if finished else "not started, or by another version: no launcher has written there"
    if word.exit_status is None:
        who = "the launcher" if word.part is None else f"island {word.part}'s part of the launcher"
        return f"{who} (process {word.process}) is gone without a word, as if killed"
    if word.exit_status == 0:
        return "finished"
    return f"ended with exit status {word.exit_status}{': ' if word.message else ''}{word.message}"


def newest_commit(run: Path) -> int | None:
    """Without torch, which checkpoint.py imports, and whose own import Ctrl-C may have broken off: it is not imported twice."""
    steps = [path.parent.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*/COMMIT")]
    return max(map(int, steps), default=None)


def _with_the_end(merged: tuple[Point, ...], run: Path, island: int) -> tuple[Point, ...]:
    """And with the merged model's loss at the end, which each island's share of the summary tells of."""
    try:
        part = json.loads((folder(run, island) / "part.json").read_bytes())
    except FileNotFoundError:
        return merged
    step, loss = part["steps"], part["eval_loss"]
    return merged if loss is None or (merged and merged[-1][0] >= step) else (*merged, (step, loss))

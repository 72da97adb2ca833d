"""How are all islands of a job run on this machine? Started, watched, started again when one is killed, and always ended.

The launcher owns the meeting point. Every tenth of a second it reads what the islands write, commits the checkpoints that all
islands have written, and lets ``decide`` say what to do about islands that ended.
"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from dtrain.config import Job
from dtrain.launch import islands, meeting, processes
from dtrain.launch.decide import Done, Restart, Seen, Stop, decide
from dtrain.launch.launcher_word import WordFile
from dtrain.launch.progress import IslandView, Progress, Tail, slowest_step
from dtrain.launch.resume import resume_step_of
from dtrain.launch.view import LiveView

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_TICK_S = 0.1
_COMMIT_EVERY_S = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Outcome:
    exit_status: int
    message: str = ""
    log: tuple[str, ...] = ()  # the end of a failed island's log


class Stopped(BaseException):
    """A person or a scheduler asked for the end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def run_local(
    job: Job,
    run: Path,
    *,
    resume_step: int,
    script: tuple[str, ...],
    console: Console,
    options: tuple[str, ...] = (),
    sites: tuple[islands.Site, ...] = (),
) -> Outcome:
    """Run a job to its end; when this returns or raises, no process of it is left. ``options`` are given to each rank; ``sites``
    say where each island runs, if not here."""
    listener, meet = meeting.listen(job.link)
    tag = secrets.token_hex(8)
    launch = islands.Launch(job, run.resolve(), meet, tag=tag, script=script, options=options, sites=sites)
    progress = Progress(launch.run, job.islands.count, job.train.steps)
    fleet = Fleet(launch, [Island(i) for i in range(job.islands.count)], resume_step, progress)
    word = WordFile(launch.run, job.islands.count, resume_step)
    # A script prints what it likes, bars among it: so its lines and ours are plain.
    with listener, LiveView(console, bars=not script) as view, stop_signals_raise():
        try:
            for island in fleet.islands:
                fleet.start(island)
            store = meeting.serve(listener)  # imports torch while the islands do
            store.set("regroup", f"0:{resume_step}")
            outcome = _watch(fleet, store, view, word)
        except Stopped as stop:
            outcome = Outcome(128 + stop.number, f"stopped at step {slowest_step(progress.read())}")
        finally:
            _ignore_stop_signals()
            processes.end(launch.tag, [island.agent for island in fleet.islands if island.agent is not None])
    commit(launch)
    word.end(outcome.exit_status, outcome.message)
    return outcome


@dataclass(slots=True)
class Island:
    index: int
    agent: Popen[bytes] | None = None
    restarts: int = 0
    failed_at: float | None = None


@dataclass(slots=True)
class Fleet:
    """The islands of a launch and what is known of them."""

    launch: islands.Launch
    islands: list[Island]
    step: int  # that a start goes on from
    progress: Progress
    epoch: int = 0
    told: tuple[int, list[int]] | None = None  # the epoch, and the islands that were lost in it
    forgotten: int = 0  # words that islands said in this epoch, and all have heard
    views: list[IslandView] = field(default_factory=list)

    def start(self, island: Island) -> None:
        island.agent = islands.start(self.launch, island.index, self.epoch, self.step)
        island.failed_at = None

    def tell_lost(self, seen: Sequence[Seen], store: TCPStore) -> None:
        """To islands that would not find out by waiting for them."""
        from dtrain.membership import tell_lost

        lost = [each.island for each in seen if each.state == "failed"]
        if self.told != (self.epoch, lost):
            tell_lost(store, self.epoch, lost)
            self.told = self.epoch, lost

    def forget_words(self, store: TCPStore) -> None:
        from dtrain.membership import forget_words

        self.forgotten = forget_words(store, len(self.islands), self.epoch, self.forgotten)

    def seen(self, now: float) -> list[Seen]:
        views = self.progress.read()
        seen = [self._seen(island, view, now) for island, view in zip(self.islands, views, strict=True)]
        self.views = [_noted(view, island, self._max_restarts) for island, view in zip(self.islands, views, strict=True)]
        return seen

    def restart(self, indices: tuple[int, ...], store: TCPStore) -> str:
        """Set the whole run back to its newest checkpoint, and start the lost islands from there."""
        for index in indices:
            processes.end(self.launch.tag, [], island=index)  # ranks of it that outlived its torchrun
        commit(self.launch)
        self.step = set_back(self.launch.run)
        self.epoch += 1
        self.forgotten = 0
        store.set("regroup", f"{self.epoch}:{self.step}")
        for index in indices:
            self.islands[index].restarts += 1
            self.start(self.islands[index])
        names = ", ".join(str(index) for index in indices)
        return f"island {names} was lost and is started again; all islands go on from step {self.step}"

    @property
    def _max_restarts(self) -> int:
        return self.launch.job.islands.max_restarts

    def _seen(self, island: Island, view: IslandView, now: float) -> Seen:
        assert island.agent is not None
        status = island.agent.poll()
        if status is None:
            says_state = (islands.folder(self.launch.run, island.index) / "status.json").exists()
            return Seen(island.index, "running", waiting_for=view.waiting_for, says_state=says_state)
        if status == 0:
            return Seen(island.index, "done")
        if island.failed_at is None:
            island.failed_at = now
        word = islands.last_word(self.launch.run, island.index)
        left = self._max_restarts - island.restarts
        return Seen(island.index, "failed", word.kind, word.message, now - island.failed_at, left)


def commit(launch: islands.Launch) -> None:
    """COMMIT for every step that all islands have written; nothing to do, and no torch to import, before the first."""
    if (launch.run / "checkpoints").is_dir():
        from dtrain.checkpoint import commit_ready

        commit_ready(launch.run, launch.job.islands.count, launch.job.train.keep)


def set_back(run: Path) -> int:
    """Drop what lies after the newest committed step, and say which it is."""
    if (run / "checkpoints").is_dir():
        from dtrain.checkpoint import discard_partial

        discard_partial(run)
    step = resume_step_of(run)
    if (run / "metrics.jsonl").exists():
        from dtrain.metrics import cut_back

        cut_back(run / "metrics.jsonl", step)
    return step


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal raise Stopped, the first time."""

    def stop(number: int, frame: FrameType | None) -> None:
        _ignore_stop_signals()  # the end takes a few seconds and must not be cut short by an impatient second Ctrl-C
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore_stop_signals() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _watch(fleet: Fleet, store: TCPStore, view: LiveView, word: WordFile) -> Outcome:
    launch, committed_at = fleet.launch, 0.0
    printed = _Printed(launch)
    while True:
        now = time.monotonic()
        if now - committed_at > _COMMIT_EVERY_S:
            commit(launch)
            fleet.forget_words(store)
            committed_at = now
        seen = fleet.seen(now)
        fleet.tell_lost(seen, store)
        word.say(fleet.epoch, fleet.step, [island.restarts for island in fleet.islands], [island.note for island in fleet.views])
        view.show(fleet.views, now)
        for line in printed.lines(fleet.epoch):
            view.line(line)
        trained = any(island.loss is not None and island.step > fleet.step for island in fleet.views)
        match decide(seen, trained=trained, script=bool(launch.script)):
            case Done():
                for line in printed.lines(fleet.epoch):
                    view.line(line)
                return Outcome(0)
            case Restart(lost):
                view.line(fleet.restart(lost, store))
            case Stop(exit_status, message, show):
                return Outcome(exit_status, message, () if show is None else _end_of_log(launch.run, show))
            case None:
                time.sleep(_TICK_S)


class _Printed:
    """What rank 0 of island 0 prints, where it runs somebody's script."""

    def __init__(self, launch: islands.Launch) -> None:
        self._launch = launch
        self._tail: Tail | None = None

    def lines(self, epoch: int) -> list[str]:
        if not self._launch.script:
            return []
        newest = next((log for e in range(epoch, -1, -1) if (log := islands.stdout_log(self._launch, 0, e))), None)
        if newest is not None and (self._tail is None or self._tail.path != newest):
            self._tail = Tail(newest)
        return self._tail.lines() if self._tail is not None else []


def _end_of_log(run: Path, island: int) -> tuple[str, ...]:
    log, lines = islands.last_lines(run, island)
    return (f"the end of {log}:", *(f"  {line}" for line in lines))


def _noted(view: IslandView, island: Island, max_restarts: int) -> IslandView:
    if island.failed_at is None:
        return view
    left = island.restarts < max_restarts
    note = f"lost; will be started again ({island.restarts + 1} of {max_restarts})" if left else "lost; no restarts are left"
    return replace(view, note=note)

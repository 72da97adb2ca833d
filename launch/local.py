"""How are all islands of a job run, here and elsewhere? Started, watched, started again when one is killed, and always ended.

The launcher owns the meeting point. Every tenth of a second it reads what the islands write, commits the checkpoints that all
islands have written, and lets ``decide`` say what to do about islands that ended. Where an island runs is its own ``Launcher``'s
to know (``launchers.py``, ``elsewhere.py``).
"""

from __future__ import annotations

import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from dtrain.config import Job
from dtrain.launch import islands, meeting, processes
from dtrain.launch.decide import Done, Restart, Seen, Stop, decide
from dtrain.launch.elsewhere import Call, There
from dtrain.launch.launcher_word import WordFile
from dtrain.launch.launchers import Here, Launcher, Look
from dtrain.launch.part_words import contents, say_commits, say_job, say_started
from dtrain.launch.progress import IslandView, Progress, Tail, slowest_step
from dtrain.launch.resume import resume_step_of
from dtrain.launch.view import LiveView

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

_TICK_S = 0.1
_COMMIT_EVERY_S = 0.5
_GOODBYE_S = 8.0
"""How long parts elsewhere may take to hear of the end; a quarter of it where a person waits for the end."""
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
    call: Call | None = None,
    sites: tuple[islands.Site, ...] = (),
    text: str = "",
) -> Outcome:
    """Run a job to its end; when this returns or raises, no process of it is left. ``options`` are given to each rank; without
    ``call`` all islands are on this machine, each where ``sites`` say; those elsewhere have the same ``text``, by its hash.
    Raises ValueError where the job says otherwise."""
    if job.elsewhere and call is None:
        said = f'islands.each.{job.elsewhere[0]}.launcher = "{job.island(job.elsewhere[0]).launcher}"'
        raise ValueError(f'{said}: this command runs all islands on this machine; use "local"')
    held = contents(job, text, script)  # before anyone can wait for it
    listener, meet = meeting.listen(job.link)
    tag = secrets.token_hex(8)
    launch = islands.Launch(job, run.resolve(), meet, tag=tag, script=script, options=options, sites=sites)
    progress = Progress(launch.run, job.islands.count, job.train.steps)
    fleet = Fleet(launch, [Island(i, Here(launch, i)) for i in range(job.islands.count)], resume_step, progress)
    word, outcome = WordFile(launch.run, job.islands.count, resume_step), Outcome(1, "the launcher failed")
    # A script prints what it likes, bars among it: so its lines and ours are plain.
    with listener, LiveView(console, bars=not script) as view, stop_signals_raise():
        try:
            if not job.elsewhere:
                fleet.prepare(fleet.everyone, resume_step)
                fleet.start()
            store = meeting.serve(listener)  # imports torch while the islands do
            store.set("regroup", f"0:{resume_step}")
            say_job(store, job, held)
            if not job.elsewhere:
                fleet.say_started(fleet.everyone, store)
            if call is not None and job.elsewhere:
                for k in job.elsewhere:
                    fleet.islands[k].launcher = There(launch, k, store, call, view.line)
                fleet.prepare(fleet.everyone, resume_step)
            outcome = _watch(fleet, store, view, word)
        except Stopped as stop:
            outcome = Outcome(128 + stop.number, f"stopped at step {slowest_step(progress.read())}")
        finally:
            ignore_stop_signals()
            fleet.end(outcome)
    commit(launch, fleet.elsewhere())
    word.end(outcome.exit_status, outcome.message)
    return outcome


@dataclass(slots=True)
class Island:
    index: int
    launcher: Launcher
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
    starting: tuple[int, ...] = ()  # islands that are started once all are ready
    told: tuple[int, list[int]] | None = None  # the epoch, and the islands that were lost in it
    forgotten: int = 0  # words that islands said in this epoch, and all have heard
    committed: list[int] = field(default_factory=list)  # as it was said to those elsewhere
    views: list[IslandView] = field(default_factory=list)

    @property
    def everyone(self) -> tuple[int, ...]:
        return tuple(island.index for island in self.islands)

    def prepare(self, lost: Sequence[int], step: int) -> None:
        self.starting = tuple(sorted({*self.starting, *lost}))
        for island in self.islands:
            island.launcher.prepare(step, lost=island.index in self.starting)

    def ready(self) -> bool:
        return all(island.launcher.ready() for island in self.islands)

    def start(self) -> None:
        """Those that were prepared."""
        for index in self.starting:
            self.islands[index].launcher.start(self.epoch, self.step)
            self.islands[index].failed_at = None
        self.starting = ()

    def say_started(self, indices: Sequence[int], store: TCPStore) -> None:
        """An island that regroups where it runs is not started, and its other nodes must not take it for so."""
        for index in indices:
            say_started(store, index, self.epoch, self.step)

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

    def elsewhere(self) -> dict[int, Set[int]]:
        """The steps that islands on other hosts have written there."""
        found = {island.index: island.launcher.written() for island in self.islands}
        return {index: steps for index, steps in found.items() if steps is not None}

    def commit(self, store: TCPStore) -> None:
        """And say so to those elsewhere."""
        elsewhere = self.elsewhere()
        commit(self.launch, elsewhere)
        if elsewhere:
            from dtrain.checkpoint import committed

            if (steps := committed(self.launch.run)) != self.committed:
                say_commits(store, steps)
                self.committed = steps

    def seen(self, now: float) -> list[Seen]:
        looks = [island.launcher.look(now) for island in self.islands]
        views = self.progress.read()
        seen = [self._seen(*each, now) for each in zip(self.islands, looks, views, strict=True)]
        self.views = [self._noted(*each) for each in zip(self.islands, looks, views, strict=True)]
        return seen

    def set_back(self, indices: tuple[int, ...], store: TCPStore) -> None:
        """Begin to set the whole run back to its newest checkpoint, and to start the lost islands from there."""
        self.commit(store)
        self.prepare(indices, resume_step_of(self.launch.run))

    def restart(self, store: TCPStore) -> str:
        """Once all are ready for it."""
        lost = self.starting
        self.step = set_back(self.launch.run)
        self.epoch += 1
        self.forgotten = 0
        store.set("regroup", f"{self.epoch}:{self.step}")
        for index in lost:
            self.islands[index].restarts += 1
        self.start()
        self.say_started(lost, store)
        names = ", ".join(str(index) for index in lost)
        return f"island {names} was lost and is started again; all islands go on from step {self.step}"

    def end(self, outcome: Outcome) -> None:
        """All processes, here and elsewhere."""
        there = [island.launcher for island in self.islands if isinstance(island.launcher, There)]
        for each in there:
            each.say_end(outcome.exit_status, outcome.message)
        here = [island.launcher for island in self.islands if isinstance(island.launcher, Here)]
        processes.end(self.launch.tag, [agent for each in here for agent in each.agents()])
        gives_up = time.monotonic() + (_GOODBYE_S if outcome.exit_status == 0 else _GOODBYE_S / 4)
        while time.monotonic() < gives_up and not all(each.has_ended() for each in there):
            time.sleep(_TICK_S)
        for each in there:
            each.hang_up()

    @property
    def _max_restarts(self) -> int:
        return self.launch.job.islands.max_restarts

    def _seen(self, island: Island, look: Look, view: IslandView, now: float) -> Seen:
        if look.state == "running":
            return Seen(island.index, "running", waiting_for=view.waiting_for, says_state=look.says_state)
        if look.state == "done":
            return Seen(island.index, "done")
        if island.index in self.starting and look.kind == "bug":
            return Seen(island.index, "running")
        if island.failed_at is None:
            island.failed_at = now
        left = self._max_restarts - island.restarts
        return Seen(island.index, "failed", look.kind, look.message, now - island.failed_at, left)

    def _noted(self, island: Island, look: Look, view: IslandView) -> IslandView:
        if island.failed_at is None:
            return replace(view, note=look.note) if look.note else view
        left = island.restarts < self._max_restarts
        again = f"lost; will be started again ({island.restarts + 1} of {self._max_restarts})"
        return replace(view, note=again if left else "lost; no restarts are left")


def commit(launch: islands.Launch, elsewhere: Mapping[int, Set[int]]) -> None:
    """COMMIT for every step that all islands have written; nothing to do, and no torch to import, before the first."""
    if (launch.run / "checkpoints").is_dir() or any(elsewhere.values()):
        from dtrain.checkpoint import commit_ready

        commit_ready(launch.run, launch.job.islands.count, launch.job.train.keep, elsewhere)


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
        ignore_stop_signals()  # the end takes a few seconds and must not be cut short by an impatient second Ctrl-C
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _watch(fleet: Fleet, store: TCPStore, view: LiveView, word: WordFile) -> Outcome:
    launch, committed_at = fleet.launch, 0.0
    printed, begun = Printed(launch), not fleet.starting
    while True:
        now = time.monotonic()
        if now - committed_at > _COMMIT_EVERY_S and not fleet.starting:
            fleet.commit(store)
            fleet.forget_words(store)
            committed_at = now
        seen = fleet.seen(now)
        fleet.tell_lost(seen, store)
        notes = [v.note if i.failed_at is not None else "" for i, v in zip(fleet.islands, fleet.views, strict=True)]
        word.say(fleet.epoch, fleet.step, [island.restarts for island in fleet.islands], notes)
        view.show(fleet.views, now)
        for line in printed.lines():
            view.line(line)
        trained = any(island.loss is not None and island.step > fleet.step for island in fleet.views)
        match decide(seen, trained=trained, script=bool(launch.script)):
            case Done():
                fleet.commit(store)
                for line in printed.lines():
                    view.line(line)
                return Outcome(0)
            case Restart(lost):
                fleet.set_back(lost, store)
            case Stop(exit_status, message, show):
                return Outcome(exit_status, message, () if show is None else _end_of_log(fleet.islands[show].launcher))
            case None:
                time.sleep(_TICK_S)
        if fleet.starting and fleet.ready():
            if begun:
                view.line(fleet.restart(store))
            else:
                fleet.start()
                fleet.say_started(fleet.everyone, store)
                begun = True


class Printed:
    """What rank 0 of island 0 prints, or of the one that is here, where it runs somebody's script."""

    def __init__(self, launch: islands.Launch, island: int = 0) -> None:
        self._launch, self._island = launch, island
        self._tail: Tail | None = None

    def lines(self) -> list[str]:
        if not self._launch.script:
            return []
        newest = islands.stdout_log(self._launch.run, self._island)
        if newest is not None and (self._tail is None or self._tail.path != newest):
            self._tail = Tail(newest)
        return self._tail.lines() if self._tail is not None else []


def _end_of_log(launcher: Launcher) -> tuple[str, ...]:
    log, lines = launcher.end_of_log()
    return (f"the end of {log}:", *(f"  {line}" for line in lines))

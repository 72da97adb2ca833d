"""What does a site do for its island? Joins the launcher, and does there with the island's processes what it is told.

``dtrain run JOB.toml --island K --meet HOST:PORT``: the island's torchrun, its logs and its checkpoints are here. When it is
started, from which step, and which checkpoints count, is decided where all islands are seen; this part says what it sees of its
own. It ends all that it started when it is told to, when a person stops it, and when the launcher is gone.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING

from rich.console import Console

from dtrain import metrics
from dtrain.config import Job
from dtrain.errors import PeerLost
from dtrain.launch import islands, part_words, processes
from dtrain.launch.closing import EXIT_RESUMABLE, EXIT_USER_ERROR
from dtrain.launch.launcher_word import WordFile
from dtrain.launch.local import Outcome, Printed, Stopped, ignore_stop_signals, stop_signals_raise
from dtrain.launch.part_words import Joined, Line, Order, Report
from dtrain.launch.progress import IslandView, Progress, Tail, read_status
from dtrain.launch.view import LiveView
from dtrain.metrics import ErrorNote, read_error

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from dtrain.launch.timed_store import TimedStore

_TICK_S = 0.1
_REPORT_EVERY_S = 0.5
_SAY_EVERY_S = 2.0
_CONNECT_S = 2.0
_GOODBYE = timedelta(seconds=2)
"""How long the launcher may take to hear that a person has stopped this part."""
_NOTES: Mapping[part_words.State, str] = {"idle": "waits for the launcher", "failed": "lost; the launcher decides"}


def run_part(
    job: Job, run: Path, island: int, meet: str, *, script: tuple[str, ...], console: Console, text: str = ""
) -> Outcome:
    """Keep one island of a job to its end; when this returns or raises, no process of it is left. ``text``: the hash of what it
    trains on, which the launcher's must be.

    Raises PeerLost where the launcher cannot be found within link.timeout_s, or is gone; ValueError where its job is another."""
    tag, torchruns = secrets.token_hex(8), islands.take_torchruns()
    launch = islands.Launch(job, run.resolve(), meet, tag=tag, script=script, torchruns=torchruns)
    held = part_words.contents(job, text, script)  # before the launcher can wait for it
    part, store, line, outcome = Part(launch, island), None, None, Outcome(1, "this part of the launcher failed")
    word = WordFile(launch.run, job.islands.count, 0, part=island, meet=meet)
    with LiveView(console, bars=not script) as view, stop_signals_raise():
        try:
            store = _reach(*address(meet), job.link.timeout_s, view.line)
            from dtrain import checkpoint  # noqa: F401  (seconds of import, before anyone waits for a word of this part)

            line = _join(store, launch, island, held, view.line)
            outcome = _keep(part, line, store, view, word)
        except Stopped as stop:
            outcome = Outcome(128 + stop.number, f"island {island} was stopped here; the launcher ends the job, to be resumed")
            if store is not None and line is not None:
                store.set_timeout(_GOODBYE)
                with suppress(PeerLost):  # it will miss this part in time
                    line.report(part.report("gone"))
        except (PeerLost, ValueError) as e:
            outcome = Outcome(EXIT_RESUMABLE if isinstance(e, PeerLost) else EXIT_USER_ERROR, str(e))
            raise
        finally:
            ignore_stop_signals()
            part.end()
            word.end(outcome.exit_status, outcome.message)
    return outcome


@dataclass(slots=True)
class Part:
    """One island, as its site has it."""

    launch: islands.Launch
    island: int
    agent: Popen[bytes] | None = None
    epoch: int = 0
    starts: int = 0
    step: int = 0
    """That the newest order goes on from."""
    done: int = 0
    trouble: ErrorNote | None = None
    """Why an order could not be carried out."""
    _beat: int = 0
    _lines: Tail = field(init=False)
    _batches: int = 0

    def __post_init__(self) -> None:
        islands.forget_news(self.launch.run, self.island)
        self._skip_lines()

    def carry_out(self, order: Order) -> None:
        """An order that is not the end. What goes wrong is said in the next report."""
        if order.number == self.done:
            return
        try:
            self._set_back(order.step)
            self.step = order.step
            if order.word == "start":
                self.epoch, self.starts = order.epoch, self.starts + 1
                self.agent = islands.start(self.launch, self.island, order.epoch, order.step)
        except ValueError as e:
            self.trouble = ErrorNote("user", str(e))
        self.done = order.number

    def follow(self, commits: list[int]) -> None:
        from dtrain.checkpoint import follow_commits

        if (self.launch.run / "checkpoints").is_dir():
            follow_commits(self.launch.run, self.island, commits, self.launch.job.islands.count)

    def look(self) -> tuple[list[str], Report]:
        """Lines of metrics that are not said yet, and all that is to be seen of the island."""
        from dtrain.checkpoint import written

        run, state = self.launch.run, self.state()
        steps = tuple(sorted(written(run, self.island)))  # before the lines, so that those up to a checkpoint go with it
        lines = self._lines.lines()
        self._batches += bool(lines)
        logs, failed = islands.folder(run, self.island), state == "failed"
        return lines, replace(
            self.report(state),
            written=steps,
            status=read_status(run, self.island),
            error=self.trouble or (read_error(logs) if failed else None),
            part=metrics.read_json(logs / "part.json") if state == "done" and (logs / "part.json").exists() else None,
            log=_end_of(islands.last_lines(run, self.island)) if failed else (),
        )

    def report(self, state: part_words.State) -> Report:
        self._beat += 1
        return Report(self._beat, self.done, state, batches=self._batches)

    def state(self) -> part_words.State:
        if self.trouble is not None:
            return "failed"
        if self.agent is None:
            return "idle"
        status = self.agent.poll()
        return "running" if status is None else "done" if status == 0 else "failed"

    def say(self, word: WordFile) -> None:
        """What ``dtrain status`` cannot read from what the island writes here."""
        restarts, notes = [0] * self.launch.job.islands.count, [""] * self.launch.job.islands.count
        restarts[self.island] = max(0, self.starts - 1)
        notes[self.island] = _NOTES["failed"] if self.state() == "failed" else ""
        word.say(self.epoch, self.step, restarts, notes)

    def end(self) -> None:
        processes.end(self.launch.tag, [] if self.agent is None else [self.agent])

    @property
    def _metrics(self) -> Path:
        return self.launch.run / "metrics.jsonl"

    def _set_back(self, step: int) -> None:
        """Drop what lies after a step, under an island that waits, or was lost. Raises ValueError where the step is not here."""
        from dtrain import checkpoint

        run, count = self.launch.run, self.launch.job.islands.count
        if self.agent is not None and self.agent.poll() is not None:
            processes.end(self.launch.tag, [])  # ranks that outlived their torchrun
        if step and step not in checkpoint.written(run, self.island):
            raise ValueError(f"no checkpoint of island {self.island} at step {step}, where all go on, in {run / 'checkpoints'}")
        later = [known for known in checkpoint.committed(run) if known > step]
        if later:
            raise ValueError(
                f"{run} holds a checkpoint of step {later[-1]}, and the launcher goes on from step {step}; give both --resume, "
                "or begin anew here with --fresh"
            )
        if step:
            checkpoint.mark_commit(run, step, count)
        if (run / "checkpoints").is_dir():
            checkpoint.discard_partial(run)
        metrics.cut_back(self._metrics, step)
        self._skip_lines()
        self.trouble = None

    def _skip_lines(self) -> None:
        """Those that are there: said before, or of an earlier launch."""
        self._lines = Tail(self._metrics)
        self._lines.lines()


def _keep(part: Part, line: Line, store: Store, view: LiveView, word: WordFile) -> Outcome:
    launch, reported_at, said = part.launch, 0.0, Report(0)
    progress, printed = Progress(launch.run, launch.job.islands.count, launch.job.train.steps), Printed(launch, part.island)
    while True:
        now = time.monotonic()
        order, commits = line.ordered(), part_words.commits(store)
        if order is not None and order.word == "end":
            part.end()
            part.done = order.number
        elif order is not None:
            part.carry_out(order)
        if now - reported_at > _REPORT_EVERY_S or (said.state, said.done) != (part.state(), part.done):
            part.follow(commits)
            lines, said = part.look()
            reported_at = now
            if lines:
                line.say_batch(said.batches, lines)
            line.report(said)
        if order is not None and order.word == "end":
            line.report(replace(said, beat=said.beat + 1, state="gone"))
            return Outcome(order.exit_status, order.message)
        part.say(word)
        view.show([_noted(progress.read()[part.island], said)], now)
        for text in printed.lines():
            view.line(text)
        time.sleep(_TICK_S)


def _noted(view: IslandView, said: Report) -> IslandView:
    return replace(view, note=_NOTES[said.state]) if said.state in _NOTES else view


def _end_of(log: tuple[Path, list[str]]) -> tuple[str, ...]:
    return (str(log[0]), *log[1])


def address(meet: str) -> tuple[str, int]:
    """Of --meet; raises ValueError where it is none."""
    host, _, port = meet.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"--meet {meet!r} is no address; write HOST:PORT, as the launcher prints it")
    return host, int(port)


def _reach(host: str, port: int, timeout_s: float, say: Callable[[str], None]) -> TimedStore:
    """The launcher's store, which may be a little late. Raises PeerLost where it is not there within timeout_s."""
    begun = time.monotonic()
    say_at_s = _SAY_EVERY_S
    while True:
        try:
            socket.create_connection((host, port), timeout=min(_CONNECT_S, timeout_s)).close()
            break
        except OSError as e:
            waited_s = time.monotonic() - begun
            if waited_s > timeout_s:
                raise PeerLost((), f"no launcher at {host}:{port} within {timeout_s:g} s ({e.strerror or e}); is it running, and "
                    "is this the address that it printed?") from None  # fmt: skip
            if waited_s > say_at_s:
                say(f"waiting for the launcher at {host}:{port}, {waited_s:.0f} s of {timeout_s:.0f}")
                say_at_s = waited_s + _SAY_EVERY_S
            time.sleep(_TICK_S)
    from dtrain.launch.timed_store import TimedStore

    store = TimedStore(f"{host}:{port}", timeout_s)
    while not part_words.has_job(store):
        if time.monotonic() - begun > timeout_s:
            raise PeerLost((), f"what answers at {host}:{port} said nothing of a job within {timeout_s:g} s")
        time.sleep(_TICK_S)
    return store


def _join(
    store: Store, launch: islands.Launch, island: int, held: part_words.Contents, say: Callable[[str], None]
) -> Line:
    part_words.check_job(store, launch.job, island, held)
    mine = Joined(secrets.token_hex(8), socket.gethostname(), str(launch.run), held)
    line = Line(store, island, mine.nonce)
    line.report(Report(0))
    has = part_words.join(store, island, mine)
    if has != mine:
        raise ValueError(f"--island {island} has joined already, from {has.host}:{has.run}; stop that one first")
    try:
        part_words.check_held(store, launch.job, island, held)  # two sites that came at once
    except ValueError:
        part_words.forget_joined(store, island)
        raise
    say(f"island {island} has joined the launcher at {launch.meet}; its files are in {launch.run}")
    return line

"""How does the launcher have an island at another site? Over ssh, or by somebody there who types the command that it prints.

Either way ``dtrain run JOB.toml --island K --meet HOST:PORT`` runs there, a part of the launcher (``part.py``) that keeps the
island's processes, logs and checkpoints. What it reports becomes the files that an island here would have written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.config import Job, dump_job
from dtrain.launch import islands, part_words, processes
from dtrain.launch.launchers import Look
from dtrain.launch.part_words import Joined, Line, Order, Report, Word
from dtrain.launch.processes import TAG_VARIABLE
from dtrain.metrics import write_error, write_json, write_whole

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_NOTED_S = 5.0
"""A part reports twice a second; after so long without a word one is told."""
_FOLLOWS_S = 2.0
"""How long after its ssh a part's last word may come."""
_SENT_ALONG = ("DTRAIN_KERNELS",)
"""Variables that ssh does not bring along, and on which the arithmetic depends."""
_NAMES_FILES = ("job", "islands", "model", "data", "sync")
"""Sections of a job, with keys that are paths."""


@dataclass(frozen=True, slots=True)
class Call:
    """How ``dtrain run`` was called, as far as it concerns who starts the rest of the job."""

    job_file: Path
    overrides: tuple[str, ...] = ()
    fresh: bool = False
    resume: bool = False
    fresh_name: bool = False
    ssh_config: Path | None = None


def by_hand(call: Call, launch: islands.Launch, island: int) -> str:
    """The command that a site types for its island."""
    named = (f"job.name={launch.job.job.name}",) if call.fresh_name else ()
    words = ["dtrain", "run", str(_job_there(call, launch, island)), *call.overrides, *named, *_part(call, launch, island)]
    return shlex.join(words)


def _job_there(call: Call, launch: islands.Launch, island: int) -> Path:
    """The job file as the site has it: the same, or, of a run that is resumed by its own, that of the site's own run folder."""
    own = call.resume and call.job_file.resolve() == (launch.run / "job.toml").resolve()
    folder = call.job_file.parent
    return folder.with_name(f"{folder.name}-island{island}") / "job.toml" if own else call.job_file


def by_ssh(call: Call, launch: islands.Launch, island: int) -> list[str]:
    """The command that starts an island's part on its host, to be given the job on stdin. Whoever starts it is not asked for a
    password; what else ssh needs to know stands in its own configuration, or in that of --ssh-config."""
    plan = launch.job.island(island)
    assert plan.host is not None, "checked before anything started"
    python = [plan.python or sys.executable, "-m", "dtrain.launch", "run", "-", *_part(call, launch, island)]
    along = [f"{name}={os.environ[name]}" for name in _SENT_ALONG if name in os.environ]
    line = f"cd {shlex.quote(plan.workdir or os.getcwd())} && exec {shlex.join(['env', *along, *python] if along else python)}"
    config = [] if call.ssh_config is None else ["-F", str(call.ssh_config)]
    return ["ssh", "-o", "BatchMode=yes", *config, plan.host, "--", line]


def job_sent(launch: islands.Launch, island: int) -> str:
    """The job that ssh brings. Where the part starts in a folder of its own, files below the launcher's folder are named as they
    lie below that one; others by where they are here."""
    if launch.job.island(island).workdir is None:
        return (launch.run / "job.toml").read_text(encoding="utf-8")
    said = launch.job.model_dump()
    levels: list[dict[str, object]] = said["sync"]["level"] or []
    for keys in (*(said[section] for section in _NAMES_FILES), *levels):
        keys |= {key: _below(os.getcwd(), value) for key, value in keys.items()}
    return dump_job(Job.model_validate(said))


def _below(folder: str, value: object) -> object:
    """As it is named from the folder, where it is a path below it; ``hf:`` may stand before one."""
    return re.sub(rf"^(hf:)?{re.escape(folder)}/", r"\1./", value) if isinstance(value, str) else value


def _part(call: Call, launch: islands.Launch, island: int) -> list[str]:
    flags = [*(["--resume"] if call.resume else []), *(["--fresh"] if call.fresh else [])]
    script = ["--", *_script_there(launch, island)] if launch.script else []
    return ["--island", str(island), "--meet", launch.meet, *flags, *script]


def _script_there(launch: islands.Launch, island: int) -> list[str]:
    """As ``job_sent`` names the job's files."""
    file, *arguments = launch.script
    return [file if launch.job.island(island).workdir is None else str(_below(os.getcwd(), file)), *arguments]


class There:
    """An island that a part of the launcher keeps at another site."""

    def __init__(self, launch: islands.Launch, island: int, store: Store, call: Call, say: Callable[[str], None]) -> None:
        self._launch, self._island, self._store, self._call, self._say = launch, island, store, call, say
        self._timeout_s = launch.job.link.timeout_s
        self._ssh: subprocess.Popen[bytes] | None = None
        self._called_at = self._heard_at = 0.0
        self._ssh_ended_at: float | None = None
        self._joined: Joined | None = None
        self._line: Line | None = None
        self._order = Order(0, "set_back")
        self._report = Report(0)
        self._taken = 0
        """Batches of metrics so far."""

    def prepare(self, step: int, *, lost: bool) -> None:
        if self._line is None:
            self._call_part()
        elif self._report.state != "gone":
            self._give("set_back", step=step)

    def ready(self) -> bool:
        return self._line is not None and self._carried_out

    def start(self, epoch: int, step: int) -> None:
        islands.folder(self._launch.run, self._island).mkdir(parents=True, exist_ok=True)
        islands.forget_news(self._launch.run, self._island)
        self._give("start", epoch=epoch, step=step)

    def look(self, now_s: float) -> Look:
        if self._line is None:
            self._welcome(now_s)
        if self._line is None:
            return self._awaited(now_s)
        report = self._line.reported()
        if report is not None and report.beat != self._report.beat:
            self._heard_at = now_s
            self._take(report)
        gone = self._gone(now_s)
        if gone is not None:
            return gone
        silent_s = now_s - self._heard_at
        note = f"nothing heard of its site, {silent_s:.0f} s of {self._timeout_s:.0f}" if silent_s > _NOTED_S else ""
        if not self._carried_out or self._report.state in ("idle", "running"):
            says_state = self._carried_out and self._report.status is not None
            return Look("running", says_state=says_state, note=note)
        if self._report.state == "done":
            return Look("done")
        word = islands.last_word(self._launch.run, self._island)
        return Look("failed", word.kind, word.message)

    def written(self) -> Set[int]:
        return set(self._report.written) if self._carried_out else set()

    def agents(self) -> list[subprocess.Popen[bytes]]:
        return [] if self._ssh is None else [self._ssh]

    def end_of_log(self) -> tuple[str, list[str]]:
        if not self._report.log:
            return str(self._site_log), self._site_lines()
        log, *lines = self._report.log
        return f"{self._where}:{log}", lines

    def say_end(self, exit_status: int, message: str) -> None:
        """To a part that is there; it ends all that it started."""
        if self._line is not None and self._report.state != "gone":
            self._give("end", exit_status=exit_status, message=message)

    def has_ended(self) -> bool:
        """Whether nothing more will come from a part that was told so."""
        if self._line is None:
            return True
        self._report = self._line.reported() or self._report
        return self._report.state == "gone"

    def hang_up(self) -> None:
        """The end of its ssh, if there is one; the part there has heard of the end by then, or finds the meeting point gone."""
        processes.end(self._ssh_tag, self.agents())

    @property
    def _ssh_tag(self) -> str:
        return f"{self._launch.tag}-ssh{self._island}"

    @property
    def _carried_out(self) -> bool:
        return self._report.done == self._order.number

    @property
    def _where(self) -> str:
        return self._joined.host if self._joined is not None else f"island {self._island}"

    @property
    def _site_log(self) -> Path:
        return islands.folder(self._launch.run, self._island) / "site.log"

    def _site_lines(self) -> list[str]:
        return self._site_log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:] if self._site_log.exists() else []

    def _call_part(self) -> None:
        self._called_at = self._heard_at = time.monotonic()
        folder = islands.folder(self._launch.run, self._island)
        folder.mkdir(parents=True, exist_ok=True)
        islands.forget_news(self._launch.run, self._island)
        if self._launch.job.island(self._island).launcher != "ssh":
            self._say(f"island {self._island} is started at its site, by: {by_hand(self._call, self._launch, self._island)}")
            return
        with self._site_log.open("wb") as log:
            self._ssh = subprocess.Popen(
                by_ssh(self._call, self._launch, self._island),
                env={**os.environ, TAG_VARIABLE: self._ssh_tag},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert self._ssh.stdin is not None
        try:
            self._ssh.stdin.write(job_sent(self._launch, self._island).encode())
            self._ssh.stdin.close()
        except BrokenPipeError:  # it ended already, and its log says why
            pass

    def _welcome(self, now_s: float) -> None:
        self._joined = part_words.joined(self._store, self._island)
        if self._joined is not None:
            self._line, self._heard_at = Line(self._store, self._island, self._joined.nonce), now_s
            self._say(f"island {self._island} has come: its files are in {self._where}:{self._joined.run}")

    def _awaited(self, now_s: float) -> Look:
        if (ended := self._ended_ssh(now_s)) is not None:
            return ended
        waited_s = now_s - self._called_at
        if waited_s > self._timeout_s:
            where = "over ssh" if self._ssh is not None else "from its site"
            return Look("failed", "resumable", f"it did not come {where} within {self._timeout_s:g} s")
        return Look("running", note=f"waiting for its site, {waited_s:.0f} s of {self._timeout_s:.0f}")

    def _gone(self, now_s: float) -> Look | None:
        if self._report.state == "gone":
            return Look("failed", "resumable", f"it was stopped at its site, {self._where}")
        if (ended := self._ended_ssh(now_s)) is not None:
            return ended
        if now_s - self._heard_at > self._timeout_s:
            return Look("failed", "resumable", f"nothing was heard of its site, {self._where}, for {self._timeout_s:g} s")
        return None

    def _ended_ssh(self, now_s: float) -> Look | None:
        """Where ssh has ended, and nothing came through the meeting point since."""
        status = None if self._ssh is None else self._ssh.poll()
        if status is None:
            return None
        if self._ssh_ended_at is None:
            self._ssh_ended_at = now_s
        if now_s - max(self._ssh_ended_at, self._heard_at) < _FOLLOWS_S:
            return None
        said = [line for line in self._site_lines() if line.strip()]
        why = said[-1].removeprefix("dtrain: ") if said else f"ssh ended with status {status}"
        return Look("failed", "user" if status == 2 else "resumable", why)

    def _give(self, word: Word, *, epoch: int = 0, step: int = 0, exit_status: int = 0, message: str = "") -> None:
        assert self._line is not None
        self._order = Order(self._order.number + 1, word, epoch, step, exit_status, message)
        self._line.order(self._order)

    def _take(self, report: Report) -> None:
        """What it says as the files of an island here; what it said before it had heard the newest order is no news."""
        run, folder = self._launch.run, islands.folder(self._launch.run, self._island)
        self._report = report
        assert self._line is not None
        for number in range(self._taken + 1, report.batches + 1):
            _append(run / "metrics.jsonl", self._line.take_batch(number))
        self._taken = report.batches
        if not self._carried_out:
            return
        if report.status is not None:
            write_whole(folder / "status.json", json.dumps(report.status).encode() + b"\n", durable=False)
        if report.error is not None:
            write_error(folder, report.error.kind, report.error.message)
        if report.part is not None:
            write_json(folder / "part.json", report.part)


def _append(path: Path, lines: Sequence[str]) -> None:
    """In one write, as the islands here do it: the file is theirs too."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.write(descriptor, "".join(f"{line}\n" for line in lines).encode())
    finally:
        os.close(descriptor)


def check_hosts(job: Job) -> None:
    """Raises ValueError for an island over ssh of which nobody said where, and for a meeting point that no other host reaches."""
    for k in job.elsewhere:
        if job.island(k).launcher == "ssh" and job.island(k).host is None:
            raise ValueError(f'islands.each.{k}.launcher = "ssh" without a host; say islands.each.{k}.host, or --hosts a,b')
    if job.elsewhere and not (job.link.interface or job.link.advertise):
        raise ValueError(
            f"island {job.elsewhere[0]} is not started here, and the meeting point listens on loopback only; say which network "
            'carries the link, link.interface=eth0 (or lo, where all is on this machine), or link.advertise'
        )

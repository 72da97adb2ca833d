"""What does the launcher say of its run, for those who watch from outside? One small file, ``logs/launcher.json``.

Islands write what they do themselves; only the launcher knows which of them are lost, how often each was started again, and how
the run ended. One that was killed cannot say so: that its process is gone does. A part of a launcher that is elsewhere
(``part.py``) says so of its one island.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from dtrain.metrics import read_json, write_whole


@dataclass(frozen=True, slots=True)
class Word:
    """``process`` is a number of ``machine``, which a later process may get again: ``started`` tells them apart."""

    machine: str
    process: int
    started: int
    epoch: int
    step: int
    """That the newest start goes on from."""
    restarts: tuple[int, ...]
    """Of each island."""
    notes: tuple[str, ...]
    """Of each island: what is known of one that is lost; empty where it runs."""
    exit_status: int | None = None
    """None while the run goes on."""
    message: str = ""
    part: int | None = None
    """Of which island, where it is not the launcher that says this; all else is of that one alone."""
    meet: str = ""
    """Where a part has its launcher."""


class WordFile:
    """Keeps the file up to date; a reader always finds a whole one. Written when something changed, and not synced to disk."""

    def __init__(self, run: Path, num_islands: int, step: int, *, part: int | None = None, meet: str = "") -> None:
        self._path = path_of(run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        nobody = (0,) * num_islands, ("",) * num_islands
        self._word = Word(_machine(), os.getpid(), _started(os.getpid()) or 0, 0, step, *nobody, part=part, meet=meet)
        self._write()

    def say(self, epoch: int, step: int, restarts: Sequence[int], notes: Sequence[str]) -> None:
        word = replace(self._word, epoch=epoch, step=step, restarts=tuple(restarts), notes=tuple(notes))
        if word != self._word:
            self._word = word
            self._write()

    def end(self, exit_status: int, message: str = "") -> None:
        self._word = replace(self._word, exit_status=exit_status, message=message)
        self._write()

    def _write(self) -> None:
        write_whole(self._path, json.dumps(asdict(self._word)).encode() + b"\n", durable=False)


def path_of(run: Path) -> Path:
    return run / "logs" / "launcher.json"


def read_word(run: Path) -> Word | None:
    """None where no launcher has written yet. Raises ValueError for a file that is none of ours."""
    path = path_of(run)
    try:
        content = read_json(path)
    except FileNotFoundError:
        return None
    names = {field.name for field in fields(Word)}
    if content.keys() != names:
        raise ValueError(f"{path} is no word of this launcher: it says {', '.join(content)}; remove it")
    content["restarts"], content["notes"] = tuple(content["restarts"]), tuple(content["notes"])
    return Word(**content)


def goes_on(word: Word) -> bool:
    """Whether the launcher has not ended, as far as can be seen: of a process on another machine (a shared disk), or in another
    container, only its own last word counts."""
    if word.exit_status is not None:
        return False
    return not is_seen_here(word) or _started(word.process) == word.started


def is_seen_here(word: Word) -> bool:
    """Whether its process, if it is there, is one of this boot of this machine, and of this container."""
    return word.machine == _machine()


def _machine() -> str:
    """This boot, and within it the namespace that process numbers are of."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(process: int) -> int | None:
    """When, in clock ticks since the boot; None for one that is gone, or dead and not reaped."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    after_name = stat.rpartition(")")[2].split()  # a name may hold blanks and brackets
    return None if after_name[0] in "ZX" else int(after_name[19])  # proc(5): field 22, and the first after the name is the third

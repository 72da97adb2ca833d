"""How is one island started, looked at, and started again, wherever it runs?

Here, as a torchrun of the launcher's own; or at another site (``elsewhere.py``), by a part of the launcher that runs there.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from subprocess import Popen
from typing import Literal, Protocol

from dtrain.launch import islands, processes


@dataclass(frozen=True, slots=True)
class Look:
    """How an island is."""

    state: Literal["running", "done", "failed"]
    kind: str = ""  # of a failed one: "user", "resumable" or "bug"
    message: str = ""
    says_state: bool = False  # it writes a status.json, so it will say when it waits
    note: str = ""  # what is to be seen of it before it says something itself


class Launcher(Protocol):
    """Of one island. The files of its log folder, and its lines of metrics, are in the launcher's run folder wherever it runs."""

    def prepare(self, step: int, *, lost: bool) -> None:
        """Begin to make ready to go on from a step: an island that is lost for ``start``, the others for the next epoch."""
        ...

    def ready(self) -> bool:
        """Whether what ``prepare`` began is done."""
        ...

    def start(self, epoch: int, step: int) -> None: ...

    def look(self, now_s: float) -> Look:
        """Of one that was prepared."""
        ...

    def written(self) -> Set[int] | None:
        """The steps whose checkpoints it has on another host; None where they lie in the launcher's run folder."""
        ...

    def agents(self) -> list[Popen[bytes]]:
        """The launcher's own children for it."""
        ...

    def end_of_log(self) -> tuple[str, list[str]]:
        """Of an island that failed: where its log is, and its last lines."""
        ...


class Here:
    """On this machine."""

    def __init__(self, launch: islands.Launch, island: int) -> None:
        self._launch, self._island = launch, island
        self._agent: Popen[bytes] | None = None

    def prepare(self, step: int, *, lost: bool) -> None:
        if lost and self._agent is not None:
            processes.end(self._launch.tag, [], island=self._island)  # ranks of it that outlived its torchrun

    def ready(self) -> bool:
        return True

    def start(self, epoch: int, step: int) -> None:
        self._agent = islands.start(self._launch, self._island, epoch, step)

    def look(self, now_s: float) -> Look:
        status = None if self._agent is None else self._agent.poll()
        if status is None:
            return Look("running", says_state=(islands.folder(self._launch.run, self._island) / "status.json").exists())
        if status == 0:
            return Look("done")
        word = islands.last_word(self._launch.run, self._island)
        return Look("failed", word.kind, word.message)

    def written(self) -> None:
        return None

    def agents(self) -> list[Popen[bytes]]:
        return [] if self._agent is None else [self._agent]

    def end_of_log(self) -> tuple[str, list[str]]:
        log, lines = islands.last_lines(self._launch.run, self._island)
        return str(log), lines

"""How far is each island? Read, a little at a time, from the files that the islands write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dtrain.launch.islands import folder

_STAYS = ("every_steps", "rank_mean")
"""What an island writes where a round has landed, and is so until the next has."""


@dataclass(frozen=True, slots=True)
class IslandView:
    """What a person is shown of one island."""

    island: int
    state: str = "starting"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    wire_bytes_sent: int = 0
    wait_s: float = 0.0
    rounds_joined: int | None = None
    rounds_left_out: int | None = None
    every_steps: int | None = None
    rank_mean: float | None = None
    waiting_for: tuple[int, ...] = ()
    waited_s: float = 0.0
    timeout_s: float = 0.0
    note: str = ""  # the launcher's word on an island that is not running, instead of the state
    wire_bytes_per_s: float | None = None  # sent lately; only who watches a while knows


class Tail:
    """New whole lines of a file that others append to; starts over when the file was cut back or replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""
        self._file: tuple[int, int] | None = None

    def lines(self) -> list[str]:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                which = status.st_dev, status.st_ino
                # A file that took another's place may have grown beyond it already.
                if which != self._file or status.st_size < self._offset:
                    self._file, self._offset, self._rest = which, 0, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in whole]


@dataclass(slots=True)
class Progress:
    """The newest view of every island of a run."""

    run: Path
    num_islands: int
    steps: int
    _metrics: Tail = field(init=False)
    _newest: dict[int, dict[str, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._metrics = Tail(self.run / "metrics.jsonl")

    def read(self) -> list[IslandView]:
        self.records()
        return self.views()

    def records(self) -> list[dict[str, Any]]:
        """What islands have written of their steps since the last call."""
        records = [record for line in self._metrics.lines() if (record := _record(line)) is not None]
        for record in records:
            before = self._newest.get(record["island"], {})
            self._newest[record["island"]] = {key: before[key] for key in _STAYS if key in before} | record
        return records

    def views(self) -> list[IslandView]:
        """By the records that were read, and what islands say of themselves now."""
        return [self._view(i) for i in range(self.num_islands)]

    def _view(self, island: int) -> IslandView:
        view = IslandView(island, steps=self.steps)
        record = self._newest.get(island)
        if record is not None:
            view = _with_metrics(view, record)
        return _with_status(view, read_status(self.run, island))


def read_status(run: Path, island: int) -> dict[str, Any] | None:
    try:
        return json.loads((folder(run, island) / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def slowest_step(islands: Iterable[IslandView]) -> int:
    return min((view.step for view in islands), default=0)


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # a writer was killed in the middle of the line
        return None
    return record if isinstance(record, dict) and "island" in record and "step" in record else None


def _with_metrics(view: IslandView, record: dict[str, Any]) -> IslandView:
    return replace(
        view,
        step=record["step"],
        loss=record.get("loss", view.loss),  # an idle step has none
        tokens_per_s=record.get("tokens_per_s", view.tokens_per_s),
        wire_bytes_sent=record.get("wire_bytes_sent", 0),
        wait_s=record.get("wait_s", 0.0),
        **{key: record.get(key) for key in ("rounds_joined", "rounds_left_out", *_STAYS)},
    )


def _with_status(view: IslandView, status: dict[str, Any] | None) -> IslandView:
    if status is None:
        return view
    return replace(
        view,
        state=status["state"],
        step=max(view.step, status["step"]) if view.loss is not None else status["step"],
        steps=status["steps"] or view.steps,
        waiting_for=tuple(status["waiting_for"]) if status["state"] == "waiting" else (),
        waited_s=status["waited_s"],
        timeout_s=status["timeout_s"],
    )

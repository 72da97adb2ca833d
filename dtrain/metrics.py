"""What does a run write down while it trains, and how is it read again?

``metrics.jsonl`` is one line a step and island, appended by all islands to one file. Each island's log folder
holds ``status.json`` (now), ``error.json`` (why it stopped) and ``part.json`` (its share of the summary).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

State = Literal["starting", "compiling", "training", "waiting", "evaluating", "merging", "done"]
ErrorKind = Literal["user", "resumable", "bug"]


class Logger(Protocol):
    """Hears of each line's numbers, those that are there; ``loggers.py`` has such."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """``step`` counts from 1."""
        ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends an island's lines to the file that all islands share; each line is one write, so lines stay whole."""

    def __init__(self, path: Path, island: int, also: Sequence[Logger] = ()) -> None:
        self._path, self._also = path, also
        self._island = island
        self._descriptor = _open_append(path)

    def line(
        self,
        *,
        step: int,
        loss: float | None,
        tokens: int,
        tokens_per_s: float | None,
        wire_bytes_sent: int,
        wire_bytes_received: int,
        wait_s: float,
        lr: float,
        time_s: float,
        eval_loss: float | None = None,
        eval_loss_merged: float | None = None,
        consensus_distance: float | None = None,
        wire_bytes_sent_near: int | None = None,
        rounds_joined: int | None = None,
        rounds_left_out: int | None = None,
        every_steps: int | None = None,
        rank_mean: float | None = None,
    ) -> None:
        """``step`` counts from 1; bytes, rounds and ``wait_s`` are cumulative; what is None was not measured and is left
        out, as the loss of a step in which the island was idle, and what adapts in a step in which no round landed."""
        content: dict[str, Any] = {
            "step": step,
            "island": self._island,
            "loss": loss,
            "tokens": tokens,
            "tokens_per_s": tokens_per_s,
            "wire_bytes_sent": wire_bytes_sent,
            "wire_bytes_received": wire_bytes_received,
            "wait_s": wait_s,
            "lr": lr,
            "time_s": time_s,
            "eval_loss": eval_loss,
            "eval_loss_merged": eval_loss_merged,
            "consensus_distance": consensus_distance,
            "wire_bytes_sent_near": wire_bytes_sent_near,
            "rounds_joined": rounds_joined,
            "rounds_left_out": rounds_left_out,
            "every_steps": every_steps,
            "rank_mean": rank_mean,
        }
        content = {name: value for name, value in content.items() if value is not None}
        self._follow()
        _append(self._descriptor, _to_json(content).encode() + b"\n", self._path)
        for logger in self._also:
            logger.log(step, {name: value for name, value in content.items() if name not in ("step", "island")})

    def close(self) -> None:
        os.close(self._descriptor)
        for logger in self._also:
            logger.close()

    def _follow(self) -> None:
        """cut_back renames a new file into place while survivors of a lost island hold the old one open."""
        if self._path.exists() and os.path.samestat(os.fstat(self._descriptor), self._path.stat()):
            return
        os.close(self._descriptor)
        self._descriptor = _open_append(self._path)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines, in the order of writing; ValueError names a broken line, a half-written last one is left
    out."""
    found: list[dict[str, Any]] = []
    for number, (raw, content) in enumerate(_lines(path), start=1):
        if content is None:
            raise ValueError(f"{path}: line {number} is broken: {raw[:60]!r}; delete that line")
        found.append(content)
    return found


def newest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines by step and island; where an island went back to an earlier step, what it wrote last counts."""
    kept: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        before = kept.setdefault(line["island"], [])
        while before and before[-1]["step"] >= line["step"]:
            before.pop()
        before.append(line)
    return sorted(
        (line for of_island in kept.values() for line in of_island), key=lambda at: (at["step"], at["island"])
    )


def cut_back(path: Path, step: int) -> None:
    """Drop every line after ``step``, so that a run resumed from it writes each step once.

    A line that a killed writer left half-written goes too: a run's curve may have a gap, but the run must go on."""
    if path.exists():
        kept = (raw + b"\n" for raw, content in _lines(path) if content is not None and content["step"] <= step)
        write_whole(path, b"".join(kept))


@dataclass(frozen=True)
class Status:
    """What an island does now."""

    state: State
    step: int
    steps: int
    waiting_for: tuple[int, ...]
    waited_s: float
    timeout_s: float


class StatusFile:
    """Keeps ``status.json`` up to date; a reader always finds a whole one."""

    def __init__(self, path: Path, steps: int, timeout_s: float) -> None:
        self._path = path
        self._steps = steps
        self._timeout_s = timeout_s

    def update(self, state: State, step: int, *, waiting_for: Sequence[int] = (), waited_s: float = 0.0) -> None:
        status = Status(state, step, self._steps, tuple(waiting_for), waited_s, self._timeout_s)
        # Not synced to disk: it is rewritten every second and means nothing after a crash.
        write_whole(self._path, _to_json(asdict(status)).encode() + b"\n", durable=False)


@dataclass(frozen=True)
class ErrorNote:
    """Why a worker stopped; torchrun does not pass exit codes on."""

    kind: ErrorKind
    message: str


def write_error(folder: Path, kind: ErrorKind, message: str) -> None:
    """Leave the reason in ``error.json``, which a launcher removes before it starts the island again.

    The first rank's reason stays: what follows on the other ranks is its echo.
    """
    path = folder / "error.json"
    if not path.exists():
        write_json(path, {"kind": kind, "message": " ".join(message.split())})


def read_error(folder: Path) -> ErrorNote | None:
    path = folder / "error.json"
    if not path.exists():
        return None
    content = _only_fields(ErrorNote, read_json(path), path)
    if content["kind"] not in get_args(ErrorKind):
        raise ValueError(f"{path}: kind = {content['kind']!r}; it is one of {', '.join(get_args(ErrorKind))}")
    return ErrorNote(**content)


@dataclass(frozen=True)
class Part:
    """One island's share of the summary. A loss is None where it was not a finite number."""

    island: int
    parameters: int
    steps: int
    first_step: int
    """Where this number of islands began; tokens, seconds and bytes count from there."""
    tokens: int
    wall_s: float
    train_s: float
    """In the training loop: without starting, evaluation, checkpoints and the merge. compute_s + wait_s."""
    compute_s: float
    wait_s: float
    wire_bytes_sent: int
    wire_bytes_received: int
    wire_bytes_start: int
    wire_bytes_merge: int
    wire_bytes_consensus: int
    """Of exact averages on the way: for the consensus distance, and the mean model's loss."""
    eval_loss: float | None
    eval_loss_island: float | None
    eval_tokens: int
    bytes_per_token: float | None
    """None where nobody says what a token stands for: a file of tokens without its tokenizer."""
    consensus_distance: float | None
    corpus_hash: str
    recipe: str
    islands: int
    ranks: int
    meetings: int | None = None
    """With another island, where pairs meet when both are ready; None where rounds have their steps."""
    wire_bytes_sent_near: int | None = None
    """Of wire_bytes_sent, to islands of its own group, in a job of two levels; None in others."""
    rounds_joined: int | None = None
    """Of which it was a member, where a quorum of the islands is enough; None where each round waits for all."""
    rounds_left_out: int | None = None
    """That went on without it, there."""
    every_steps: int | None = None
    """H at the end, where it adapts; None where it stays."""
    rank_mean: float | None = None
    """Of the next round at the end, over all matrices, where ranks adapt; None where they stay."""


def write_part(folder: Path, part: Part) -> None:
    write_json(folder / "part.json", asdict(part))


def read_part(folder: Path) -> Part:
    path = folder / "part.json"
    if not path.exists():
        raise ValueError(f"no {path}: this island has not finished")
    return Part(**_only_fields(Part, read_json(path), path))


@dataclass(frozen=True)
class RunRecord:
    """A finished run, read again."""

    path: Path
    name: str
    summary: dict[str, Any]
    lines: list[dict[str, Any]]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, on disk before it is seen. NaN and infinity, which JSON does not know, become null."""
    write_whole(path, (_to_json(content, indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes, durable: bool = True) -> None:
    """Put a file into place through a temporary name, so that nobody ever reads half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _only_fields(kind: type[Any], content: dict[str, Any], path: Path) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return {name: content[name] for name in names}


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line and what it says, None where it is broken; a half-written last one is left out."""
    *whole, last = path.read_bytes().split(b"\n")
    yield from ((raw, _metrics_line(raw)) for raw in whole)
    # An object cut short never parses; one that only lacks its newline does, and counts.
    content = _metrics_line(last)
    if content is not None:
        yield last, content


def _metrics_line(raw: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(raw)
    except ValueError:
        return None
    if isinstance(content, dict) and type(content.get("step")) is int and type(content.get("island")) is int:
        return content
    return None


def _to_json(content: dict[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(content), allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


def _open_append(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _append(descriptor: int, line: bytes, path: Path) -> None:
    written = os.write(descriptor, line)
    if written != len(line):
        raise OSError(f"{path}: only {written} of {len(line)} bytes of a line were written; is the disk full?")

"""What do the launcher and its part at another site say to each other, and in which words?

They speak through the meeting point, as islands do: an order to a part, its report on what became of it, and lines of metrics.
Words are JSON of the classes below and are checked when they are read. The meeting point is plain TCP and asks nobody who he
is: it listens where link.interface and link.advertise say, on networks you trust or inside a VPN.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import TypeAdapter, ValidationError

from dtrain.config import Job
from dtrain.metrics import ErrorNote
from dtrain.own_name import OWN_AXES, is_own
from dtrain.topology import is_file

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

Word = Literal["start", "set_back", "end"]
State = Literal["idle", "running", "done", "failed", "gone"]

_SITE_OWN = {
    *(("job", "name"), ("job", "dir"), ("data", "source"), ("train", "keep")),
    *(("link", "port"), ("link", "interface"), ("link", "advertise")),
    *(("islands", "each"), ("islands", "threads"), ("islands", "max_restarts")),
}
"""What a site's job file may say in its own way. Of the text that all train on the hash is compared."""
_SAME_INSIDE = (("data", "tokenizer"), ("model", "factory"), ("model", "hf"), ("islands", "deepspeed"))
"""What may name a file: it lies where a site says, and holds the same everywhere."""
_OF_A_FOLDER = {"tokenizer": "tokenizer.json", "hf": "config.json"}
"""Of one that is a folder. Weights beside it are not compared: islands begin with island 0's."""
_SCRIPT = "the script after --"


@dataclass(frozen=True, slots=True)
class Content:
    """Of a file, or of the text."""

    digest: str
    """sha256, in hex."""
    place: str
    """HOST:PATH."""

    @property
    def name(self) -> str:
        return self.place.partition(":")[2]


Contents = Mapping[str, Content]
"""By what names the file in a job: ``data.tokenizer``."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A part has come."""

    nonce: str
    """Of one start of a part; its other words are kept under it, so that none of an earlier start is taken for its own."""
    host: str
    run: str
    """The folder there."""
    held: Contents = field(default_factory=dict[str, Content])
    """What its files hold, so that sites agree on what the launcher has not."""


@dataclass(frozen=True, slots=True)
class Order:
    number: int
    """From 1; only the newest counts."""
    word: Word
    """Start the island; or drop what lies after the step under one that runs, or was lost; or end all, as the launcher does."""
    epoch: int = 0
    step: int = 0
    exit_status: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    beat: int
    """Another one each time."""
    done: int = 0
    """The number of the newest order that was carried out."""
    state: State = "idle"
    written: tuple[int, ...] = ()
    """Steps whose checkpoints are whole there."""
    batches: int = 0
    """Of lines of metrics, so far."""
    status: dict[str, Any] | None = None
    error: ErrorNote | None = None
    part: dict[str, Any] | None = None
    log: tuple[str, ...] = ()
    """Of an island that failed: where its log is, and the end of it."""


_JOINED, _ORDER, _REPORT, _HELD = TypeAdapter(Joined), TypeAdapter(Order), TypeAdapter(Report), TypeAdapter(dict[str, Content])


class Line:
    """Between the launcher and one start of a part."""

    def __init__(self, store: Store, island: int, nonce: str) -> None:
        self._store, self._key = store, f"part/{island}/{nonce}"
        self._there: set[str] = set()

    def order(self, order: Order) -> None:
        self._store.set(f"{self._key}/order", _ORDER.dump_json(order).decode())

    def ordered(self) -> Order | None:
        text = self._get("order")
        return None if text is None else _read(_ORDER, text)

    def report(self, report: Report) -> None:
        self._store.set(f"{self._key}/report", _REPORT.dump_json(report).decode())

    def reported(self) -> Report | None:
        text = self._get("report")
        return None if text is None else _read(_REPORT, text)

    def say_batch(self, number: int, lines: Sequence[str]) -> None:
        """To be said before the report that counts it."""
        self._store.set(f"{self._key}/lines/{number}", "\n".join(lines))

    def take_batch(self, number: int) -> list[str]:
        """One that was counted; it is dropped."""
        key = f"{self._key}/lines/{number}"
        text = self._store.get(key).decode()
        self._store.delete_key(key)
        return text.split("\n")

    def _get(self, name: str) -> str | None:
        """None before it is said: to get it then would wait for it."""
        key = f"{self._key}/{name}"
        if key not in self._there:
            if not self._store.check([key]):
                return None
            self._there.add(key)
        return self._store.get(key).decode()


def join(store: Store, island: int, joined: Joined) -> Joined:
    """Who has the island now: the one that asks, or one that was there before."""
    said = _JOINED.dump_json(joined).decode()
    return _read(_JOINED, store.compare_set(_joined(island), "", said).decode())


def joined(store: Store, island: int) -> Joined | None:
    return _read(_JOINED, store.get(_joined(island)).decode()) if store.check([_joined(island)]) else None


def forget_joined(store: Store, island: int) -> None:
    """So that another start of its part can join."""
    store.delete_key(_joined(island))


def contents(job: Job, text: str = "", script: Sequence[str] = ()) -> Contents:
    """What the files of a job hold here. ``text``: the hash of what it trains on; empty where a ``script`` reads data of its
    own."""
    named = [*((f"{section}.{key}", path) for section, key, path in _files(job)), *_of_rounds(job)]
    named += [(_SCRIPT, Path(script[0]))] if script else []
    found = [(key, str(path), _digest(path)) for key, path in named if path.is_file()]
    found += [("data.source", job.data.source, text)] if text else []
    return {key: Content(digest, f"{socket.gethostname()}:{name}") for key, name, digest in found}


def say_job(store: Store, job: Job, held: Contents | None = None) -> None:
    """``held``: the ``contents`` that sites are to have, too."""
    store.set("part/held", _HELD.dump_json(dict(held or {})).decode())
    store.set("part/job", json.dumps({"elsewhere": job.elsewhere, "answers": _answers(job)}))


def has_job(store: Store) -> bool:
    return store.check(["part/job"])


def check_job(store: Store, job: Job, island: int, held: Contents | None = None) -> None:
    """Raises ValueError where the launcher has not left this island to its site, or is at another job, or a file of the job, or
    its text, holds something else here."""
    said = json.loads(store.get("part/job"))
    if island not in said["elsewhere"]:
        others = ", ".join(map(str, said["elsewhere"])) or "none"
        raise ValueError(f"--island {island}: the launcher starts that island itself; of those it waits for others: {others}")
    mine, theirs = json.loads(json.dumps(_answers(job))), said["answers"]
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{key} = {mine.get(key)!r} differs from the launcher's {theirs.get(key)!r}; give both the same job file and the "
                "same section.key=value"
            )
    check_held(store, job, island, held or {})


def check_held(store: Store, job: Job, island: int, held: Contents) -> None:
    """Raises ValueError where a file is not what the launcher has, or, where none of its islands needs it, a site that has
    joined: one that was refused has said nothing."""
    sites = [site for k in job.elsewhere if k != island and (site := joined(store, k)) is not None]
    for theirs in (_read(_HELD, store.get("part/held").decode()), *(site.held for site in sites)):
        for key, mine in held.items():
            first = theirs.get(key, mine)
            if first.digest != mine.digest:
                raise ValueError(
                    f"{key}: {mine.name} is not what {first.place} is (sha256 {mine.digest[:8]} and {first.digest[:8]}); copy "
                    f"that one here, or name one that is the same{'' if key == _SCRIPT else f', {key}=PATH'}"
                )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say_commits(store: Store, steps: Sequence[int]) -> None:
    store.set("part/commits", json.dumps(list(steps)))


def commits(store: Store) -> list[int]:
    return json.loads(store.get("part/commits")) if store.check(["part/commits"]) else []


def say_started(store: Store, island: int, epoch: int, step: int) -> None:
    """Of an island, to those of its nodes that start after the first."""
    store.set(f"started/{island}", f"{epoch}:{step}")


def started(store: Store, island: int) -> tuple[int, int] | None:
    """(epoch, step) of an island's newest start; None before the first."""
    if not store.check([f"started/{island}"]):
        return None
    epoch, step = map(int, store.get(f"started/{island}").decode().split(":"))
    return epoch, step


def _joined(island: int) -> str:
    return f"part/{island}/joined"


def _read(kind: TypeAdapter[Any], text: str) -> Any:
    try:
        return kind.validate_json(text)
    except ValidationError as e:
        raise ValueError(f"the meeting point holds what no dtrain of this version says: {text[:80]!r}") from e


def _answers(job: Job) -> dict[str, Any]:
    """What must be the same at all sites. Files of one's own lie where they lie there, by the same names."""
    said = {
        f"{section}.{key}": _by_name(key, value)
        for section, keys in job.model_dump(exclude={"sim"}).items()
        for key, value in keys.items()
        if (section, key) not in _SITE_OWN
    }
    said |= {f"{section}.{key}": "(a file)" for section, key, path in _files(job) if path.suffix != ".py"}
    for k in range(job.islands.count):
        plan = job.island(k)
        said |= {f"islands.each.{k}.ranks": plan.ranks, f"islands.each.{k}.engine": plan.engine}
    return said


def _by_name(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_by_name("", item) for item in value]
    if isinstance(value, dict):
        return {inner: _by_name(inner, item) for inner, item in value.items()}
    return Path(value).name if isinstance(value, str) and (key == "graph" or is_own(value)) else value


def _files(job: Job) -> Iterator[tuple[str, str, Path]]:
    """(section, key, file) of ``_SAME_INSIDE`` that names one: in a run's job its path is absolute, and else it is a word, or a
    name on the hub."""
    for section, key in _SAME_INSIDE:
        value = getattr(getattr(job, section), key) or ""
        path = Path(value.rpartition(":")[0] if is_own(value) else value)
        if path.is_absolute():
            yield section, key, path / _OF_A_FOLDER[key] if path.is_dir() and key in _OF_A_FOLDER else path


def _of_rounds(job: Job) -> Iterator[tuple[str, Path]]:
    """(key, file) of a graph, and of code of one's own: of [sync], or of each of its levels."""
    for k, level in enumerate(job.sync.level or [job.sync]):
        where = "sync" if job.sync.level is None else f"sync.level.{k}"
        for key in OWN_AXES:
            if is_own(value := getattr(level, key) or ""):
                yield f"{where}.{key}", Path(value.rpartition(":")[0])
        if level.graph is not None and is_file(level.graph):
            yield f"{where}.graph", Path(level.graph)

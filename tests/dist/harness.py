"""How does a test run islands as real processes? Under the launcher's environment, each with its output caught, none left behind.

The children's clock (time.monotonic) is this process's clock, so moments can be compared across them.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch._C._distributed_c10d import TCPStore

from dtrain.config import Job
from dtrain.launch.meeting import listen, serve
from tests.dist.child import RESULT, SCENARIO
from tests.dist.nursery import ROOT, Nursery

_STACKS_S = 5.0
"""A child that hangs is asked for the stacks of its threads first (SIGABRT and faulthandler), and has this long to print them."""

Function = Callable[..., object]
Script = str | Function | Mapping[str, Function]


@dataclass(frozen=True, slots=True)
class Result:
    """What one process left: its exit status and output, and what it printed by ``tests.dist.child.report``."""

    island: int
    rank: int
    status: int
    stdout: str
    stderr: str
    ended_at: float

    @property
    def values(self) -> dict[str, Any]:
        """Reported values by scenario."""
        lines = [line.removeprefix(RESULT) for line in self.stdout.splitlines() if line.startswith(RESULT)]
        return {name: value for line in lines for name, value in json.loads(line).items()}

    def stderr_of(self, scenario: str) -> list[str]:
        return _section(self.stderr, scenario)

    def __str__(self) -> str:
        title = f"island {self.island} rank {self.rank}, exit status {self.status}"
        return f"--- {title}: stdout\n{self.stdout}--- {title}: stderr\n{self.stderr}"


def values(results: Sequence[Result], scenario: str) -> list[Any]:
    """What each process reported of a scenario; where one did not, everything that was printed."""
    silent = [f"island {r.island} rank {r.rank}" for r in results if scenario not in r.values]
    assert not silent, f"{scenario}: no result from {', '.join(silent)}\n" + show(results)
    return [r.values[scenario] for r in results]


def show(results: Sequence[Result]) -> str:
    return "\n".join(str(r) for r in results)


def run_islands(
    script: Script,
    num_islands: int,
    ranks: int | Sequence[int] = 1,
    *,
    run: Path,
    timeout_s: float = 60.0,
    lost_s: float | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run a script's text, a module's function, or named functions one after the other, on every rank of every island.

    ``ranks``: of each island; a sequence where islands differ.
    ``functools.partial`` gives a function its (JSON) keyword arguments. A function is run in a link of its own: the n-th as
    epoch n. Returns when all have ended, by (island, rank); fails with all output when they have not within timeout_s.

    With ``lost_s`` there is a job file with this link.timeout_s, and the others go on when a process fails; without it they
    are ended."""
    run.mkdir(parents=True, exist_ok=True)
    shared = {**os.environ, **(env or {})}
    if lost_s is not None:
        job = run / "job.toml"
        job.write_text(f"[link]\ntimeout_s = {lost_s}\n", encoding="utf-8")
        shared["DTRAIN_JOB"] = str(job)
    store, meet = _store()
    store.set("regroup", "0:0")
    each = [ranks] * num_islands if isinstance(ranks, int) else list(ranks)
    if not isinstance(ranks, int):
        shared["DTRAIN_NUM_LANES"] = str(max(each))
    masters = [_store() for _ in range(num_islands)] if max(each) > 1 else []
    children: list[_Child] = []
    ended: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    try:
        for island in range(num_islands):
            for rank in range(each[island]):
                place = _environment(island, num_islands, rank, each[island], meet, masters[island][1] if masters else "", run)
                children.append(_Child(island, rank, _arguments(script, run), {**shared, **place}, ended))
        hung = _wait(children, ended, time.monotonic() + timeout_s, all_go_on=lost_s is not None)
    finally:
        for child in children:
            child.send(signal.SIGKILL)
        results = [child.result() for child in children]
    late = ", ".join(f"island {c.island} rank {c.rank}" for c in hung)
    assert not hung, f"still running after {timeout_s:g} s: {late}\n" + show(results)
    return results


class _Child:
    """One process and the thread that waits until it has ended."""

    def __init__(
        self, island: int, rank: int, arguments: list[str], env: Mapping[str, str], ended: queue.SimpleQueue[_Child]
    ) -> None:
        self.island, self.rank = island, rank
        self._ended = ended
        self._outputs = (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115  (closed when they are read)
        news, said = os.pipe()
        stdout, stderr = self._outputs
        _nurseries()[(island + rank) % 2].start(arguments, env, (stdout.fileno(), stderr.fileno(), said))
        os.close(said)
        self._news = os.fdopen(news, encoding="ascii")
        self._pid = int(self._news.readline())
        self._status: int | None = None
        self._ended_at = 0.0
        self._reader = threading.Thread(target=self._read, name=f"child-{island}-{rank}")
        self._reader.start()

    def ended_by(self, until: float) -> bool:
        self._reader.join(timeout=max(0.0, until - time.monotonic()))
        return not self._reader.is_alive()

    @property
    def failed(self) -> bool:
        return self._status != 0

    def send(self, number: signal.Signals) -> None:
        """Signal it; one that has ended is left alone."""
        if self._status is None:
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(self._pid, number)

    def result(self) -> Result:
        self._reader.join()
        assert self._status is not None
        stdout, stderr = (_text(file) for file in self._outputs)
        return Result(self.island, self.rank, self._status, stdout, stderr, self._ended_at)

    def _read(self) -> None:
        with self._news as news:
            self._status = int(news.readline())
        self._ended_at = time.monotonic()
        self._ended.put(self)


def _text(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


@functools.cache
def _nurseries() -> tuple[Nursery, Nursery]:
    """From the first use to this process's end."""
    nurseries = Nursery(), Nursery()
    for nursery in nurseries:
        atexit.register(nursery.close)
    return nurseries


def _wait(
    children: Sequence[_Child], ended: queue.SimpleQueue[_Child], until: float, *, all_go_on: bool
) -> list[_Child]:
    """Wait for all, and end those that are left; returns those that were late."""
    left = set(children)
    late: list[_Child] = []
    failed = False
    while left and not late and (all_go_on or not failed):
        try:
            child = ended.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            late = [c for c in children if c in left]
            continue
        left.remove(child)
        failed = failed or child.failed
    for child in left:
        child.send(signal.SIGABRT)
    for child in left:
        child.ended_by(time.monotonic() + _STACKS_S)
    return late


def _store() -> tuple[TCPStore, str]:
    """A store on a free loopback port, as the launcher makes it, and where it is."""
    listener, meet = listen(Job().link)
    return serve(listener), meet


def _environment(
    island: int, num_islands: int, rank: int, ranks: int, meet: str, master: str, run: Path
) -> dict[str, str]:
    """The launcher's variables, and torchrun's where an island has several ranks."""
    out = {
        "DTRAIN_ISLAND": str(island),
        "DTRAIN_NUM_ISLANDS": str(num_islands),
        "DTRAIN_MEET": meet,
        "DTRAIN_EPOCH": "0",
        "DTRAIN_RESUME_STEP": "0",
        "DTRAIN_RUN": str(run),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
    }
    if ranks > 1:
        host, _, port = master.rpartition(":")
        out |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        out |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        out |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    return out


def _arguments(script: Script, run: Path) -> list[str]:
    """Python's, in each child."""
    if isinstance(script, str):
        path = run / "script.py"
        path.write_text(script, encoding="utf-8")
        return [str(path)]
    named = script if isinstance(script, Mapping) else {_parts(script)[0].__name__: script}
    calls = []
    for name, function in named.items():
        plain, arguments = _parts(function)
        calls.append([name, plain.__module__, plain.__name__, arguments])
    return ["-m", "tests.dist.child", json.dumps(calls)]


def _parts(function: Function) -> tuple[Any, dict[str, Any]]:
    if isinstance(function, functools.partial):
        assert not function.args, "keyword arguments only"
        return function.func, function.keywords
    return function, {}


def _section(text: str, scenario: str) -> list[str]:
    """The lines between a scenario's mark and the next one's."""
    lines = text.splitlines()
    begin = lines.index(SCENARIO + scenario) + 1
    end = next((i for i in range(begin, len(lines)) if lines[i].startswith(SCENARIO)), len(lines))
    return lines[begin:end]

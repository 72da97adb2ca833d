"""How does a lab speak to the kernel? By ``ip`` and ``tc``, in batches; each refusal is one line.

A network namespace has a name below ``/run/netns``, and the processes in it are those whose ``ns/net`` is the same file."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NETNS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # linux/sched.h


class Refused(ValueError):
    """ip or tc did not do what they were told."""


def check_tools() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise ValueError(f"a lab needs {' and '.join(missing)}, which this machine lacks: install iproute2")


def told(tool: str, *words: str, lines: Sequence[str] | None = None) -> str:
    """What ip or tc answers; with ``lines`` those are its commands, the first that is refused ends them."""
    batch = ("-batch", "-") if lines is not None else ()
    done = subprocess.run(
        [tool, *words, *batch],
        input="\n".join(lines) + "\n" if lines is not None else "",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Refused(_refusal(tool, words, lines, done.stderr))
    return done.stdout


def asked(tool: str, *words: str) -> list[dict[str, Any]]:
    """The same as JSON, of a question; empty where nothing is found."""
    answer = told(tool, "-j", *words)
    return json.loads(answer) if answer.strip() else []


def namespaces(pattern: str) -> list[str]:
    """Names that the whole pattern fits."""
    return sorted(each["name"] for each in asked("ip", "netns", "list") if re.fullmatch(pattern, each["name"]))


def processes(names: Iterable[str]) -> dict[str, list[int]]:
    """Who runs in each namespace."""
    found: dict[str, list[int]] = {name: [] for name in names}
    by_file = {_file(NETNS / name): name for name in found}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended just now, or belongs to somebody else
            name = by_file.get(_file(entry / "ns" / "net"))
            if name is not None:
                found[name].append(int(entry.name))
    return found


def end(names: Sequence[str], *, grace_s: float) -> int:
    """SIGTERM to all processes in these namespaces, SIGKILL to those that are left after grace_s; returns how many there were."""
    first = _pids(names)
    kill_at, give_up_at = time.monotonic() + grace_s, time.monotonic() + grace_s + 10.0
    left, number = first, signal.SIGTERM if grace_s > 0 else signal.SIGKILL
    _signal(left, number)
    while (left := _pids(names)) and time.monotonic() < give_up_at:
        if number == signal.SIGTERM and time.monotonic() > kill_at:
            number = signal.SIGKILL
        if number == signal.SIGKILL:
            _signal(left, number)  # again, as a process may have started another meanwhile
        time.sleep(0.03)
    if left:
        raise ValueError(f"process {left[0]} in {names[0]} does not end; see what holds it inside the kernel, and try again")
    return len(first)


def enter(name: str) -> None:
    """Have this process, of one thread still, live in a namespace from now on, and all that it starts."""
    with (NETNS / name).open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise ValueError(f"the namespace {name} cannot be entered: {os.strerror(ctypes.get_errno())}; are you root?")


def _pids(names: Iterable[str]) -> list[int]:
    return [pid for of_one in processes(names).values() for pid in of_one]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _file(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def _refusal(tool: str, words: Sequence[str], lines: Sequence[str] | None, stderr: str) -> str:
    said = [line for line in stderr.splitlines() if line.strip()]
    at = re.search(r"Command failed -:(\d+)", stderr)
    command = lines[int(at[1]) - 1] if lines and at else " ".join(words)
    reason = re.sub(r"^(Error|RTNETLINK answers): ", "", said[0]) if said else "no reason given"
    where = f" in {words[1]}" if words[:1] == ("-n",) else ""
    return f"{tool} {command}{where} was refused: {reason.rstrip('.')}"

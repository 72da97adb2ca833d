"""How does an ordinary user have a lab? As root of a user namespace of her own, which a keeper process holds open.

The keeper does nothing: it is there so that its namespaces last from one command to the next. Every ``dtrain lab`` command goes
on inside them, by nsenter, and finds a machine of which it is root and on which no other network is. A ``/run`` of its own is
where ip keeps the names of namespaces, and where a lab's file lies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from dtrain.launch import lab, lab_net

_KEEPER = "mount -t tmpfs -o mode=755 tmpfs /run && mkdir /run/netns && ip link set lo up && echo ready && exec sleep infinity"
_COMMANDS = ("up", "run", "cut", "heal", "slow", "kill", "status", "down")


def goes_inside(arguments: Sequence[str]) -> bool:
    """Whether this command line is one that root alone can do, and another types it."""
    is_lab = len(arguments) > 1 and arguments[0] == "lab" and arguments[1] in _COMMANDS
    return is_lab and os.geteuid() != 0 and "--help" not in arguments


def go_inside(arguments: Sequence[str]) -> int:
    """Run the command line where we are root; returns its exit status. Raises ValueError where that cannot be."""
    lab_net.check_tools()
    begun = _Keeper.find()
    if begun is None and arguments[1] == "down":
        print("no lab was up")
        return 0
    if begun is None and arguments[1] != "up":
        raise ValueError(lab.NONE_UP)
    keeper = begun or _Keeper.start()
    inside = keeper.command([sys.executable, "-m", "dtrain.launch", *arguments])
    if arguments[1] not in ("up", "down"):
        sys.stdout.flush()
        os.execvp(inside[0], inside)
    try:
        status = subprocess.run(inside, check=False).returncode
    except BaseException:
        if begun is None:
            keeper.end()
        raise
    nothing_left = status == 0 if arguments[1] == "down" else status != 0 and begun is None
    if nothing_left:
        keeper.end()
    return status


class _Keeper:
    """A process that holds a user's namespaces open, found again by its number and the moment at which it started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @classmethod
    def find(cls) -> _Keeper | None:
        with suppress(OSError, ValueError):
            pid, started = _file().read_text(encoding="utf-8").split()
            if _started(int(pid)) == started:
                return cls(int(pid))
        return None

    @classmethod
    def start(cls) -> _Keeper:
        missing = [tool for tool in ("unshare", "nsenter") if shutil.which(tool) is None]
        if missing:
            raise ValueError(f"a lab without root needs {' and '.join(missing)}, which this machine lacks: install util-linux")
        process = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", _KEEPER],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout as said, process.stderr as refused:
            if said.readline() != "ready\n":
                process.kill()
                reason = (refused.readline().strip() or "no reason given").rstrip(".")
                process.wait()
                raise ValueError(f"a lab needs root here, as this kernel gives other users no namespaces ({reason}); use sudo")
        _file().write_text(f"{process.pid} {_started(process.pid)}", encoding="utf-8")
        return cls(process.pid)

    def command(self, words: Sequence[str]) -> list[str]:
        where = ["--preserve-credentials", "--user", "--net", "--mount", f"--target={self.pid}", f"--wd={os.getcwd()}"]
        return ["nsenter", *where, *words]

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _file().unlink(missing_ok=True)


def _file() -> Path:
    """In a folder that nobody else can write, and that is still there at the next login, as the keeper is: XDG_RUNTIME_DIR is
    not. It may be one for several machines."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or f"/tmp/dtrain-{os.geteuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise ValueError(f"{folder} belongs to somebody else; set XDG_STATE_HOME to a folder of yours")
    return folder / f"{lab.label()}.{socket.gethostname()}.keeper"


def _started(pid: int) -> str:
    """In clock ticks after the machine's start."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]

"""Are the CPU kernels compiled already? The launcher asks before it says that a first start takes longer; numba is not imported.

A marker is written once everything is compiled. It is named for what the machine code depends on, and lists numba's own files."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).parent / "_numba"


@cache
def source_stamp() -> str:
    """Of every source that is compiled in: numba alone would look at the file that defines a kernel, not at what it calls."""
    digest = hashlib.sha256()
    for path in (*sorted(_PACKAGE.glob("*.py")), *(_PACKAGE.parent / name for name in ("operands.py", "reference.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where it is noted that the kernels are compiled: beside them, in the user's cache, or where NUMBA_CACHE_DIR says. numba
    goes through the same places."""
    folder = os.environ.get("NUMBA_CACHE_DIR")
    if folder:
        return Path(folder)
    beside = _PACKAGE / "__pycache__"
    if os.access(beside if beside.is_dir() else _PACKAGE, os.W_OK):
        return beside
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "dtrain")


def _marker() -> Path:
    libraries = "".join(version(name) for name in ("numba", "llvmlite"))
    machine = hashlib.sha256(f"{platform.machine()} {platform.python_version()} {libraries} {_cpu()}".encode()).hexdigest()[:8]
    return cache_folder() / f"compiled-{source_stamp()}-{machine}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(next((line for line in lines if line.startswith(name)), "") for name in ("model name", "flags"))


def is_compiled() -> bool:
    """Whether a process can load every CPU kernel from the cache, for this source, numba and CPU."""
    try:
        listed = _marker().read_text(encoding="utf-8").splitlines()
    except (OSError, PackageNotFoundError):
        return False
    return bool(listed) and all(Path(name).exists() for name in listed)


@contextmanager
def alone() -> Iterator[None]:
    """One process (or thread) of this machine at a time, where a file can be locked: the others load what it compiled."""
    marker = _marker()
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        lock = marker.with_suffix(".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def note_compiled(files: list[str]) -> None:
    """Where no cache can be written, the next process compiles again, and ``is_compiled`` says so."""
    marker = _marker()
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        part = marker.with_suffix(f".{os.getpid()}")
        part.write_text("\n".join(files), encoding="utf-8")
        part.replace(marker)
    except OSError:
        return

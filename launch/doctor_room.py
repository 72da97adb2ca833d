"""Is there room for a job: folders that can be written, disk, shared memory, open files, memory, cores?

What is written to find out is temporary files without a name, which nothing leaves behind."""

from __future__ import annotations

import errno
import math
import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from dtrain import units
from dtrain.launch.doctor import Asked, Finding, Size, Torch

_SMALL_SHM_BYTES, _NCCL_SHM_BYTES = 2**26, 2**29
"""What containers have unless told otherwise; and what NCCL's ranks of one machine may want between them."""
_FILES_BESIDE = 256
"""Open files of a process besides its connections."""
_BYTES_A_WEIGHT, _BYTES_BESIDE = 4, 12
"""fp32 weights, and of those that are trained gradients and AdamW's moments; activations come on top."""


# ---- folders


def numba_cache(torch: Torch) -> Finding:
    folder, done = Path(torch.cache), "compiled" if torch.compiled else "compiled at the first start, about half a minute"
    trouble = cannot_write(folder)
    if trouble:
        what = f"{folder}: {trouble}; every start compiles the CPU kernels anew, about half a minute"
        return Finding("numba cache", "warn", what, f"export NUMBA_CACHE_DIR={shlex.quote(str(_elsewhere(0) / 'dtrain-numba'))}")
    return Finding("numba cache", "ok", f"{folder}, CPU kernels {done}")


def triton_cache(torch: Torch | None) -> Finding:
    home = os.environ.get("TRITON_HOME") or Path.home()
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    trouble, name, gpu = cannot_write(folder), "triton cache", torch is not None and bool(torch.gpus)
    if trouble:
        remedy = f"export TRITON_CACHE_DIR={shlex.quote(str(_elsewhere(0) / 'dtrain-triton'))}"
        needed = "and a kernel that cannot be kept is not run" if gpu else "not needed without a GPU"
        return Finding(name, "fail" if gpu else "warn", f"{folder}: {trouble}; {needed}", remedy)
    kept = sum(1 for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else 0
    return Finding(name, "ok", f"{folder}, {kept} kernels" + ("" if gpu else "; not needed without a GPU"))


def disk(folder: Path, asked: Asked | None, size: Size | None) -> Finding:
    """Of a job's folder against its checkpoints: those that are kept, and one that is being written, of all islands here."""
    there, trouble = nearest(folder), cannot_write(folder)
    free = shutil.disk_usage(there).free
    one = 0 if size is None or asked is None else size.checkpoint_bytes * len(asked.here)
    saves = asked is not None and asked.job.train.checkpoint_every > 0
    most = one * (asked.job.train.keep + 1) if asked is not None and saves else 0
    ends = 0 if size is None or asked is None else 4 * size.parameters * (len(asked.here) + 1)
    what = f"{units.show_bytes(free)} free in {there}"
    if one and saves:
        kept = units.show_bytes(most + ends)
        what += f"; a checkpoint of all islands takes {units.show_bytes(one)}, all that are kept {kept}"
    elif ends:
        what += f"; the models at the end take {units.show_bytes(ends)}"
    least = max(one if saves else 0, ends)
    if trouble or free < least:
        return Finding("disk", "fail", f"{folder}: {trouble}; {what}" if trouble else what, _roomier(there, asked, most + ends))
    if free < most + ends:
        return Finding("disk", "warn", what, _roomier(there, asked, most + ends))
    return Finding("disk", "ok", what)


def _roomier(full: Path, asked: Asked | None, needed: int) -> str:
    """A command that puts the run where there is room; where there is nowhere, one that says what takes it."""
    other = _elsewhere(needed)
    if asked is None or other.stat().st_dev == full.stat().st_dev or shutil.disk_usage(other).free < needed:
        return f"du -xh -d 2 {shlex.quote(str(full))} | sort -h"
    return asked.again(f"job.dir={other / 'runs'}")


def _elsewhere(needed: int) -> Path:
    """A folder that can be written, with room where one has it."""
    known = [Path.home(), Path(tempfile.gettempdir())]
    writable = [folder for folder in known if not cannot_write(folder)]
    roomy = [folder for folder in writable if shutil.disk_usage(folder).free >= needed]
    return next(iter(roomy or writable or known))


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def cannot_write(folder: Path) -> str:
    """Why nothing can be written there, or made there; empty where it can. A file without a name is written, and is gone."""
    there = nearest(folder)
    if not there.is_dir():
        return f"{there} is no folder"
    try:
        with tempfile.TemporaryFile(dir=there, buffering=0) as probe:
            probe.write(b"\xff" * 65536)
            os.fsync(probe.fileno())
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        return "the disk is full" if full else f"cannot be written: {e.strerror}"
    return ""


# ---- limits


def shared_memory(torch: Torch | None, asked: Asked | None, folder: Path = Path("/dev/shm")) -> Finding:
    if not folder.is_dir():
        return Finding("shared memory", "warn", f"there is no {folder}", f"mount -t tmpfs tmpfs {folder} --mkdir")
    free, total = shutil.disk_usage(folder).free, shutil.disk_usage(folder).total
    what = f"{units.show_bytes(free)} of {units.show_bytes(total)} free in {folder}"
    several = torch is not None and torch.gpus and asked is not None and asked.several
    if free < (_NCCL_SHM_BYTES if several else _SMALL_SHM_BYTES):
        return Finding("shared memory", "warn", what, f"mount -o remount,size=2G {folder}")
    return Finding("shared memory", "ok", what)


def open_files(asked: Asked | None, limit: int, hard: int) -> Finding:
    """Limits of a process; the launcher holds two connections of each rank to the meeting point."""
    needed = _FILES_BESIDE + (0 if asked is None else 2 * asked.ranks)
    what = f"{limit:,} a process"
    if limit >= needed:
        return Finding("open files", "ok", what)
    raised = f"ulimit -n {needed}" if hard >= needed else f"prlimit --pid $$ --nofile={needed}:{needed}"
    return Finding("open files", "fail", f"{what}, and the launcher of this job needs {needed:,}", raised)


def cores(torch: Torch | None, asked: Asked | None, count: int) -> Finding:
    """``count``: that this process may use."""
    if asked is None or not asked.here or (torch is not None and torch.gpus):
        return Finding("cpu cores", "ok", f"{count}")
    islands, ranks = asked.job.islands, asked.ranks_here
    threads = islands.threads or max(1, (os.cpu_count() or 1) // ranks)
    what = f"{count} for {ranks} rank{'s' * (ranks > 1)}" + (f" of {threads} threads" if threads > 1 else "")
    if ranks * threads <= count:
        return Finding("cpu cores", "ok", what)
    if ranks <= count:
        return Finding("cpu cores", "warn", f"{what}, which take turns", asked.again(f"islands.threads={count // ranks}"))
    return Finding("cpu cores", "warn", f"{what}, which take turns", shlex.join(["dtrain", "sim", *asked.words]))


def memory(torch: Torch | None, asked: Asked | None, size: Size | None, free_bytes: int) -> Finding:
    """Where ranks compute on the CPU, what they hold at least against what is free."""
    what = f"{units.show_bytes(free_bytes)} free"
    if asked is None or size is None or (torch is not None and torch.gpus):
        return Finding("memory", "ok", what)
    whole = _BYTES_A_WEIGHT * size.parameters + _BYTES_BESIDE * (size.parameters - size.frozen)
    copies = [plan.ranks if plan.engine == "ddp" else 1 for plan in asked.here.values()]
    needed = sum(count * whole + size.state_bytes for count in copies)
    what += f"; the islands here hold {units.show_bytes(needed)} at least"
    if needed <= free_bytes:
        return Finding("memory", "ok", what)
    fit = free_bytes // (max(copies) * whole + size.state_bytes)
    fewer = fit >= 1 and asked.job.islands.each is None  # tables are as many as islands
    smaller = asked.again(f"islands.count={fit}") if fewer else shlex.join(["dtrain", "plan", *asked.words, "--gpu", "h100"])
    return Finding("memory", "fail", what, smaller)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Those that this process may run on, or fewer where its container's share is of fewer."""
    mine = len(os.sched_getaffinity(0))
    quota, _, period = _first_line(cgroup / "cpu.max").partition(" ")
    return min(mine, math.ceil(int(quota) / int(period))) if quota.isdecimal() else mine


def free_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the machine, or of the container where that has less."""
    told = dict(re.findall(r"^(\w+):\s+(\d+) kB", (proc / "meminfo").read_text(encoding="ascii"), flags=re.MULTILINE))
    free, most = 1024 * int(told["MemAvailable"]), _first_line(cgroup / "memory.max")
    if not most.isdecimal():
        return free
    return min(free, max(0, int(most) - int(_first_line(cgroup / "memory.stat").removeprefix("anon ") or 0)))


def _first_line(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").partition("\n")[0]
    except OSError:
        return ""

"""How do the cores share a kernel? Each makes one call of it and takes units until none is left.

The main thread shares with torch's own OpenMP threads. They spin for about 12 ms after each operation of torch's, and threads of
ours would share the cores with them: an int8 encoder of 2^24 elements then took 1.4 times as long (6.5 ms, not 4.6, on 2 cores).
Another thread (the traffic's) has threads of our own, which sleep once nothing is left: a team of OpenMP's would spin beside the
model's. Neither is numba's own layer, which aborts where two threads call at once."""

from __future__ import annotations

import ctypes
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from dtrain.kernels._numba.compiled import Kernel

LEAST_SHARED = 1 << 17
"""Elements; below, a call is over before another thread has woken up (50 us for one that sleeps)."""


class _Job:
    """One call of a kernel. A thread that comes after the caller has finished must not touch its tensors any more."""

    def __init__(self, call: Callable[[int], None], arguments: array[int]) -> None:
        self.call, self.arguments = call, arguments
        self.lock, self.idle = threading.Lock(), threading.Lock()
        self.running, self.over = 0, False
        self.idle.acquire()

    def help(self) -> None:
        with self.lock:
            if self.over:
                return
            self.running += 1
        self.call(_address(self.arguments))
        with self.lock:
            self.running -= 1
            if self.over and self.running == 0:
                self.idle.release()

    def finish(self) -> None:
        try:
            self.call(_address(self.arguments))
        finally:  # after Ctrl-C too: the caller will free what the others still write to
            with self.lock:
                self.over = True
                helped = self.running > 0
            if helped:
                self.idle.acquire()


class _Pool:
    """Threads of our own that wait for jobs, made when first asked for."""

    def __init__(self) -> None:
        self.lock, self.jobs, self.size = threading.Lock(), SimpleQueue[_Job](), 0

    def run(self, kernel: Kernel, arguments: array[int], num_threads: int) -> None:
        self._grow(num_threads - 1)
        job = _Job(kernel.call, arguments)
        for _ in range(num_threads - 1):
            self.jobs.put(job)
        job.finish()

    def _grow(self, size: int) -> None:
        if self.size >= size:
            return
        with self.lock:
            for i in range(self.size, size):
                threading.Thread(target=_work, args=(self.jobs,), name=f"dtrain-kernels-{i}", daemon=True).start()
            self.size = max(self.size, size)


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().help()


class _Team:
    """The OpenMP that torch itself calls. ``parallel`` is None where that is not GNU's or one that takes its calls, as Intel's
    does, and in a child after a fork, whose team has no threads."""

    def __init__(self) -> None:
        self.parallel: Any = next(_parallel(), None)
        if self.parallel is not None:
            self.parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            self.parallel.restype = None

    def run(self, kernel: Kernel, arguments: array[int], num_threads: int) -> None:
        self.parallel(kernel.address, _address(arguments), num_threads, 0)

    def leave(self) -> None:
        self.parallel = None


def _parallel() -> Iterator[Any]:
    """Where the linker looks for torch: what is visible to the whole process first (a preloaded one, say), then its own."""
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        with suppress(OSError, AttributeError):
            yield ctypes.CDLL(library).GOMP_parallel


def _address(arguments: array[int]) -> int:
    return arguments.buffer_info()[0]


_pool, _team = _Pool(), _Team()
# A child has none of its parent's threads, and maybe a lock that one held.
os.register_at_fork(after_in_child=_pool.__init__)
os.register_at_fork(after_in_child=_team.leave)


def num_threads() -> int:
    return torch.get_num_threads()


def run(kernel: Kernel, arguments: tuple[int, ...], numel: int, table: Sequence[int] = ()) -> None:
    """Call the kernel on as many threads as torch uses. ``table``: numbers that it looks for behind the counter."""
    with_counter = array("q", (*arguments, 0, *table))
    threads = num_threads() if numel >= LEAST_SHARED else 1
    if threads == 1:
        kernel.call(with_counter.buffer_info()[0])
    elif _team.parallel is not None and threading.current_thread() is threading.main_thread():
        _team.run(kernel, with_counter, threads)
    else:
        _pool.run(kernel, with_counter, threads)

"""How do the cores share a kernel? The caller works, and so do threads of ours that are free.

Not numba's own layer: it aborts where two threads call at once, and ours do (training and its traffic). Each thread makes one
call and takes units until none is left, so that only waking up and going to sleep need the interpreter's lock."""

from __future__ import annotations

import os
import threading
from array import array
from queue import SimpleQueue
from typing import Any

import torch

LEAST_SHARED = 1 << 17
"""Elements; below, a call is over before another thread has woken up (50 us)."""


class _Job:
    """One call of a kernel. A thread that comes after the caller has finished must not touch its tensors any more."""

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.kernel, self.args = kernel, args
        self.lock, self.idle = threading.Lock(), threading.Lock()
        self.running, self.over = 0, False
        self.idle.acquire()

    def help(self) -> None:
        with self.lock:
            if self.over:
                return
            self.running += 1
        self.kernel(*self.args)
        with self.lock:
            self.running -= 1
            if self.over and self.running == 0:
                self.idle.release()

    def finish(self) -> None:
        self.kernel(*self.args)
        with self.lock:
            self.over = True
            if self.running == 0:
                return
        self.idle.acquire()


class _Pool:
    """Threads that wait for jobs, made when first asked for."""

    def __init__(self) -> None:
        self.lock, self.jobs, self.size = threading.Lock(), SimpleQueue[_Job](), 0

    def grow(self, size: int) -> None:
        with self.lock:
            for i in range(self.size, size):
                threading.Thread(target=_work, args=(self.jobs,), name=f"dtrain-kernels-{i}", daemon=True).start()
            self.size = max(self.size, size)


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().help()


_pool = _Pool()
os.register_at_fork(after_in_child=_pool.__init__)  # a child has none of its parent's threads, and maybe a lock that one held


def num_threads() -> int:
    return torch.get_num_threads()


def run(kernel: Any, args: tuple[int | float, ...], numel: int) -> None:
    """kernel(*args, counter) on as many threads as torch uses."""
    counter = array("q", [0])
    args = (*args, counter.buffer_info()[0])
    helpers = num_threads() - 1 if numel >= LEAST_SHARED else 0
    if helpers == 0:
        kernel(*args)
        return
    if _pool.size < helpers:
        _pool.grow(helpers)
    job = _Job(kernel, args)
    for _ in range(helpers):
        _pool.jobs.put(job)
    job.finish()

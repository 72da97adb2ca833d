"""How long does a call take beside others? Contenders take turns, so that a noisy machine is noisy to all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch

Call = Callable[[], object]

ROUNDS = 15
MOST_S = 2.0
"""A contender that takes longer than this for all rounds together takes part in the first few only."""
LEAST_ROUNDS = 3
L2_BYTES = 256 << 20
"""Written between calls on a GPU; no cache of one is larger."""


class Timing(NamedTuple):
    median_s: float
    spread: float
    """(75 % - 25 %) / median."""
    repetitions: int


def interleaved(calls: Mapping[str, Call], device: torch.device, *, least_s: float = 0.2) -> dict[str, Timing]:
    """Time each call for least_s altogether, in turns. The first two calls of each (compilers, caches) do not count."""
    measure = _cuda() if device.type == "cuda" else _cpu
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats: dict[str, int] = {}
    for name, call in calls.items():
        call()
        once_s = max(1e-7, measure(call, 1)[0])
        repeats[name] = min(1000, max(1, math.ceil(least_s / ROUNDS / once_s)))
        samples[name] = []
    for turn in range(ROUNDS):
        for name, call in calls.items():
            if turn < LEAST_ROUNDS or sum(samples[name]) * repeats[name] < MOST_S:
                # Not timed: the threads of the contender before (OpenMP's) spin on for milliseconds and take this one's cores.
                call()
                samples[name] += measure(call, repeats[name])
    return {name: _timing(times, repeats[name] if device.type == "cpu" else 1) for name, times in samples.items()}


def bandwidths(total_bytes: int, device: torch.device) -> dict[str, Call]:
    """Two ways to move total_bytes: an out-of-place copy (half is read, half written) and an in-place scale (the same)."""
    numel = max(1, total_bytes // 8)
    source, target = torch.ones(numel, device=device), torch.empty(numel, device=device)
    return {"copy": lambda: target.copy_(source), "scale": lambda: source.mul_(1.0)}


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo does not say how much memory is available; name the sizes with --numel on another machine")


def _cpu(call: Call, repeats: int) -> list[float]:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return [(time.perf_counter() - began) / repeats]


def _cuda() -> Callable[[Call, int], list[float]]:
    """Each call between two events, behind a write that clears the L2 and gives the host the time to queue the call."""
    clear = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")

    def measure(call: Call, repeats: int) -> list[float]:
        repeats = min(repeats, 20)
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            clear.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    return measure


def _timing(times: list[float], each: int) -> Timing:
    middle = median(times)
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else (middle,) * 3
    return Timing(middle, (high - low) / middle, len(times) * each)

"""What is a check of ``make gpu``, and what is written down about one?"""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Found(NamedTuple):
    """A line that says what was compared or measured, and the numbers for the results file."""

    detail: str
    data: Any = None


# Runs on the device, raises AssertionError where it fails (where it differs from the CPU), and returns what it found.
Check = Callable[[torch.device], Found | str]


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    passed: bool
    detail: str
    wall_s: float
    data: Any = None
    gpu_peak_bytes: int = 0


def run(check: Check, device: torch.device) -> Outcome:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    try:
        found = check(device)
        passed, (detail, data) = True, found if isinstance(found, Found) else Found(found)
    except AssertionError as e:
        passed, detail, data = False, str(e), None
    wall_s = round(time.perf_counter() - began, 3)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Outcome(check.__name__, passed, detail, wall_s, data, peak)


def hardware(device: torch.device) -> dict[str, str | int]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "host_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "numba", "numpy")},
    }


def file_name(about: dict[str, str | int], date: str) -> str:
    """``NVIDIA H200`` on 2026-11-24 -> ``nvidia-h200-2026-11-24.json``."""
    device = "".join(c if c.isalnum() else "-" for c in str(about["device"]).lower())
    return f"{device}-{date}.json"


def write(folder: Path, about: dict[str, str | int], outcomes: Sequence[Outcome], date: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(about, date)
    resources = {
        "wall_s": round(sum(outcome.wall_s for outcome in outcomes), 3),
        "gpu_peak_bytes": max((outcome.gpu_peak_bytes for outcome in outcomes), default=0),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    results = {
        "date": date,
        "hardware": about,
        "resources": resources,
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path

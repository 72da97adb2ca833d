"""What is a check of ``make gpu``, and what is written down about one?"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

# Runs on the device, raises AssertionError where it differs from the CPU, and returns one line that says what was compared.
Check = Callable[[torch.device], str]


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    passed: bool
    detail: str
    wall_s: float


def run(check: Check, device: torch.device) -> Outcome:
    began = time.perf_counter()
    try:
        passed, detail = True, check(device)
    except AssertionError as e:
        passed, detail = False, str(e)
    return Outcome(check.__name__, passed, detail, round(time.perf_counter() - began, 3))


def hardware(device: torch.device) -> dict[str, str | int]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "numba", "numpy")},
    }


def write(folder: Path, about: dict[str, str | int], outcomes: Sequence[Outcome], date: str) -> Path:
    """``NVIDIA H200`` on 2026-11-24 -> ``nvidia-h200-2026-11-24.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    device = "".join(c if c.isalnum() else "-" for c in str(about["device"]).lower())
    path = folder / f"{device}-{date}.json"
    results = {"date": date, "hardware": about, "checks": [asdict(outcome) for outcome in outcomes]}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return path

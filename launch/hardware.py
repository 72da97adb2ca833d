"""What is this machine? For results, which say where they were measured."""

from __future__ import annotations

import platform
from pathlib import Path


def cpu_name() -> str:
    """As the kernel calls it; the architecture where it does not."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8").splitlines() if cpus.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

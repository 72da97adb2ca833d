"""How is a job run for a measurement, and what was it run on? Finished runs are kept, so a measurement that was
stopped goes on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dtrain.launch.hardware import cpu_name

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "launch" / "jobs" / "quickstart.toml"
RESULTS = Path(__file__).resolve().parent / "results"


def run_job(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run the quickstart job with overrides as ``folder/name``, unless it is finished already; returns its
    summary."""
    summary = folder / name / "summary.json"
    if not summary.exists():
        command = [
            sys.executable,
            "-m",
            "dtrain.launch",
            "run",
            str(JOB),
            "--fresh",
            f"job.dir={folder}",
            f"job.name={name}",
            *overrides,
        ]
        print(f"# {name}: {' '.join(overrides)}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    return json.loads(summary.read_text(encoding="utf-8"))


def hardware() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(name: str, content: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path

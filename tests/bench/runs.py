"""How is a job run for a measurement, and what was it run on? Finished runs are kept, so a measurement that was
stopped goes on."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from dtrain.launch.hardware import cpu_name

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "launch" / "jobs" / "quickstart.toml"
RESULTS = Path(__file__).resolve().parent / "results"


def arguments(page: str | None, rates: Sequence[str] = ()) -> list[str]:
    """The rates that the command line names, of those that can be measured, or all of them; ``--help`` prints the module's page
    and ends, and anything else is one line and status 2."""
    parser = argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rates:
        parser.add_argument("rates", nargs="*", metavar="RATE", help=f"of {', '.join(rates)}; left out: all")
    asked: list[str] = getattr(parser.parse_args(), "rates", [])
    if unknown := [one for one in asked if one not in rates]:
        parser.error(f"{unknown[0]} is no rate that is measured; use {', '.join(rates)}")
    return asked or list(rates)


def run_job(
    folder: Path, name: str, overrides: Sequence[str], *, job: Path = JOB, how: Literal["run", "sim"] = "run"
) -> dict[str, Any]:
    """Run a job, the quickstart if none is named, with overrides as ``folder/name``, unless it is finished already; returns its
    summary. ``how``: a process an island over its links, or all in one process, which gives the same bits."""
    summary = folder / name / "summary.json"
    if not summary.exists():
        command = [
            sys.executable,
            "-m",
            "dtrain.launch",
            how,
            str(job),
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

"""How much of a GPU's memory bandwidth do our kernels reach? NVIDIA's ncu counts it, over a small process of theirs alone.

ncu runs each kernel several times, so under it nothing can be said of a step: the job itself never runs under ncu."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass

_BYTES = "dram__bytes.sum"
_SHARE = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
_TIME = "gpu__time_duration.sum"
_UNITS = {_BYTES: {"byte": 1.0}, _SHARE: {"%": 1.0}, _TIME: {"ns": 1.0, "nsecond": 1.0}}  # with --print-units base
_TIMEOUT_S = 600.0

HEADER = ["kernel alone, by ncu", "calls", "us a call", "MB a call", "GB/s of DRAM", "% of peak"]


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch of a kernel."""

    name: str
    time_ns: float
    dram_bytes: float
    peak_percent: float


def check() -> None:
    """Raises ValueError where --ncu could not keep its promise; before the job runs."""
    if shutil.which("ncu") is None:
        raise ValueError("--ncu: there is no ncu on the PATH; it is part of NVIDIA's Nsight Compute; or leave --ncu out")
    import torch

    if not torch.cuda.is_available():
        raise ValueError("--ncu counts on a CUDA GPU, and this machine shows none; leave --ncu out")


def command(codec: str, numel: int) -> list[str]:
    return [
        *("ncu", "--csv", "--print-units", "base", "--target-processes", "all", "--profile-from-start", "off"),
        *("--metrics", ",".join(_UNITS)),
        *(sys.executable, "-m", "dtrain.codec_alone", codec, str(numel)),
    ]


def collect(codec: str, numel: int) -> list[Launched]:
    """Count one vector's encode and decode. Raises ValueError with ncu's last line where it fails."""
    try:
        done = subprocess.run(
            command(codec, numel), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"ncu did not end within {_TIMEOUT_S:g} s; leave --ncu out") from None
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ValueError(f"ncu ended with exit status {done.returncode}: {said[-1].strip() if said else 'it said nothing'}")
    return parse(done.stdout)


def parse(text: str) -> list[Launched]:
    """ncu's CSV: a line a launch and metric, after whatever the process and ncu itself printed."""
    lines = text.splitlines(keepends=True)
    at = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if at is None:
        raise ValueError("ncu counted no kernel: there is no table in what it printed")
    found: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO("".join(line for line in lines[at:] if line.startswith('"')))):
        metric, unit = row["Metric Name"], row["Metric Unit"]
        if metric not in _UNITS:
            continue
        if unit not in _UNITS[metric]:
            raise ValueError(f"ncu gives {metric} in {unit!r}, which is not understood; allowed: {', '.join(_UNITS[metric])}")
        try:
            value = float(row["Metric Value"].replace(",", "")) * _UNITS[metric][unit]
        except ValueError:
            raise ValueError(f"ncu gives {metric} = {row['Metric Value']!r}: this GPU does not count it") from None
        names[row["ID"]] = row["Kernel Name"]
        found.setdefault(row["ID"], {})[metric] = value
    for launch, values in found.items():
        if missing := sorted(set(_UNITS) - set(values)):
            raise ValueError(f"ncu counted no {missing[0]} of kernel {names[launch]}")
    return [Launched(names[launch], v[_TIME], v[_BYTES], v[_SHARE]) for launch, v in found.items()]


def rows(launched: list[Launched]) -> list[list[str]]:
    """The mean of each kernel's launches, those that take longest first."""
    of_name: dict[str, list[Launched]] = {}
    for one in launched:
        of_name.setdefault(one.name, []).append(one)
    table: list[list[str]] = []
    for name, same in sorted(of_name.items(), key=lambda item: -sum(one.time_ns for one in item[1])):
        time_ns, moved = (sum(one.time_ns for one in same), sum(one.dram_bytes for one in same))
        percent = sum(one.peak_percent * one.time_ns for one in same) / time_ns
        calls = len(same)
        means = (f"{time_ns / calls / 1e3:.1f}", f"{moved / calls / 1e6:.3f}", f"{moved / time_ns:.1f}", f"{percent:.1f}")
        table.append([name[:60], str(calls), *means])
    return table

"""Which checks does ``make gpu`` run, and where do its results go?"""

from __future__ import annotations

import datetime
import os
import shutil
import sys
from pathlib import Path

import torch

from tests.gpu import islands, kernels, overlap, speed
from tests.gpu.checks import Check, Outcome, hardware, run, write

CHECKS: tuple[Check, ...] = (
    kernels.same_bytes_as_cpu,
    islands.two_islands_equal_cpu,
    islands.outer_state_leaves_the_gpu,
    overlap.rounds_overlap_compute,
    speed.kernels_timed,
    kernels.numba_same_bytes,
)
"""What needs no GPU comes last: each result is written as soon as it is there, should the time on a GPU run out."""

RESULTS = Path(__file__).parent / "results"


def refusal() -> str | None:
    """Why nothing can be checked here, in one line that says what to do."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; run make gpu where it does, PYTHON= names the interpreter"
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton needs a C compiler to start a kernel; none of $CC, cc, gcc, clang is there; on Debian: apt-get install gcc"
    return None


def main() -> int:
    if reason := refusal():
        print(reason, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    outcomes: list[Outcome] = []
    path = RESULTS
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for check in CHECKS:
        outcomes.append(outcome := run(check, device))
        print(f"{'passed' if outcome.passed else 'FAILED'}  {outcome.name}  {outcome.wall_s} s  {outcome.detail}", flush=True)
        path = write(RESULTS, hardware(device), outcomes, today)  # what there is, should time run out
    print(f"written to {path}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

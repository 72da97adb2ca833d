"""Which checks does ``make gpu`` run, and where do its results go?"""

from __future__ import annotations

import datetime
import os
import shutil
import sys
from pathlib import Path

import torch

from tests.gpu import islands, kernels
from tests.gpu.checks import Check, hardware, run, write

CHECKS: tuple[Check, ...] = (kernels.same_bytes_as_cpu, islands.two_islands_equal_cpu)


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
    outcomes = [run(check, device) for check in CHECKS]
    for outcome in outcomes:
        print(f"{'passed' if outcome.passed else 'FAILED'}  {outcome.name}  {outcome.wall_s} s  {outcome.detail}")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    print(f"written to {write(Path(__file__).parent / 'results', hardware(device), outcomes, today)}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

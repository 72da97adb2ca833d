"""What happens before the first test? The CPU kernels are compiled, so that no test's time limit pays for it."""

from __future__ import annotations

import os

import torch

from dtrain.kernels import prepare


def pytest_sessionstart() -> None:
    if os.environ.get("DTRAIN_KERNELS") != "triton":
        prepare(torch.device("cpu"), (), lambda: print("compiling the CPU kernels, once: about half a minute", flush=True))

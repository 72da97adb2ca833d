"""What happens before the first test? The CPU kernels are compiled, so that no test's time limit pays for it, and tests that must
not run side by side are put together.

`make test` has a process a core. A file stays in one of them, for the sake of its fixtures; and all of tests/dist stays in one:
each of these tests has processes of its own, which are as many as the cores already."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dtrain.kernels import prepare

os.environ["CUDA_VISIBLE_DEVICES"] = ""
"""These tests are of a CPU, on a machine with a GPU too: an island's two ranks would share it, which NCCL refuses, and bits would
differ. ``make gpu`` has what needs one."""

DIST = Path(__file__).parent / "dist"


def pytest_sessionstart() -> None:
    if os.environ.get("DTRAIN_KERNELS") != "triton":
        prepare(torch.device("cpu"), (), lambda: print("compiling the CPU kernels, once: about half a minute", flush=True))


@pytest.hookimpl(tryfirst=True)  # the marks are read by another hook of this name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = DIST if item.path.is_relative_to(DIST) else item.path
        item.add_marker(pytest.mark.xdist_group(str(group)))

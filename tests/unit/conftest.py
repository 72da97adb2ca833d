"""What do several test modules of this folder begin with? Modules ask for it by name, ``pytest.mark.usefixtures`` too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.by_hand import write_texts


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A run sets the threads of its process, and what is trained or evaluated beside it must have as many. Small matrices are
    slower on two: where other work shares the cores, 70 times (67 s instead of 1 s)."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")

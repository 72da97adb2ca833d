"""Does ``make gpu`` see a kernel that differs, refuse in one line where there is no GPU, and write what it found?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dtrain.kernels import operations
from tests.gpu import __main__ as runner
from tests.gpu import islands, kernels
from tests.gpu.checks import Outcome, run, write

ROOT = Path(__file__).parents[2]
FEW_SIZES = (1, 65, 1_000)


def _copy_of_operations() -> ModuleType:
    copy = ModuleType("copy")
    copy.__dict__.update({name: getattr(operations(torch.device("cpu")), name) for name in kernels.CASES})
    return copy


def _on_the_second_call(op: str, fault: str) -> ModuleType:
    """Operations of which one, on every second call (the GPU's), flips the lowest bit of what it wrote."""
    ops, honest, calls = _copy_of_operations(), getattr(operations(torch.device("cpu")), op), [0]

    def faulty(*operands: Tensor | float) -> None:
        honest(*operands)
        calls[0] += 1
        written = operands[1 if fault == "wire" else 2]
        assert isinstance(written, Tensor)
        if calls[0] % 2 == 0:
            written.view(torch.uint8)[-1] ^= 1

    setattr(ops, op, faulty)
    return ops


def test_equal_kernels_pass() -> None:
    assert "6 operations" in kernels.compare(_copy_of_operations(), torch.device("cpu"), FEW_SIZES)


@pytest.mark.parametrize(("op", "fault"), [("cast_bf16", "wire"), ("quantize_int4", "wire"), ("dequantize_add_int8", "sum")])
def test_one_flipped_bit_is_seen(op: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=f"{op}, 1 elements"):
        kernels.compare(_on_the_second_call(op, fault), torch.device("cpu"), FEW_SIZES)


def test_an_operation_without_a_case_is_seen() -> None:
    ops = _copy_of_operations()
    ops.__dict__["sign"] = lambda x, wire: None
    with pytest.raises(AssertionError, match="sign"):
        kernels.compare(ops, torch.device("cpu"), FEW_SIZES)


def test_a_failed_check_is_an_outcome() -> None:
    def unequal(device: torch.device) -> str:
        raise AssertionError(f"{device} differs")

    outcome = run(unequal, torch.device("cpu"))
    assert (outcome.name, outcome.passed, outcome.detail) == ("unequal", False, "cpu differs")


def test_results_are_written_with_the_hardware(tmp_path: Path) -> None:
    path = write(tmp_path / "results", {"device": "ACME G1 80GB"}, [Outcome("same", True, "all", 0.5)], "2026-11-24")
    assert path.name == "acme-g1-80gb-2026-11-24.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["hardware"]["device"] == "ACME G1 80GB"
    assert results["checks"] == [{"name": "same", "passed": True, "detail": "all", "wall_s": 0.5}]


def test_without_a_gpu_one_line_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "sees no CUDA device" in done.stderr


@pytest.fixture
def gpu_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with a GPU on whose path these commands are, and no others."""

    def have(*commands: str, cc: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(shutil, "which", {command: f"/usr/bin/{command}" for command in commands}.get)
        monkeypatch.delenv("CC", raising=False)
        if cc is not None:
            monkeypatch.setenv("CC", cc)

    return have


@pytest.mark.parametrize(("commands", "cc"), [((), None), (("icx",), None), ((), "icx")])
def test_without_a_c_compiler_one_line_says_what_to_install(
    gpu_with: Callable[..., None], capsys: pytest.CaptureFixture[str], commands: tuple[str, ...], cc: str | None
) -> None:
    gpu_with(*commands, cc=cc)
    assert runner.main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "needs a C compiler" in err
    assert err.endswith("apt-get install gcc\n")


@pytest.mark.parametrize(("commands", "cc"), [(("cc",), None), (("gcc",), None), (("clang",), None), (("icx",), "icx")])
def test_with_any_c_compiler_nothing_is_refused(gpu_with: Callable[..., None], commands: tuple[str, ...], cc: str | None) -> None:
    gpu_with(*commands, cc=cc)
    assert runner.refusal() is None


def test_the_two_island_check_holds_between_two_cpu_runs() -> None:
    assert "bit-equal" in islands.two_islands_equal_cpu(torch.device("cpu"))

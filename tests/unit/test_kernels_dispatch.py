"""Is a backend that was asked for used, or refused in one line? And do the oracles hold whichever it is?"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain.kernels import BACKENDS, OPERATIONS, backend, dispatch, operations

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("reference", "numba"):
        monkeypatch.setenv("DTRAIN_KERNELS", name)
        assert operations(CPU).__name__ == BACKENDS[name]
    monkeypatch.delenv("DTRAIN_KERNELS")
    assert operations(CPU).__name__ == BACKENDS["numba"], "a CPU's default"


def test_triton_forced_is_for_the_gpu_and_leaves_its_host_to_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a link checks wires where they arrive. Where there is no GPU nothing takes Triton's place."""
    monkeypatch.setenv("DTRAIN_KERNELS", "triton")
    assert operations(CPU).__name__ == BACKENDS["triton"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert operations(CPU).__name__ == BACKENDS["numba"]
    assert operations(torch.device("cuda", 0)).__name__ == BACKENDS["triton"]


def test_an_unknown_backend_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_KERNELS", "cuda")
    with pytest.raises(ValueError, match="DTRAIN_KERNELS = 'cuda' is not a backend; use one of numba, reference, triton"):
        operations(CPU)


def test_a_backend_whose_package_is_missing_is_an_error_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numba'", name="numba")

    monkeypatch.setattr(dispatch.importlib, "import_module", absent)
    with pytest.raises(ValueError, match="the numba kernels need the package numba; install it, or set DTRAIN_KERNELS=reference"):
        backend("numba")


@pytest.mark.parametrize("name", BACKENDS)
def test_each_backend_has_every_operation_with_the_references_signature(name: str) -> None:
    reference, module = backend("reference"), importlib.import_module(BACKENDS[name])
    for operation in OPERATIONS:
        want, got = (inspect.signature(getattr(m, operation)).parameters for m in (reference, module))
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in want.values()], operation


def test_on_the_meta_device_every_operation_does_nothing_whatever_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DTRAIN_KERNELS", "reference")
    nothing = operations(torch.device("meta"))
    for operation in OPERATIONS:
        assert inspect.signature(getattr(nothing, operation)) == inspect.signature(getattr(backend("reference"), operation))
    x = torch.ones(3)
    nothing.scale([x], torch.zeros(1))
    assert x.tolist() == [1, 1, 1]


def test_kernels_are_compiled_once_and_that_is_said(tmp_path: Path) -> None:
    """In processes of their own, whose cache begins empty: the first says so and compiles, the second does neither. One kernel
    stands for all, which take half a minute."""
    program = (
        "import torch; from dtrain.kernels import _numba, dispatch\n"
        "whole = _numba.prepare\n"
        "_numba.prepare = lambda *kinds: kinds or (whole((), ('scale',)), note())\n"
        "from dtrain.kernels._numba import compiled\n"
        "def note(): compiled.note_compiled([compiled.KERNELS['scale'].compiled._cache._cache_file._index_path])\n"
        "dispatch.prepare(torch.device('cpu'), (), lambda: print('compiling'))\n"
        "x = torch.ones(5); _numba.scale([x], torch.tensor([2.0]))\n"
        "print(x.tolist())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DTRAIN_KERNELS"} | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    said = [
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=True).stdout
        for _ in range(2)
    ]
    assert said == ["compiling\n[2.0, 2.0, 2.0, 2.0, 2.0]\n", "[2.0, 2.0, 2.0, 2.0, 2.0]\n"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["reference", "numba"])
def test_all_oracles_hold_with_each_backend(name: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/oracle", "tests/unit/test_wire.py"]
    environment = os.environ | {"DTRAIN_KERNELS": name}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]

"""Do the Triton kernels, interpreted on a CPU, write the bytes of the reference?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dtrain.kernels import OPERATIONS, Format, Noise, Piece, backend, reference
from dtrain.kernels.operands import Adam

ROOT = Path(__file__).parents[2]
PROCESSES = 2
pytestmark = pytest.mark.timeout(400)  # about 30 s on two free cores; the first test waits for all


def _compare(operations: tuple[str, ...], *options: str) -> dict[str, str | None]:
    """In processes of their own, every PROCESSES-th operation each."""
    command = [sys.executable, "-m", "tests.triton_cases", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([*command, *operations[i::PROCESSES]], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    outputs = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    return {name: fault for output in outputs for name, fault in json.loads(output).items()}


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    return _compare(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_byte_is_the_reference_s(found: dict[str, str | None], operation: str) -> None:
    assert found[operation] is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_byte_is_the_reference_s_at_more_blocks_and_alignments() -> None:
    assert not {name: fault for name, fault in _compare(OPERATIONS, "--thorough").items() if fault}


def test_all_names_are_there_with_the_reference_s_parameters() -> None:
    def parameters(module: object, name: str) -> tuple[str, ...]:
        code = getattr(module, name).__code__
        return code.co_varnames[: code.co_argcount]

    for name in OPERATIONS:
        assert parameters(backend("triton"), name) == parameters(reference, name), name


def test_cpu_tensors_are_refused_where_nothing_interprets() -> None:
    ops, x = backend("triton"), torch.zeros(64)
    with pytest.raises(ValueError, match="got CPU tensors"):
        ops.quantize_int8(x, torch.zeros(64, dtype=torch.uint8), torch.zeros(1, dtype=torch.bfloat16), 64)
    with pytest.raises(ValueError, match="got CPU tensors"):
        ops.checksum(x.view(torch.uint8), 0, 0, torch.zeros(1, dtype=torch.int64))


def test_a_wire_of_another_length_is_refused_before_anything_is_written() -> None:
    with pytest.raises(ValueError, match="int4 of 65 elements"):
        backend("triton").quantize_int4(
            torch.zeros(65), torch.zeros(32, dtype=torch.uint8), torch.zeros(2, dtype=torch.bfloat16), 64
        )


def test_a_block_that_no_kernel_has_is_refused() -> None:
    with pytest.raises(ValueError, match="a power of two from 32 to 4096, got 48"):
        backend("triton").quantize_int8(
            torch.zeros(48), torch.zeros(48, dtype=torch.uint8), torch.zeros(1, dtype=torch.bfloat16), 48
        )


def test_topk_has_no_fused_step() -> None:
    x, one = torch.zeros(64), torch.ones(1)
    adam = Adam(1e-3, 0.9, 0.95, 1e-8, 0.9, 0.95, 1, True)
    with pytest.raises(ValueError, match="topk has no fused step"):
        backend("triton").gossip_adam(
            [Piece(x, x, x, x, x, 0.0)],
            adam,
            one,
            1.0,
            [],
            [],
            torch.zeros(9, dtype=torch.uint8),
            Format("topk", 64, 4, 2),
            Noise(0, 0),
        )

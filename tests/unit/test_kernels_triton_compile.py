"""Does every Triton kernel compile for every target, on a machine without a GPU, and keep to its registers?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dtrain.kernels import OPERATIONS
from dtrain.kernels._triton.launch import MOST_REGISTERS, Launch, options
from dtrain.kernels._triton.specializations import dealt, few, launches, one_each

ROOT = Path(__file__).parents[2]
TARGETS = {"cuda:80", "cuda:90", "cuda:100", "hip:gfx942"}


def _compiled(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    report = tmp_path / "resources.json"
    command = [sys.executable, "-m", "dtrain.kernels._triton.compile", "--json", str(report), *options]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(report.read_text())["kernels"]


def _check(rows: list[dict[str, Any]]) -> None:
    kernels = {launch.name for launch in launches((64,), (4096,))}
    assert {(row["kernel"], row["target"]) for row in rows} == {(kernel, target) for kernel in kernels for target in TARGETS}
    assert not [row for row in rows if row["spills"]]
    assert not [row for row in rows if row["faults"]]
    assert not [row for row in rows if row["target"].startswith("cuda") and 32 * row["num_warps"] * row["registers"] > 65536]


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_target_and_spills_nothing(tmp_path: Path) -> None:
    _check(_compiled(tmp_path, "--few"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_specialization_compiles_for_every_target_and_spills_nothing(tmp_path: Path) -> None:
    _check(_compiled(tmp_path))


def test_every_operation_launches_a_kernel_that_is_compiled() -> None:
    found = launches((64,), (4096,))
    assert set(found.values()) == set(OPERATIONS)
    assert set(map(str, one_each(found))) <= set(map(str, few(found)))
    assert {launch.name for launch in one_each(found)} == {launch.name for launch in found}


def test_every_target_is_dealt_every_kernel_and_some_target_every_value() -> None:
    found = launches((64,), (4096,))
    hands = dealt(found, len(TARGETS))
    for hand in hands:
        assert {launch.name for launch in hand} == {launch.name for launch in found}
    assert set(one_each(found)) <= set(hands[0]), "the dearest, all on one target"

    def values(some: Iterable[Launch]) -> set[tuple[object, ...]]:
        return {(launch.name, *pair) for launch in some for pair in (*launch.constants, *launch.signature)}

    assert values(launch for hand in hands for launch in hand) == values(found)
    assert sum(map(len, hands)) < 70, "a second of a core each"


def test_no_program_may_take_more_registers_than_an_sm_has() -> None:
    """As one of 16 warps and 168 registers a thread did, which compiled, and which an H100 did not start."""
    found = launches((64,), (4096,)) | launches((32, 4096), (64,))
    limited = [(x, options(x.name, x.num_warps, "cuda")["maxnreg"]) for x in found if x.name in MOST_REGISTERS]
    assert {x.num_warps for x, _ in limited} == {1, 2, 4, 8, 16}
    assert not [str(x) for x, registers in limited if registers * 32 * x.num_warps > 65536]


def test_the_recorded_resources_are_of_what_is_launched() -> None:
    rows = json.loads((ROOT / "tests/gpu/results/resources.json").read_text(encoding="utf-8"))["kernels"]
    now = launches((64,), (4096,)) | few(launches((32, 4096), (64,)))
    assert {(row["launch"], row["num_warps"]) for row in rows} == {(str(launch), launch.num_warps) for launch in now}
    _check(rows)


def test_a_second_compilation_of_one_name_would_be_seen() -> None:
    """Nothing but constants and pointers' types tells two compiled kernels apart, so their shown names do too."""
    found = launches((32, 64), (64, 4096))
    assert len(set(map(str, found))) == len(found)

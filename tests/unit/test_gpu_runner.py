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
from typing import Any

import pytest
import torch

from dtrain.kernels import OPERATIONS, reference
from dtrain.kernels._triton import launch
from dtrain.kernels.bench import Options
from dtrain.kernels.equal import tensors
from tests.gpu import __main__ as runner
from tests.gpu import islands, kernels, overlap, speed
from tests.gpu.checks import Found, Outcome, run, write

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def _flips_a_bit(op: Callable[..., None], position: int) -> Callable[..., None]:
    """An operation that flips the lowest bit of the last element of what it wrote to one of its tensors."""

    def faulty(*operands: Any) -> None:
        op(*operands)
        written = list(tensors(operands))[position]
        written.view(torch.uint8)[-1 if written.dtype == torch.uint8 else -written.element_size()] ^= 1

    return faulty


def test_equal_kernels_pass() -> None:
    assert "30 operations" in kernels.compare(reference, CPU, (65,))


@pytest.mark.parametrize(
    ("op", "position"), [("cast_bf16", 1), ("quantize_int4", 1), ("dequantize_add_int8", 2), ("gossip_adam", 0), ("checksum", 1)]
)
@pytest.mark.parametrize("numel", [1, 1_000])
def test_one_flipped_bit_is_seen(op: str, position: int, numel: int) -> None:
    case = kernels.CASES[op][0]
    (before, *_) = kernels.calls(case, numel)
    kernels.compare_one(case, getattr(reference, op), before, CPU, numel, shift=True)
    with pytest.raises(AssertionError, match=rf"{op}.* {numel} elements: tensor {position} differs in 1 of"):
        kernels.compare_one(case, _flips_a_bit(getattr(reference, op), position), before, CPU, numel, shift=True)


def test_an_operation_without_a_case_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(kernels.CASES, "checksum")
    with pytest.raises(AssertionError, match=r"operations without a case.*\['checksum'\]"):
        kernels.compare(reference, CPU, ())


def test_a_backend_without_an_operation_is_seen() -> None:
    partial = ModuleType("partial")
    partial.__dict__.update({name: getattr(reference, name) for name in OPERATIONS if name != "mix"})
    with pytest.raises(AssertionError, match=r"\['mix'\]"):
        kernels.compare(partial, CPU, ())


def test_the_inputs_hold_what_their_names_say() -> None:
    x = torch.cat([kernels.extremes(1_000, 0), kernels.denormals(1_000, 0), kernels.ties(1_000, 0), kernels.binades(1_000, 0)])
    tiny = torch.finfo(torch.float32).smallest_normal
    assert x.isnan().any()
    assert x.isposinf().any()
    assert x.isneginf().any()
    assert ((x.abs() < tiny) & (x != 0)).sum() >= 1_000
    assert ((x == 0) & x.signbit()).any()


def test_tiles_and_warps_are_those_that_a_sweep_found() -> None:
    swept = json.loads((ROOT / "tests/gpu/results/sweep-nvidia-h200-2026-11-27.json").read_text(encoding="utf-8"))["rows"]
    ms = dict[tuple[str, str, str], dict[tuple[int, int], float]]()
    for row in swept:
        ms.setdefault((row["op"], row["dtype"], row["variant"]), {})[row["tile"], row["per_warp"]] = row["median_ms"]
    assert len(ms) == 18
    slower = set[tuple[str, str]]()
    for (op, dtype, _), found in ms.items():
        assert len(found) == 7
        chosen = found[launch.TILE, launch.ELEMENTS_PER_WARP_OF_CHOCO if "choco" in op else launch.ELEMENTS_PER_WARP]
        if chosen > 1.01 * min(found.values()):
            slower.add((op, dtype))
    assert slower == {("encode", "bf16"), ("mix", "bf16")}


def test_operands_are_shifted_off_their_alignment() -> None:
    shifted = kernels._shifted(torch.arange(5.0))
    assert torch.equal(shifted, torch.arange(5.0))
    assert shifted.data_ptr() % 16 == 4


def test_a_failed_check_is_an_outcome() -> None:
    def unequal(device: torch.device) -> str:
        raise AssertionError(f"{device} differs")

    outcome = run(unequal, torch.device("cpu"))
    assert (outcome.name, outcome.passed, outcome.detail) == ("unequal", False, "cpu differs")


def test_what_a_check_measured_is_kept() -> None:
    outcome = run(lambda device: Found("two rows", [1, 2]), CPU)
    assert (outcome.passed, outcome.detail, outcome.data) == (True, "two rows", [1, 2])


def test_results_are_written_with_the_hardware(tmp_path: Path) -> None:
    path = write(tmp_path / "results", {"device": "ACME G1 80GB"}, [Outcome("same", True, "all", 0.5)], "2026-11-24")
    assert path.name == "acme-g1-80gb-2026-11-24.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["hardware"]["device"] == "ACME G1 80GB"
    (check,) = results["checks"]
    assert check == {"name": "same", "passed": True, "detail": "all", "wall_s": 0.5, "data": None, "gpu_peak_bytes": 0}
    assert results["resources"]["wall_s"] == 0.5
    assert results["resources"]["host_peak_bytes"] > 1 << 20


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


@pytest.mark.parametrize(("of_host", "fails"), [(0, False), (512, True)])
def test_a_copy_that_is_left_on_the_gpu_is_seen(monkeypatch: pytest.MonkeyPatch, of_host: int, fails: bool) -> None:
    """Of what islands hold, which a CPU does not tell."""
    kept = {"host": of_host, "device": 2 * 12 * islands.NUMEL}
    monkeypatch.setattr(islands, "_held_bytes", lambda device, axes: 4096 + kept.get(axes.get("outer_state", ""), 0))
    outcome = run(islands.outer_state_leaves_the_gpu, CPU)
    assert outcome.passed is not fails
    assert ("512 bytes of two islands' outer state lie on the GPU" in outcome.detail) is fails


def test_what_a_gpu_holds_is_read_while_both_islands_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter((100, 350))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(told))
    assert islands._held_bytes(CPU, {"recipe": "fedavg", "every": 6, "outer_state": "host"}) == 250


def test_rounds_that_fly_overlap_compute_and_rounds_that_are_waited_for_do_not() -> None:
    found = overlap.overlap(CPU, overlap.CPU)
    assert found.data["flights"] > 0
    assert found.data["kernels_inside"] > 0
    assert found.data["fraction_when_waited_for"] < found.data["fraction"] <= 1


def test_the_covered_share_counts_no_time_twice() -> None:
    flights = [(0.0, 2.0), (1.0, 4.0), (10.0, 11.0)]
    assert overlap.covered(flights, [(0.5, 1.5), (1.0, 2.0), (3.5, 10.5)]) == pytest.approx((1.5 + 0.5 + 0.5) / 5)
    assert overlap.covered(flights, []) == 0
    assert overlap.covered([], flights) == 0


def test_a_trace_of_a_gpu_is_read_by_the_kernels_and_copies_in_it() -> None:
    def event(cat: str, name: str, ts: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 2.0}

    trace = {
        "baseTimeNanoseconds": 5_000_000_000,
        "traceEvents": [
            event("kernel", "sm90_xmma_gemm_f32f32", 1e6),
            event("kernel", "elementwise_kernel", 2e6),
            event("cpu_op", "aten::mm", 3e6),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 4e6),
            event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 4e6),
            {"ph": "M", "name": "process_name"},
        ],
    }
    computes, copies = overlap.read_trace(trace, cuda=True)
    assert computes == [pytest.approx((6.0, 6.000002))]
    assert copies == ["Memcpy DtoH (Device -> Pinned)"]
    assert overlap.read_trace(trace, cuda=False)[0] == [pytest.approx((8.0, 8.000002))]


def test_the_benchmark_stops_at_its_deadline_and_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "find_backends", lambda *_: {"reference": reference})
    plan = Options(CPU, ("scale", "mix"), numels=(1_000,), compile=False, least_s=0.001)
    found = speed.timed((plan,), CPU, 60.0)
    assert found.data["rows"][0]["gb_s"] > 0
    cut = speed.timed((plan, plan), CPU, 0.0)
    assert cut.detail.startswith("1 of 6 rows")


def test_the_benchmark_fails_where_a_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(xs: list[torch.Tensor], factor: torch.Tensor) -> None:
        xs[0].zero_()

    broken = ModuleType("broken")
    broken.__dict__.update({"scale": wrong})
    monkeypatch.setattr(speed, "find_backends", lambda *_: {"broken": broken})
    with pytest.raises(AssertionError, match="broken: scale, 1 elements: tensor 0 differs"):
        speed.timed((Options(CPU, ("scale",), numels=(1_000,), compile=False, least_s=0.001),), CPU, 60.0)

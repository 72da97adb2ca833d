"""Does ``dtrain bench kernels`` count bytes right, refuse a speed to a wrong kernel, and say in one line what it cannot do?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.kernels import OPERATIONS, Format, bench, bench_baselines, reference
from dtrain.kernels.bench import Options, Row, parse_numel, run, show_numel, write_rows
from dtrain.kernels.bench_cases import IN_PLACE, Case, default_cases, in_parts, operands
from dtrain.kernels.bench_timing import LEAST_ROUNDS, ROUNDS, interleaved
from dtrain.kernels.equal import copies, difference, tensors
from dtrain.kernels.floors import FLOORS, PARTS, Sizes, floor_bytes, parts_bound
from dtrain.launch.cli import run_command
from dtrain.launch.cli_bench import show

CPU = torch.device("cpu")
INT4 = Format("int4", 64)
W = 500 + 2 * 16
"""The wire of 1,000 elements in int4:64: a nibble each, and 16 bf16 scales."""

BY_HAND = {
    "quantize_int8": (Sizes(1000, 4, Format("int8", 64)), 4000 + 1000 + 32),
    "quantize_int4": (Sizes(1000, 2, INT4), 2000 + W),
    "quantize_e3m0": (Sizes(1000, 4, Format("e3m0", 32)), 4000 + 500 + 64),
    "quantize_lut4": (Sizes(1000, 4, Format("lut4", 64)), 4000 + 500 + 64),
    "quantize_sign": (Sizes(1000, 4, Format("sign", 64)), 4000 + 125 + 32),
    "dequantize_add_int8": (Sizes(1000, 4, Format("int8", 64)), 1032 + 8000),
    "dequantize_add_int4": (Sizes(1000, 4, INT4), W + 8000),
    "dequantize_add_e3m0": (Sizes(1000, 4, Format("e3m0", 64)), W + 8000),
    "dequantize_add_lut4": (Sizes(1000, 4, Format("lut4", 64)), 564 + 8000),
    "dequantize_add_sign": (Sizes(1001, 4, Format("sign", 64)), 126 + 32 + 8008),
    "cast_bf16": (Sizes(1000, 4), 4000 + 2000),
    "add_bf16": (Sizes(1000, 4), 2000 + 8000),
    "topk_chunks": (Sizes(8192, 4, Format("topk", 4096, 64, 2)), 32768 + 2 * (64 * 14 // 8 + 4)),
    "topk_add": (Sizes(8192, 4, Format("topk", 4096, 64, 2)), 2 * (64 * 14 // 8 + 4) + 128 * 8),
    "encode": (Sizes(1000, 4, Format("identity")), 4000 + 4000),
    "decode_add": (Sizes(1000, 4, Format("topk", 4096, 4096, 8)), 4096 * 20 // 8 + 2 + 8000),
    "encode_difference": (Sizes(1000, 2, INT4), 4000 + 2000 + W),
    "encode_feedback": (Sizes(1000, 2, INT4), 2000 + 8000 + W),
    "choco_encode": (Sizes(1000, 4, INT4), 4000 + 8000 + 8000 + W),
    "choco_mix": (Sizes(1000, 2, INT4, 2), 4000 + 4000 + 8000 + 2 * W),
    "mix": (Sizes(1000, 4, INT4, 3), 8000 + 3 * W),
    "accum_adam": (Sizes(1000, 4, every=1), 12000 + 16000),
    "gossip_adam": (Sizes(1000, 2, INT4, 2, 4, False), 6000 + 8000 + 8000 + 3 * W),
    "choco_gossip_adam": (Sizes(1000, 2, INT4, 2, 4, True), 6000 + 16000 + 8000 + 16000 + 3 * W),
    "outer_step": (Sizes(1000, 2), 4000 + 4000 + 8000 + 8000 + 4000),
    "sum_of_squares": (Sizes(65537, 2), 131074 + 16),
    "scale": (Sizes(1000, 2), 4000),
    "checksum": (Sizes(1000, 1), 1000),
    "flag_non_finite": (Sizes(1000, 2), 2000),
    "put_identity": (Sizes(1000, 2), 2000 + 4000),
}


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_fewest_bytes_are_those_counted_by_hand(op: str) -> None:
    sizes, expected = BY_HAND[op]
    assert floor_bytes(op, sizes) == expected


def test_every_operation_is_measured_against_one_of_two_bandwidths() -> None:
    assert {case.op for case in default_cases(("fp32",), INT4)} == set(FLOORS) == set(OPERATIONS)
    changed = {case.op for case in default_cases(("bf16",), INT4) if _changes_what_it_reads(case)}
    assert changed == set(IN_PLACE)


def _changes_what_it_reads(case: Case) -> bool:
    """Whether a tensor that held something, and is not a wire, holds something else afterwards."""
    before = operands(case, 1000, CPU, weight=0.4)
    after = copies(before, CPU)
    getattr(reference, case.op)(*after)
    pairs = zip(tensors(before), tensors(after), strict=True)
    return any(a.any() and not torch.equal(a, b) for a, b in pairs)


def test_one_pass_wins_at_most_what_its_parts_move_more() -> None:
    mix, adam, encode = 4000 + W, 6000 + 16000, 2000 + W
    assert parts_bound("gossip_adam", Sizes(1000, 2, INT4)) == (mix + adam + encode) / (6000 + 16000 + 2 * W)
    assert parts_bound("mix", Sizes(1000)) is None


@pytest.mark.parametrize("op", PARTS)
def test_the_parts_compute_what_the_one_pass_computes(op: str) -> None:
    case = Case(op, "bf16", INT4, 2, 4, True, random=True)
    one, parts = (operands(case, 777, CPU) for _ in range(2))
    getattr(reference, op)(*one)
    call = in_parts(case, parts, reference)
    assert call is not None
    call()
    assert difference(op, one, one, parts) is None


# ---- rows


def _tiny(*ops: str, **others: Any) -> Options:
    return Options(ops=ops, numels=(1000,), compile=False, least_s=0.001, **others)


def test_a_row_says_what_it_was_measured_with(tmp_path: Path) -> None:
    rows = list(run(_tiny("accum_adam", "gossip_adam", "cast_bf16"), {"reference": reference}, print))
    write_rows(tmp_path / "rows.json", rows)
    written = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert len(written) == 1 + 3 + 4
    needed = {"op", "backend", "device", "dtype", "numel", "median_s", "floor_bytes", "gb_s", "copy_fraction", "vs_eager"}
    for row in written:
        assert needed | {"vs_compile"} <= set(row) == {f.name for f in fields(Row)}
        assert row["gb_s"] == pytest.approx(row["floor_bytes"] / row["median_s"] / 1e9)
        assert row["copy_fraction"] == pytest.approx(row["gb_s"] / row["bandwidth_gb_s"])
        assert row["bandwidth"] == ("copy" if row["op"] == "cast_bf16" else "scale")
        assert row["vs_compile"] is None
        assert "torch" in row["machine"]
    assert all((row["vs_parts"] is not None) == (row["op"] == "gossip_adam") for row in written)
    assert all((row["vs_adamw_fused"] is not None) == (row["op"] == "accum_adam") for row in written)
    assert [row["variant"] for row in written[1:4]] == ["s=1", "s=4", "s=4 closes"]
    assert all(len(line) <= 120 for row in rows for line in show(row).splitlines())


def _broken(op: str, fault: Callable[..., None]) -> ModuleType:
    module = ModuleType("broken")
    module.__dict__.update({name: getattr(reference, name) for name in OPERATIONS})
    module.__dict__[op] = fault
    return module


def _raises(*operands: object) -> None:
    raise RuntimeError("no such thing\nas a kernel")


def _off_by_a_bit(x: Tensor, wire: Tensor) -> None:
    reference.cast_bf16(x, wire)
    wire[0] ^= 1


@pytest.mark.parametrize(("fault", "said"), [(_off_by_a_bit, "tensor 1 differs in 1 of 1"), (_raises, "RuntimeError: no such")])
def test_a_wrong_kernel_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: Callable[..., None], said: str
) -> None:
    broken = {"fast": _broken("cast_bf16", fault), "reference": reference}
    monkeypatch.setattr(bench, "find_backends", lambda *_: broken)
    words = ["bench", "kernels", "--quick", "--op", "cast_bf16", "--op", "scale", "--numel", "1k", "--json"]
    status = run_command([*words, str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    (wrong,) = [row for row in rows if not row["equal"]]
    assert status == 1
    assert (wrong["op"], wrong["backend"]) == ("cast_bf16", "fast")
    assert {k for k, v in wrong.items() if isinstance(v, float)} == set(), "no number that could be taken for a speed"
    assert said in wrong["message"]
    assert sum(row["median_s"] is not None for row in rows) == 3, "the others are measured all the same"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cast_bf16") and "fast" in line]
    assert "NOT EQUAL, no speed" in line


def test_what_does_not_fit_into_memory_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_bytes", lambda device: 100_000)
    said: list[str] = []
    options = Options(ops=("scale",), numels=(1000, 1 << 20), compile=False, least_s=0.001)
    rows = list(run(options, {"reference": reference}, said.append))
    assert [row.numel for row in rows] == [1000]
    assert said == ["left out, 2^20 elements need more than the 0.0 GiB that can be used: scale"]


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SLOW_S", 1e-9)
    said: list[str] = []
    options = Options(ops=("scale",), numels=(1000, 2000), compile=False, least_s=0.001)
    assert [row.numel for row in run(options, {"reference": reference}, said.append)] == [1000]
    assert any("reference at 2000 would take more than 1e-09 s a call: scale" in line for line in said)


def test_a_baseline_that_does_not_compile_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(bench_baselines.torch, "compile", lambda *_, **__: refuse)
    said: list[str] = []
    options = Options(ops=("scale",), numels=(1000,), least_s=0.001)
    (row,) = run(options, {"reference": reference}, said.append)
    assert row.vs_compile is None
    assert row.message == "torch.compile: RuntimeError: no C++ compiler"
    assert said == [f"no number: {row.message}"]


def test_the_full_size_is_one_gibibyte_of_the_largest_operand() -> None:
    assert bench.full_numel(Case("accum_adam", "bf16")) == 1 << 28
    assert bench.full_numel(Case("flag_non_finite", "bf16")) == 1 << 29
    assert bench.full_numel(Case("checksum", "uint8")) == 1 << 30


def test_contenders_take_turns_and_a_slow_one_drops_out(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = [0.0]

    def call(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            clock[0] += seconds

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timed = interleaved({"a": call("a", 0.1), "slow": call("slow", 5.0), "b": call("b", 0.125)}, CPU, least_s=0.2)
    assert {name: timing.repetitions for name, timing in timed.items()} == {"a": ROUNDS, "slow": LEAST_ROUNDS, "b": ROUNDS}
    assert {name: round(timing.median_s, 9) for name, timing in timed.items()} == {"a": 0.1, "slow": 5.0, "b": 0.125}
    assert order[6:18] == ["a", "a", "slow", "slow", "b", "b"] * 2, "the first of each turn is not timed"
    assert timed["a"].spread == pytest.approx(0.0, abs=1e-9)


# ---- equality


def test_a_flipped_bit_differs_and_a_nan_is_any_nan() -> None:
    case = Case("encode_feedback", "fp32", INT4)
    expected = operands(case, 1000, CPU)
    got = copies(expected, CPU)
    assert difference(case.op, expected, expected, got) is None
    expected[1][3], got[1][3] = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(torch.float32)
    assert difference(case.op, expected, expected, got) is None
    got[3].codes[7] ^= 1
    assert str(difference(case.op, expected, expected, got)).startswith("tensor 2 differs in 1 of 500 elements, first at 7")


def test_outer_step_may_fuse_and_may_not_be_wrong() -> None:
    before = operands(Case("outer_step", "bf16"), 4_099, CPU)
    expected, fused, wrong = (copies(before, CPU) for _ in range(3))
    reference.outer_step(*expected)
    x, sent, anchor, momentum, delta, lr, mu = fused
    momentum.copy_(mu * momentum).add_(delta)
    step = (momentum.double() * mu + delta.double()).float()
    anchor.copy_(anchor.double() - lr * step.double())
    x.copy_((x.float() - sent) + anchor)
    assert difference("outer_step", before, expected, fused) is None
    reference.outer_step(*wrong)
    wrong[2].add_(wrong[2].abs() * 2.0**-20)
    assert "outside the bound" in str(difference("outer_step", before, expected, wrong))


# ---- the command line


@pytest.mark.parametrize(("text", "numel"), [("2^24", 1 << 24), ("16M", 1 << 24), ("3k", 3072), ("65_537", 65537), ("full", 0)])
def test_sizes_as_people_write_them(text: str, numel: int) -> None:
    assert parse_numel(text) == numel
    assert show_numel(1 << 24) == "2^24"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--op softmax", "--op softmax: there is no such operation; there are quantize_int8, "),
        ("--backend cuda", "--backend cuda: there are numba, reference, triton"),
        ("--backend triton --device cpu", "--backend triton: "),
        ("--numel many", "--numel many: write elements as 2^24"),
        ("--numel 0", "--numel 0: write elements as"),
        ("--numel 2^40", "--numel 2^40: write elements as"),
        ("--dtype fp16", "--dtype fp16: x is fp32 or bf16"),
        ("--device tpu", "--device tpu: measure on cpu or cuda"),
        ("--json no/such/folder.json", "--json no/such/folder.json: name a file in a folder that is there"),
        ("--sizes 3", "No such option: --sizes"),
    ],
)
def test_a_wrong_word_is_one_line(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert run_command(["bench", "kernels", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"dtrain: {said}")


def test_a_quick_run_prints_a_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["bench", "kernels", "--quick", "--backend", "reference", "--numel", "1k", "--op", "mix"]) == 0
    out = capsys.readouterr().out
    assert "torch " in out.splitlines()[0]
    lines = [line for line in out.splitlines() if line.startswith("mix ")]
    assert [line[4:21].strip() for line in lines] == ["int8:64, 1 wire", "int4:64, 2 wires"]
    assert all("scale" in line for line in lines)

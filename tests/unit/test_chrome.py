"""Is the merged trace one picture: a process a rank, one clock, arrows of their own, and bytes only where shapes tell?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dtrain.chrome import bytes_a_call, read_rank, write_merged
from dtrain.moved_bytes import moved_bytes
from dtrain.transport.base import ROUND

SECOND = 1_000_000_000
BEGUN = 1_800_000_000 * SECOND
"""A time in 2027, in nanoseconds: microseconds of it need all of a double's digits."""


def raw(name: str, cat: str, at_us: float, *, pid: int = 500, tid: int = 500, **arguments: object) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": at_us, "dur": 2.5, "args": arguments}


def arrow(phase: str, *, pid: int, tid: int) -> dict[str, Any]:
    return {"ph": phase, "cat": "ac2g", "name": "ac2g", "pid": pid, "tid": tid, "ts": 40.0, "id": 9}


def leave(folder: Path, island: int, base_ns: int) -> Path:
    """What one rank leaves: its torch.profiler counts from another instant than the other's."""
    folder.mkdir()
    late_us = (BEGUN - base_ns) / 1000
    events = [
        {"ph": "M", "name": "process_name", "pid": 500, "tid": 0, "ts": 0, "args": {"name": "python"}},
        raw("aten::mm", "cpu_op", late_us + 40.25, **{"External id": 1}),
        raw("gemm", "kernel", late_us + 41, pid=0, tid=7, **{"correlation": 3, "External id": 1}),
        raw("cudaLaunchKernel", "cuda_runtime", late_us + 40.5, correlation=3),
        arrow("s", pid=500, tid=500),
        arrow("f", pid=0, tid=7),
        raw("gloo:recv", "user_annotation", late_us + 39.5, **{"External id": 4}),
        raw("PyTorch Profiler (0)", "Trace", late_us) | {"pid": "Spans", "tid": "PyTorch Profiler"},
    ]
    (folder / "times-rank0.json").write_text(json.dumps({"baseTimeNanoseconds": base_ns, "traceEvents": events}))
    (folder / "shapes-rank0.json").write_text(json.dumps({"baseTimeNanoseconds": base_ns, "traceEvents": []}))
    content = {
        "island": island,
        "rank": 0,
        "main_thread": 500,
        "traces": ["times-rank0.json", "shapes-rank0.json"],
        "plain": [BEGUN + 10_000, BEGUN + 30_000],
        "traced": [BEGUN + 35_000, BEGUN + 60_000],
        "spans": [["forward_backward", 500, BEGUN + 11_000, BEGUN + 20_000, 0], ["wait", 500, BEGUN + 36_000, BEGUN + 37_000, 0]],
        "marks": [[BEGUN + 12_000, ROUND, 4, 1, 7, 0, False], [BEGUN + 42_000, ROUND, 4, 1, 0, 7, True]],
    }
    (folder / "profile-rank0.json").write_text(json.dumps(content))
    return folder / "profile-rank0.json"


def test_ranks_are_processes_on_one_clock(tmp_path: Path) -> None:
    left = [leave(tmp_path / f"island{i}", i, base_ns) for i, base_ns in enumerate([BEGUN - 30 * SECOND, BEGUN - 7 * SECOND])]
    write_merged(tmp_path / "trace.json", [read_rank(path) for path in left])
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "island 0 rank 0", 1: "island 1 rank 0"}
    for pid in processes:
        ours = [e for e in events if e["pid"] == pid]
        at = {e["name"]: (e["ts"], e["dur"]) for e in ours if e["ph"] == "X"}
        assert at["forward_backward"] == (1.0, 9.0), "counted from the first profiled step"
        assert at["round 4"] == (2.0, 30.0)
        assert at["aten::mm"] == (pytest.approx(30.25, abs=0.01), 2.5)
        assert "wait" not in at, "torch.profiler has noted it too"
        assert "PyTorch Profiler (0)" not in at
        wires = [(e["ph"], round(e["ts"] - 29.5, 2)) for e in ours if e["name"] == "gloo:recv"]
        assert wires == [("b", 0.0), ("e", 2.5)], "it need not nest in what the thread does meanwhile"
        lanes = {e["tid"]: e["args"]["name"] for e in ours if e["name"] == "thread_name"}
        assert sorted(lanes.values()) == ["link, bucket 1", "steps", "stream 7", "the step's thread"]
        assert {lanes[e["tid"]] for e in ours if e["name"] == "gemm"} == {"stream 7"}
        assert {lanes[e["tid"]] for e in ours if e["name"] == "round 4"} == {"link, bucket 1"}
        assert {lanes[e["tid"]] for e in ours if e["ph"] == "f"} == {"stream 7"}
        assert max(lanes) < 2**31, "Perfetto reads 32 bits"
    arrows = [e["id"] for e in events if e["ph"] in "sf"]
    assert len(arrows) == 4
    assert len(set(arrows)) == 2, "an arrow stays within its rank"


def test_times_keep_their_nanoseconds(tmp_path: Path) -> None:
    rank, _ = read_rank(leave(tmp_path / "island0", 0, BEGUN - 3600 * SECOND))
    (event,) = [e for e in rank.events if e.name == "aten::mm"]
    assert (event.begun_ns, event.ended_ns) == (BEGUN + 40_250, BEGUN + 42_750)
    assert {e.name for e in rank.events} == {"aten::mm", "gemm", "cudaLaunchKernel", "gloo:recv"}
    assert rank.on_gpu


def test_a_kernel_has_the_bytes_of_an_operation_that_launched_no_other() -> None:
    shapes = {"Input Dims": [[8, 4], [4, 2]], "Input type": ["float", "float"], "Input Strides": [[4, 1], [2, 1]]}
    events = [
        raw("aten::mm", "cpu_op", 0, **{"External id": 1}, **shapes),
        raw("gemm", "kernel", 1, pid=0, tid=7, **{"External id": 1}),
        raw("aten::mm", "cpu_op", 2, **{"External id": 2}, **shapes),
        raw("split", "kernel", 3, pid=0, tid=7, **{"External id": 2}),
        raw("sum_of_splits", "kernel", 4, pid=0, tid=7, **{"External id": 2}),
        raw("aten::fancy", "cpu_op", 5, **{"External id": 3}, **shapes),
    ]
    moved = 4 * (8 * 4 + 4 * 2 + 8 * 2)
    assert bytes_a_call({"traceEvents": events}) == {"aten::mm": moved, "gemm": moved}


def test_bytes_are_known_from_what_torch_writes_of_shapes(tmp_path: Path) -> None:
    a, b, half = torch.randn(8, 4), torch.randn(4, 2), torch.randn(8, 4).bfloat16()
    model = torch.nn.Linear(5, 3)
    model(torch.ones(2, 5)).sum().backward()
    adam = torch.optim.AdamW(model.parameters(), fused=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        torch.mm(a, b)
        a.sub_(1.0)
        a.mul_(torch.ones(4).expand(8, 4))
        a.copy_(half)
        torch.add(a, a)
        torch.cumsum(a, 0)
        adam.step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found: dict[str, set[int | None]] = {}
    for e in json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]:
        if e.get("cat") == "cpu_op":
            told = moved_bytes(e["name"], *(e["args"][key] for key in ("Input Dims", "Input type", "Input Strides")))
            found.setdefault(e["name"], set()).add(told)
    assert found["aten::mm"] == {4 * (32 + 8 + 16)}
    assert found["aten::sub_"] == {4 * 64}
    assert found["aten::mul_"] == {4 * (64 + 4)}, "what a stride of 0 repeats is read once"
    assert 4 * 32 + 2 * 32 in found["aten::copy_"]
    assert found["aten::add"] == {4 * 96}
    assert found["aten::_fused_adamw_"] == {28 * 18}
    assert found["aten::cumsum"] == {None}


def test_bytes_of_kinds_that_are_mixed_or_unheard_of_are_not_known() -> None:
    dims, strides = [[4], [4]], [[1], [1]]
    assert moved_bytes("aten::mul", dims, ["float", "double"], strides) is None
    assert moved_bytes("aten::mul_", dims, ["float", "c10::complex<float>"], strides) is None
    assert moved_bytes("aten::mul_", dims, ["float", "double"], strides) == 4 * 8 + 8 * 4
    assert moved_bytes("aten::empty", [[]], ["ScalarList"], [[]]) is None

"""How many elements should a program of Triton's have, and how many of them a warp?

    python -m tests.gpu.sweep

Times operations with each of ``PAIRS`` and writes tests/gpu/results/sweep-DEVICE-DATE.json. ``kernels/_triton/launch.py`` has
what was chosen: two numbers of a warp, for choco's operations and for the others."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from dtrain.kernels import Format, backend
from dtrain.kernels._triton import check, outer, tensors, wire
from dtrain.kernels.bench_cases import Case, operands
from dtrain.kernels.floors import floor_bytes
from tests.gpu.__main__ import RESULTS, refusal
from tests.gpu.checks import file_name, hardware

PAIRS = ((1024, 256), (1024, 128), (2048, 256), (2048, 512), (4096, 512), (512, 128), (1024, 512))
"""(elements of a program, of a warp)."""
NUMEL = 1 << 27
INT4, INT8 = Format("int4", 64), Format("int8", 64)
CASES = (
    *(Case("encode", "bf16", INT4), Case("encode_feedback", "fp32", INT4), Case("encode_feedback", "bf16", INT4)),
    *(Case("quantize_int8", "bf16", INT8), Case("dequantize_add_int4", "fp32", INT4), Case("choco_encode", "bf16", INT4)),
    *(Case("mix", "bf16", INT4, 2), Case("mix", "fp32", INT4, 2), Case("choco_mix", "bf16", INT4, 2)),
    *(Case("accum_adam", "bf16", None, 0, 1, True), Case("accum_adam", "fp32", None, 0, 4, False)),
    *(Case("gossip_adam", "bf16", INT4, 2, 1, True), Case("gossip_adam", "fp32", INT4, 2, 4, False)),
    *(Case("choco_gossip_adam", "bf16", INT4, 2, 1, True), Case("outer_step", "bf16"), Case("scale", "fp32")),
    *(Case("cast_bf16", "fp32"), Case("sum_of_squares", "bf16")),
)


def times_ms(device: torch.device, tile: int, per_warp: int) -> list[dict[str, Any]]:
    """A row an operation: its median, and the share that its bytes have of the bandwidth of an in-place scale."""
    for module in (check, outer, tensors, wire):
        vars(module)["TILE"] = tile
    check.ELEMENTS_PER_WARP = check.ELEMENTS_PER_WARP_OF_CHOCO = per_warp
    x, ops = torch.randn(NUMEL, device=device), backend("triton")
    scale_gb_s = 8 * NUMEL / _median_ms(lambda: x.mul_(1.0)) / 1e6
    rows = list[dict[str, Any]]()
    for case in CASES:
        arguments = operands(case, NUMEL, device)
        ms = _median_ms(lambda case=case, arguments=arguments: getattr(ops, case.op)(*arguments))
        share = floor_bytes(case.op, case.sizes(NUMEL)) / ms / 1e6 / scale_gb_s
        rows.append({
            "tile": tile, "per_warp": per_warp, "op": case.op, "dtype": case.dtype, "variant": case.variant,
            "median_ms": round(ms, 3), "of_bandwidth": round(share, 2),
        })  # fmt: skip
    return rows


def _median_ms(call: Any) -> float:
    """do_bench writes a cache's length between calls."""
    return do_bench(call, warmup=20, rep=60, return_mode="median")  # pyright: ignore[reportReturnType] - a list for quantiles


def write(about: dict[str, str | int], rows: list[dict[str, Any]], date: str) -> Path:
    path = RESULTS / f"sweep-{file_name(about, date)}"
    head = json.dumps({"date": date, "numel": NUMEL, "hardware": about})
    path.write_text(f'{head[:-1]}, "rows": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n", encoding="utf-8")
    return path


def main() -> int:
    if reason := refusal():
        print(reason, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    rows = [row for tile, per_warp in PAIRS for row in times_ms(device, tile, per_warp)]
    print(f"written to {write(hardware(device), rows, datetime.datetime.now(datetime.UTC).date().isoformat())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does every kernel write the same bytes as the specification in plain torch on a CPU?

Codes, scales, flags, checksums and all fp32 state are compared to the bit (a NaN equals any NaN). ``outer_step``, which fuses
multiply-adds only where a machine can, and ``sum_of_squares``, which adds in any order, have bounds: ``kernels/equal.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels import OPERATIONS, Format, backend, operations, reference
from dtrain.kernels.bench_cases import BLOCK_FORMATS, Case, normal, operands, pieces_of
from dtrain.kernels.equal import copies, difference, map_tensors

# Around a block, a warp and a grid: one element, a short last block, odd code bytes, no power of two above a million.
SIZES = (1, 2, 3, 31, 63, 64, 65, 127, 1_000, 4_097, 65_537, 1_000_003)
MANY = 100_000
"""From here on one parameter only, and half of the inputs: the specification takes its time."""

CPU = torch.device("cpu")

FORMATS = (
    *(Format("identity"), Format("bf16"), Format("int8", 64), Format("int4", 32), Format("e3m0", 64), Format("lut4", 128)),
    *(Format("sign", 4096), Format("topk", 4096, 64, 2), Format("topk", 64, 16, 8)),
)


def binades(numel: int, salt: int) -> Tensor:
    """Values over many binades, with signed zeros and an all-zero stretch."""
    generator = torch.Generator().manual_seed(salt)
    x = torch.randn(numel, generator=generator) * torch.exp2(torch.randint(-30, 30, (numel,), generator=generator).float())
    x[:: max(1, numel // 3)] = -0.0
    x[numel // 2 : numel // 2 + 300] = 0.0
    return x


def ties(numel: int, salt: int) -> Tensor:
    return torch.randint(-14, 15, (numel,), generator=torch.Generator().manual_seed(salt)).float() / 2


def denormals(numel: int, salt: int) -> Tensor:
    sign = torch.randint(0, 2, (numel,), generator=torch.Generator().manual_seed(salt)).float() * 2 - 1
    return sign * (torch.finfo(torch.float32).smallest_normal / 4)


def extremes(numel: int, salt: int) -> Tensor:
    """A block with inf, one with NaN, one whose sums overflow, and healthy ones between."""
    x = normal(numel, salt)
    for i, value in enumerate((torch.inf, torch.nan, -torch.inf, 3e38)):
        x[i * numel // 4 : i * numel // 4 + 1 + numel // 1000] = value
    return x


INPUTS: tuple[tuple[Callable[[int, int], Tensor], float], ...] = (
    (binades, 1 / 3),
    (extremes, 0.5),
    (ties, -1.0),
    (denormals, 1.0),
)
"""With each the weight that goes with it."""


def _quantize(kind: Any) -> list[Case]:
    op = f"quantize_{kind}"
    return [
        Case(op, "fp32", Format(kind, 64)),
        Case(op, "bf16", Format(kind, 32), random=True),
        Case(op, "fp32", Format(kind, 4096), random=True),
    ]


def _any_format(op: str) -> list[Case]:
    """Each format once, by turns fp32 to nearest and bf16 at random, with 0 to 3 wires: each more is a kernel to compile."""
    return [
        Case(op, "bf16" if i % 2 else "fp32", fmt, i % 4, random=bool(i % 2) and fmt.kind in BLOCK_FORMATS)
        for i, fmt in enumerate(FORMATS)
    ]


def _fused(op: str) -> list[Case]:
    """Of topk there is no fused step."""
    steps = ((1, True), (4, False), (4, True))
    return [
        Case(op, "bf16" if i % 2 else "fp32", fmt, i % 3, *steps[i % 3], random=bool(i % 2) and fmt.kind in BLOCK_FORMATS)
        for i, fmt in enumerate(f for f in FORMATS if f.kind != "topk")
    ]


TOPK = [f for f in FORMATS if f.kind == "topk"]

CASES: dict[str, list[Case]] = {
    **{f"quantize_{kind}": _quantize(kind) for kind in BLOCK_FORMATS},
    **{f"dequantize_add_{kind}": [Case(f"dequantize_add_{kind}", fmt=Format(kind, b)) for b in (32, 64, 4096)]
       for kind in ("int8", "int4", "e3m0", "lut4", "sign")},
    "cast_bf16": [Case("cast_bf16", "fp32"), Case("cast_bf16", "bf16")],
    "add_bf16": [Case("add_bf16")],
    "topk_chunks": [Case("topk_chunks", dtype, fmt) for dtype, fmt in zip(("fp32", "bf16"), TOPK, strict=True)],
    "topk_add": [Case("topk_add", fmt=fmt) for fmt in TOPK],
    **{op: _any_format(op) for op in ("encode", "encode_difference", "encode_feedback", "choco_encode", "choco_mix", "mix")},
    "decode_add": [Case("decode_add", fmt=fmt) for fmt in FORMATS],
    "accum_adam": [Case("accum_adam", d, None, 0, every, closes)
                   for d in ("fp32", "bf16") for every, closes in ((1, True), (4, False), (4, True))],
    **{op: _fused(op) for op in ("gossip_adam", "choco_gossip_adam")},
    **{op: [Case(op, "fp32"), Case(op, "bf16")]
       for op in ("outer_step", "sum_of_squares", "scale", "flag_non_finite", "put_identity")},
    "checksum": [Case("checksum", "uint8")],
}  # fmt: skip


def same_bytes_as_cpu(device: torch.device) -> str:
    return compare(backend("triton") if device.type == "cuda" else operations(device), device, SIZES)


def numba_same_bytes(device: torch.device) -> str:
    """numba's kernels, on the CPU of the same machine."""
    return compare(backend("numba"), CPU, SIZES)


def compare(ops: ModuleType, device: torch.device, sizes: tuple[int, ...]) -> str:
    """Run every operation of a backend, and the specification on the CPU, on equal operands; all must be equal afterwards."""
    missing = {*OPERATIONS} ^ {*CASES} | {name for name in OPERATIONS if not hasattr(ops, name)}
    assert not missing, f"operations without a case, or cases without an operation: {sorted(missing)}"
    count = 0
    for cases in CASES.values():
        for case in cases:
            for numel in sizes:
                for i, before in enumerate(calls(case, numel)):
                    compare_one(case, getattr(ops, case.op), before, device, numel, shift=i == 0)
                    count += 1
    return f"{len(CASES)} operations, {count} calls, up to {max(sizes)} elements: all bytes equal"


def calls(case: Case, numel: int) -> Iterator[tuple[Any, ...]]:
    for values, weight in INPUTS if numel < MANY else INPUTS[:2]:
        if case.op.endswith("adam") and numel < MANY:
            yield pieces_of(case, [numel, 1, 65], CPU, values, weight=weight)
        else:
            yield operands(case, numel, CPU, values, weight=weight)


def _shifted(t: Tensor) -> Tensor:
    """The same values from the second element of a buffer on: no pointer is a multiple of 16 then."""
    return torch.cat((t[:1], t))[1:] if t.is_floating_point() and t.numel() else t


def compare_one(
    case: Case, op: Callable[..., None], before: tuple[Any, ...], device: torch.device, numel: int, *, shift: bool = False
) -> None:
    expected, got = copies(before, CPU), copies(before, device)
    got = map_tensors(got, _shifted) if shift else got
    getattr(reference, case.op)(*expected)
    op(*got)
    found = difference(case.op, before, expected, got)
    words = " ".join((case.op, case.variant)).strip()
    assert found is None, f"{words}, {case.dtype}, {numel} elements: {found}"

"""Does every kernel write the same bytes on a GPU as on the CPU?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from torch import Tensor

from dtrain.kernels import operations

# Around a block, a warp and a grid: one element, a short last block, odd code bytes, no power of two above a million.
SIZES = (1, 2, 3, 31, 63, 64, 65, 127, 1_000, 4_097, 65_537, 1_000_003)
BLOCKS = (2, 32, 64, 256)
WEIGHTS = (1.0, -1.0, 1 / 3)

Operands = tuple[Tensor | float | int, ...]


def inputs(numel: int) -> Iterator[Tensor]:
    """Values over many binades, with signed zeros, ties and an all-zero stretch; then the extremes of fp32."""
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.exp2(torch.randint(-30, 30, (numel,), generator=generator).float())
    x[:: max(1, numel // 3)] = -0.0
    x[numel // 2 : numel // 2 + 300] = 0.0
    yield x
    yield torch.randint(-14, 15, (numel,), generator=generator).float() / 2
    yield torch.full((numel,), torch.finfo(torch.float32).smallest_normal / 4)


def _quantize(numel: int, bits: int) -> Iterator[Operands]:
    for x in inputs(numel):
        for block in BLOCKS:
            codes = torch.zeros(-(-numel * bits // 8), dtype=torch.uint8)
            yield x, codes, torch.zeros(-(-numel // block), dtype=torch.bfloat16), block


def _dequantize(numel: int, bits: int) -> Iterator[Operands]:
    generator = torch.Generator().manual_seed(numel)
    codes = torch.randint(0, 256, (-(-numel * bits // 8),), dtype=torch.uint8, generator=generator)
    for y in inputs(numel):
        for block in BLOCKS:
            scales = torch.randn(-(-numel // block), generator=generator).to(torch.bfloat16)
            yield from ((codes, scales, y, weight, block) for weight in WEIGHTS)


def _cast(numel: int) -> Iterator[Operands]:
    yield from ((x, torch.zeros(2 * numel, dtype=torch.uint8)) for x in inputs(numel))


def _add(numel: int) -> Iterator[Operands]:
    wire = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(torch.bfloat16).view(torch.uint8)
    yield from ((wire, y, weight) for y in inputs(numel) for weight in WEIGHTS)


CASES: dict[str, Callable[[int], Iterator[Operands]]] = {
    "quantize_int8": lambda numel: _quantize(numel, 8),
    "quantize_int4": lambda numel: _quantize(numel, 4),
    "dequantize_add_int8": lambda numel: _dequantize(numel, 8),
    "dequantize_add_int4": lambda numel: _dequantize(numel, 4),
    "cast_bf16": _cast,
    "add_bf16": _add,
}


def same_bytes_as_cpu(device: torch.device) -> str:
    return compare(operations(device), device, SIZES)


def compare(ops: ModuleType, device: torch.device, sizes: tuple[int, ...]) -> str:
    """Run every operation of a backend on both, on equal operands; all operands must hold equal bytes afterwards."""
    names = set(CASES)
    assert names == set(CASES), f"operations without a case, or cases without an operation: {sorted(names ^ set(CASES))}"
    count = 0
    for name, cases in CASES.items():
        for numel in sizes:
            for operands in cases(numel):
                _compare_one(name, getattr(ops, name), operands, device, numel)
                count += 1
    return f"{len(CASES)} operations, {count} calls, up to {max(sizes)} elements: all bytes equal"


def _compare_one(name: str, op: Callable[..., None], operands: Operands, device: torch.device, numel: int) -> None:
    here, there = _copies(operands, torch.device("cpu")), _copies(operands, device)
    op(*here)
    op(*there)
    for position, (cpu, gpu) in enumerate(zip(here, there, strict=True)):
        if isinstance(cpu, Tensor) and isinstance(gpu, Tensor):
            differ = (cpu.view(torch.uint8) != gpu.cpu().view(torch.uint8)).nonzero().flatten()
            assert not differ.numel(), (
                f"{name}, {numel} elements, {[o for o in operands if not isinstance(o, Tensor)]}: operand {position} differs in "
                f"{differ.numel()} bytes, first at byte {int(differ[0])}"
            )


def _copies(operands: Operands, device: torch.device) -> Operands:
    return tuple(o.to(device, copy=True) if isinstance(o, Tensor) else o for o in operands)

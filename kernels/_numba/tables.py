"""How do tensors reach a kernel? As addresses, checked here: a kernel would write wherever it is told to."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dtrain.kernels._numba.compiled import addresses
from dtrain.kernels.operands import CODE_BITS, MAX_BLOCK, MIN_BLOCK, SCALES, Coded, Format, KeptCoded, Noise

MASK32 = 0xFFFFFFFF
_FLOAT, _FLOAT_BITS = struct.Struct("<f").pack, struct.Struct("<I").unpack


def place(t: Tensor, numel: int, dtype: torch.dtype, what: str) -> int:
    """The address of a flat tensor."""
    if t.numel() != numel or t.dtype is not dtype or not t.is_contiguous() or not t.is_cpu:
        found = f"{t.numel()} elements of {t.dtype} on {t.device}{'' if t.is_contiguous() else ', strided'}"
        raise ValueError(f"{what} has {found}, not {numel} of {dtype} in a row on the CPU")
    return t.data_ptr()


def state(t: Tensor, numel: int, what: str) -> int:
    return place(t, numel, torch.float32, what)


def values(t: Tensor, numel: int, what: str) -> tuple[int, int]:
    """The address of an fp32 or bf16 tensor, and whether it is bf16."""
    if t.dtype is torch.float32 and t.numel() == numel and t.is_contiguous() and t.is_cpu:
        return t.data_ptr(), 0
    half = t.dtype is torch.bfloat16
    return place(t, numel, torch.bfloat16 if half else torch.float32, what), int(half)


@lru_cache
def format_numbers(fmt: Format) -> tuple[int, ...]:
    """What a kernel takes for a format: the addresses of encode and decode, block, its code bytes and scale bytes, k, bits."""
    if fmt.kind in ("identity", "bf16"):
        return *addresses(fmt.kind), 32, 4 * CODE_BITS[fmt.kind], 0, 0, 0
    if fmt.block & (fmt.block - 1) or not MIN_BLOCK <= fmt.block <= MAX_BLOCK:
        raise ValueError(f"{fmt.kind} blocks have {fmt.block} elements; use a power of two from {MIN_BLOCK} to {MAX_BLOCK}")
    if fmt.kind != "topk":
        return *addresses(fmt.kind), fmt.block, fmt.block * CODE_BITS[fmt.kind] // 8, 2 * SCALES[fmt.kind], 0, 0
    if fmt.k & (fmt.k - 1) or not 4 <= fmt.k <= fmt.block or fmt.bits not in (2, 8):
        found = f"{fmt.k} of {fmt.block} elements in {fmt.bits} bits"
        raise ValueError(f"topk keeps {found}; use a power of two from 4 to {fmt.block}, and 2 or 8 bits")
    return *addresses("topk"), fmt.block, fmt.k * (12 + fmt.bits) // 8, 4 if fmt.bits == 2 else 2, fmt.k, fmt.bits


def coded(wire: Coded, fmt: Format, numel: int, what: str) -> tuple[int, int]:
    """The addresses of codes and scales."""
    seen = wire.seen
    if seen is not None and seen[0] is fmt and seen[1] == numel:
        return seen[2]
    code_bytes, num_scales = _sizes(fmt, numel)
    codes = place(wire.codes, code_bytes, torch.uint8, f"{what}'s codes")
    scales = place(wire.scales, num_scales, torch.bfloat16, f"{what}'s scales") if num_scales else 0
    if isinstance(wire, KeptCoded):
        wire.seen = fmt, numel, (codes, scales)
    return codes, scales


@lru_cache
def _sizes(fmt: Format, numel: int) -> tuple[int, int]:
    return fmt.code_bytes(numel), fmt.num_scales(numel)


def float_bits(value: float) -> int:
    """The bits of the nearest float32; raises OverflowError beyond its range."""
    return _FLOAT_BITS(_FLOAT(value))[0]


def wire_rows(wires: Sequence[Coded], weights: Sequence[float], fmt: Format, numel: int) -> list[int]:
    """``WIRE_FIELDS`` numbers a wire."""
    rows: list[int] = []
    for wire, weight in zip(wires, weights, strict=True):
        rows += coded(wire, fmt, numel, "a wire")
        rows += _FLOAT_BITS(_FLOAT(weight))
    return rows


def body_table(wires: Sequence[Tensor], weights: Sequence[float], num_bytes: int) -> array[int]:
    """For whole bodies, in which a piece's zones have offsets: both addresses are the body's."""
    table = array("q")
    for wire, weight in zip(wires, weights, strict=True):
        address = place(wire, num_bytes, torch.uint8, "a wire")
        table.extend((address, address, float_bits(weight)))
    return table


def address(table: array[int]) -> int:
    return table.buffer_info()[0]


def noise_numbers(noise: Noise | None) -> tuple[int, int]:
    """The seed, -1 where codes are rounded to nearest, and the first element's index."""
    return (-1, 0) if noise is None else (noise.seed & MASK32, noise.first)

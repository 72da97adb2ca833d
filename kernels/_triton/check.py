"""What must hold of the operands before a kernel may trust their pointers? And how is a format cut into tiles?"""

from __future__ import annotations

from torch import Tensor

from dtrain.kernels._triton.launch import ELEMENTS_PER_WARP, ELEMENTS_PER_WARP_OF_CHOCO, TILE
from dtrain.kernels.operands import CODE_BITS, MAX_BLOCK, MIN_BLOCK, Coded, Format

CASTS = ("identity", "bf16")
"""Formats without scales and rounding at random."""


def same_length(x: Tensor, *others: Tensor) -> None:
    for y in (x, *others):
        if y.numel() != x.numel() or not y.is_contiguous():
            raise ValueError(f"operands must be contiguous and of one length, got {tuple(x.shape)} and {tuple(y.shape)}")


def wire_lengths(wire: Coded, fmt: Format, numel: int) -> None:
    block_length(fmt)
    want = fmt.code_bytes(numel), fmt.num_scales(numel)
    got = wire.codes.numel(), wire.scales.numel()
    if got != want:
        raise ValueError(f"{fmt.kind} of {numel} elements has (bytes of codes, scales) {want}, got {got}")


def block_length(fmt: Format) -> None:
    if fmt.kind not in CASTS and (fmt.block & (fmt.block - 1) or not MIN_BLOCK <= fmt.block <= MAX_BLOCK):
        raise ValueError(f"a block must be a power of two from {MIN_BLOCK} to {MAX_BLOCK}, got {fmt.block}")


def kind_rows(fmt: Format, mode: str) -> tuple[int, int, int, int]:
    """A tile's blocks, their length, its warps, and the bits of a code; a cast's tile is one block."""
    block_length(fmt)
    block = TILE if fmt.kind in CASTS else fmt.block
    tile = max(TILE, block)
    per_warp = ELEMENTS_PER_WARP_OF_CHOCO if mode == "choco" else ELEMENTS_PER_WARP
    return tile // block, block, tile // per_warp, CODE_BITS[fmt.kind]

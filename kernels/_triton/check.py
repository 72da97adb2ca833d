"""What must hold of the operands before a kernel may trust their pointers? And how is a format cut into tiles?"""

from __future__ import annotations

from torch import Tensor

from dtrain.kernels._triton.launch import ELEMENTS_PER_WARP, TILE
from dtrain.kernels.operands import CODE_BITS, Coded, Format


def same_length(x: Tensor, *others: Tensor) -> None:
    for y in (x, *others):
        if y.numel() != x.numel() or not y.is_contiguous():
            raise ValueError(f"operands must be contiguous and of one length, got {tuple(x.shape)} and {tuple(y.shape)}")


def wire_lengths(wire: Coded, fmt: Format, numel: int) -> None:
    want = fmt.code_bytes(numel), fmt.num_scales(numel)
    got = wire.codes.numel(), wire.scales.numel()
    if got != want:
        raise ValueError(f"{fmt.kind} of {numel} elements has (bytes of codes, scales) {want}, got {got}")


def kind_rows(fmt: Format) -> tuple[int, int, int, int]:
    """A tile's blocks, their length, its warps, and the bits of a code; a cast's tile is one block."""
    block = TILE if fmt.kind in ("identity", "bf16") else fmt.block
    tile = max(TILE, block)
    return tile // block, block, tile // ELEMENTS_PER_WARP, CODE_BITS[fmt.kind]

"""What does each compression operation compute? The specification, in plain torch.

Operands are flat 1-D and the outputs are the caller's. Block codecs share one shape: block k holds elements k * block
.. (k + 1) * block - 1 (the last may be short) and has one bf16 scale. For a largest code q_max
    scale_k = bf16(max |x| / q_max),  code = clamp(round_half_even(x / scale_k), -q_max, q_max),  x' = code * scale_k.
The codes are taken against the rounded scale, so its rounding costs no accuracy but the clamp's (at most 2^-8 of the
block's maximum)."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_int8(x: Tensor, codes: Tensor, scales: Tensor, block: int) -> None:
    """fp32 x (n) -> int8 codes (n, as uint8 bytes) and bf16 scales (ceil(n / block))."""
    codes.view(torch.int8).copy_(_codes(x, scales, block, 127))


def dequantize_add_int8(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    """y += weight * code * scale, for fp32 y (n)."""
    _add_scaled(codes.view(torch.int8).to(torch.float32), scales, y, weight, block)


def quantize_int4(x: Tensor, codes: Tensor, scales: Tensor, block: int) -> None:
    """fp32 x (n) -> codes (ceil(n / 2) bytes: element 2i in the low half, 2i + 1 in the high, each code + 8) and bf16
    scales."""
    nibbles = torch.full((2 * codes.numel(),), 8, dtype=torch.uint8, device=x.device)
    nibbles[: x.numel()] = _codes(x, scales, block, 7).add_(8).to(torch.uint8)
    pairs = nibbles.view(-1, 2)
    torch.bitwise_or(pairs[:, 0], pairs[:, 1] << 4, out=codes)


def dequantize_add_int4(codes: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    """y += weight * code * scale, for fp32 y (n)."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=1).view(-1)[: y.numel()]
    _add_scaled(nibbles.to(torch.float32).sub_(8), scales, y, weight, block)


def cast_bf16(x: Tensor, wire: Tensor) -> None:
    """fp32 x (n) -> bf16, round to nearest even (2n bytes)."""
    wire.view(torch.bfloat16).copy_(x)


def add_bf16(wire: Tensor, y: Tensor, weight: float) -> None:
    """y += weight * wire."""
    y.add_(wire.view(torch.bfloat16), alpha=weight)


def _blocks(x: Tensor, block: int) -> Tensor:
    """(n) -> (ceil(n / block), block); a short last block is filled with zeros."""
    short = -x.numel() % block
    return (torch.nn.functional.pad(x, (0, short)) if short else x).view(-1, block)


def _codes(x: Tensor, scales: Tensor, block: int, largest: int) -> Tensor:
    rows = _blocks(x, block)
    scales.copy_(rows.abs().amax(dim=1).div_(largest))
    inverse = scales.to(torch.float32).reciprocal_()
    inverse.masked_fill_(inverse.isinf(), 0.0)  # scales below 2^-128, 0 among them: codes 0, not 0 * inf
    return (rows * inverse[:, None]).round_().clamp_(-largest, largest).view(-1)[: x.numel()]


def _add_scaled(values: Tensor, scales: Tensor, y: Tensor, weight: float, block: int) -> None:
    rows = _blocks(values, block) * (scales.to(torch.float32) * weight)[:, None]
    y.add_(rows.view(-1)[: y.numel()])

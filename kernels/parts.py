"""What small steps is the specification made of? Rows, sums in a fixed order, packing, random bits; all in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dtrain.kernels.operands import Noise

MASK32 = 0xFFFFFFFF


def in_rows(x: Tensor, block: int) -> Tensor:
    """(n) -> fp32 (ceil(n / block), block); a short last block is filled with zeros."""
    short = -x.numel() % block
    return (pad(x, (0, short)) if short else x).float().view(-1, block)


def counts(numel: int, block: int, device: torch.device) -> Tensor:
    """Elements of each block, fp32."""
    starts = torch.arange(0, numel, block, device=device)
    return (numel - starts).clamp(max=block).float()


def tree_sum(rows: Tensor) -> Tensor:
    """(b, power of two) -> (b): first half plus second half, until one value is left."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def safe_inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is inf: scales below 2^-128, 0 among them, have codes 0, not 0 * inf."""
    inverse = scale.reciprocal()
    return inverse.masked_fill_(inverse.isinf(), 0.0)


def square_root(x: Tensor) -> Tensor:
    """Rounded correctly, by way of fp64; torch's own fp32 root is off by a unit in 13 of 2^20 values (MKL)."""
    return x.double().sqrt_().float()


def pack4(code: Tensor, codes: Tensor, filler: int) -> None:
    nibbles = pad(code.to(torch.uint8), (0, code.numel() % 2), value=filler).view(-1, 2)
    torch.bitwise_or(nibbles[:, 0], nibbles[:, 1] << 4, out=codes)


def unpack4(codes: Tensor, numel: int) -> Tensor:
    return torch.stack((codes & 15, codes >> 4), dim=1).view(-1)[:numel]


def pack_bits(bits: Tensor, codes: Tensor) -> None:
    octets = pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    codes.copy_((octets << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8))


def mix32(h: Tensor) -> Tensor:
    """A bijection of 32-bit integers (int64 0 .. 2^32 - 1) in which each input bit flips each output bit about half the time."""
    h = (h ^ h >> 16) * 0x7FEB352D & MASK32
    h = (h ^ h >> 15) * 0x846CA68B & MASK32
    return h ^ h >> 16


def random_bits(noise: Noise, numel: int, device: torch.device) -> Tensor:
    """32 random bits for each of the elements first .. first + numel - 1: mix(low word + mix(high word + seed))."""
    index = torch.arange(noise.first, noise.first + numel, device=device)
    return mix32((index & MASK32) + mix32((index >> 32) + noise.seed & MASK32) & MASK32)


def uniform(noise: Noise, numel: int, device: torch.device) -> Tensor:
    """fp32 in [0, 1): the upper 24 of the 32 bits."""
    return (random_bits(noise, numel, device) >> 8).float() * 2.0**-24

"""What small steps are the formats made of? Sums in a fixed order, random bits, packing (``parts.py``, in registers)."""

# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tree_sum(x, R: tl.constexpr, B: tl.constexpr):
    """(R, B) -> (R): first half plus second half, until one value is left.

    ``tl.sum`` promises no order, but of two values there is only one sum. With ``tl.split`` in its place each row would move into
    one thread: 369 registers at B = 64, spills at 4096. The gather changes nothing but the layout: without it the compiler gives
    all that meets the result the last sum's, in which every thread holds whole rows (255 registers and spills)."""
    for level in tl.static_range(12):
        if (B >> level) > 1:
            x = tl.sum(tl.reshape(x, (R, 2, B >> (level + 1))), axis=1)
    return tl.gather(tl.reshape(x, (R,)), tl.arange(0, R), 0)


@triton.jit
def safe_inverse(scale):
    """1 / scale for scale >= 0; 0 where that is inf."""
    inverse = tl.div_rn(1.0, scale)
    return tl.where(inverse == float("inf"), 0.0, inverse)


@triton.jit
def round_half_even(x):
    """For |x| < 2^22: adding 1.5 2^23 leaves no bit for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def floor(x, low, high):
    """The floor within two whole bounds, as int32. ``tl.floor`` on cuda takes denormals for 0, whose floor may be -1."""
    x = tl.minimum(tl.maximum(x, low), high)
    towards_zero = x.to(tl.int32)
    return towards_zero - (towards_zero.to(tl.float32) > x).to(tl.int32)


@triton.jit
def mix32(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_bits(seed, first, at):
    """32 random bits for each of the elements first + at, 0 <= at < 2^31: the high word of the index changes at most once."""
    low, high = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    index = low + at.to(tl.uint32)
    here, behind = mix32(high + seed.to(tl.uint32)), mix32(high + 1 + seed.to(tl.uint32))
    return mix32(index + tl.where(index < low, behind, here))


@triton.jit
def uniform(random):
    """fp32 in [0, 1): the upper 24 bits."""
    return (random >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def pack4(code, R: tl.constexpr, B: tl.constexpr):
    """(R, B) of 0..15 -> (R, B / 2), the even element in the low half."""
    low, high = tl.split(tl.reshape(code, (R, B // 2, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack4(packed, R: tl.constexpr, B: tl.constexpr):
    packed = packed.to(tl.int32)
    return tl.reshape(tl.join(packed & 15, packed >> 4), (R, B))


@triton.jit
def pack_bits(bit, R: tl.constexpr, B: tl.constexpr):
    """(R, B) of 0, 1 -> (R, B / 8), the first lowest."""
    octets = tl.reshape(bit, (R, B // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(octets, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, R: tl.constexpr, B: tl.constexpr):
    octets = packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(octets & 1, (R, B))

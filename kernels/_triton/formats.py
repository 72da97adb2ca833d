"""How do values become codes and scales, and come back? One function each for all block formats (``reference.py``).

Tiles are (R, B): R blocks of B elements, zeros behind the end. Codes are int32, scales int32 with the bits of bf16, (R) each."""

# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from dtrain.kernels._triton.arithmetic import floor, random_bits, round_half_even, safe_inverse, tree_sum, uniform
from dtrain.kernels._triton.memory import bf16_bits, from_bf16_bits
from dtrain.kernels.reference import LUT4

LUT = tl.constexpr(LUT4)
GAP = tl.constexpr(tuple((1.0 / torch.tensor([*LUT4, torch.inf]).diff()).tolist()))


@triton.jit
def _is_finite_bf16(bits):
    return (bits & 0x7F80) != 0x7F80


@triton.jit
def _largest(x):
    """max |x| of each row, NaN where it holds one: the bits of magnitudes, as integers, are ordered as the magnitudes are."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)


@triton.jit
def lut4(code):
    """LUT4[code] by 7 selects: the table is odd about 7.5."""
    h = tl.where(code >= 8, code, 7 - code) & 7
    odd, second, third = (h & 1) != 0, (h & 2) != 0, (h & 4) != 0
    low = tl.where(second, tl.where(odd, LUT[11], LUT[10]), tl.where(odd, LUT[9], LUT[8]))
    high = tl.where(second, tl.where(odd, LUT[15], LUT[14]), tl.where(odd, LUT[13], LUT[12]))
    size = tl.where(third, high, low)
    return tl.where(code >= 8, size, -size)


@triton.jit
def quantize(x, inside, left, seed, first, KIND: tl.constexpr, R: tl.constexpr, B: tl.constexpr, NOISY: tl.constexpr):
    """-> codes (R, B), scales (R), second scales (R; lut4's sigma). ``left``: elements from the tile's first to the end."""
    count = tl.minimum(left - tl.arange(0, R) * B, B).to(tl.float32)
    if NOISY:
        random = random_bits(seed, first, tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :])
    if KIND == "lut4":
        scale = bf16_bits(tl.div_rn(tree_sum(x, R, B), count))
        off = tl.where(inside, x - from_bf16_bits(scale)[:, None], 0.0)
        sigma = bf16_bits(tl.sqrt_rn(tl.div_rn(tree_sum(off * off, R, B), count)))
        fine = _is_finite_bf16(scale) & _is_finite_bf16(sigma)
        scale, second = tl.where(fine, scale, 0x7FC0), tl.where(fine, sigma, 0x7FC0)
        off = tl.where(fine[:, None], off, 0.0)
        spread = tl.where(fine, from_bf16_bits(sigma), 0.0)
        if NOISY:
            z = off * safe_inverse(spread)[:, None]
            code = tl.zeros((R, B), tl.int32)
            below = tl.full((R, B), LUT[0], tl.float32)
            gap = tl.full((R, B), GAP[0], tl.float32)
            for j in tl.static_range(1, 16):
                reached = z >= LUT[j]
                code += reached.to(tl.int32)
                below = tl.where(reached, LUT[j], below)
                gap = tl.where(reached, GAP[j], gap)
            code += (uniform(random) < (z - below) * gap).to(tl.int32)
            code = tl.where(inside, code, 8)
        else:
            t = off * safe_inverse(spread * 0.375)[:, None] + 8.0
            code = floor(t, 0.0, 15.0)
    else:
        if KIND == "sign" and not NOISY:
            measure = tl.div_rn(tree_sum(tl.abs(x), R, B), count)
        elif KIND == "int8":
            measure = tl.div_rn(_largest(x), 127.0)
        elif KIND == "int4":
            measure = tl.div_rn(_largest(x), 7.0)
        else:
            measure = _largest(x)
        scale = bf16_bits(measure)
        fine = _is_finite_bf16(scale)
        scale = tl.where(fine, scale, 0x7FC0)
        second = scale
        x = tl.where(fine[:, None], x, 0.0)
        inverse = tl.where(fine, safe_inverse(from_bf16_bits(scale)), 0.0)[:, None]
        if KIND == "e3m0":
            r = tl.abs(x) * inverse
            if NOISY:
                up = (random >> 9).to(tl.int32)
                grown = (random >> 8).to(tl.float32) * 5.9604644775390625e-08 < r * 64.0
            else:
                up = 0x400000
                grown = r >= 0.0078125
            c = ((r.to(tl.int32, bitcast=True) + up) >> 23) - 120
            c = tl.where(r < 0.015625, grown.to(tl.int32), tl.minimum(tl.maximum(c, 1), 7))
            code = c + tl.where(x < 0, 8, 0)
        elif KIND == "sign":
            if NOISY:
                bit = (uniform(random) >= (x * inverse + 1.0) * 0.5) & inside
            else:
                bit = x < 0
            code = bit.to(tl.int32)
        else:
            q: tl.constexpr = 127.0 if KIND == "int8" else 7.0
            if NOISY:
                code = floor(x * inverse + uniform(random), -q, q)
            else:
                code = tl.minimum(tl.maximum(round_half_even(x * inverse), -q), q).to(tl.int32)
            if KIND == "int4":
                code += 8
    return code, scale, second


@triton.jit
def dequantize(code, scale, second, weight, KIND: tl.constexpr):
    """weight x', in fp32."""
    factor = (from_bf16_bits(scale) * weight)[:, None]
    if KIND == "int8":
        y = code.to(tl.float32) * factor
    elif KIND == "int4":
        y = (code - 8).to(tl.float32) * factor
    elif KIND == "e3m0":
        c = code & 7
        size = tl.where(c == 0, 0, (c + 120) << 23)
        y = (size | ((code & 8) << 28)).to(tl.float32, bitcast=True) * factor
    elif KIND == "lut4":
        y = factor + lut4(code) * (from_bf16_bits(second) * weight)[:, None]
    else:
        y = (1 - 2 * code).to(tl.float32) * factor
    return y

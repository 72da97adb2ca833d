"""How are the k largest of a chunk found and written? One program a chunk.

The k-th largest magnitude is searched bit by bit: 31 counts over values that stay in registers. (``tl.topk`` sorts: 27 stages of
compare and exchange on 64-bit keys for 64 of 4096, each about ten instructions where a count is two.) A prefix sum gives every
kept element its rank, by which it writes its index into the wire; from there the k indices are read back in order."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.arithmetic import round_half_even, safe_inverse, tree_sum
from dtrain.kernels._triton.launch import aligned, kernel, launch
from dtrain.kernels._triton.memory import bf16_bits, from_bf16_bits, load_float, store
from dtrain.kernels.operands import Coded, Format


@triton.jit
def write_indices(size, codes, CHUNK: tl.constexpr, K: tl.constexpr):
    """The indices of the K largest of size (bits of magnitudes; of equal ones the first), 12 bits each; done when it returns.

    A byte in the middle of three belongs to two indices: the first of a pair writes it, the second adds its half."""
    at = tl.arange(0, CHUNK)
    kth = 0
    for i in range(31):
        trial = kth | (1 << (30 - i))
        kth = tl.where(tl.sum((size >= trial).to(tl.int32)) >= K, trial, kth)
    larger, equal = (size > kth).to(tl.int32), (size == kth).to(tl.int32)
    room = K - tl.sum(larger)
    before = tl.cumsum((larger << 16) | equal, 0)
    kept = (larger != 0) | ((equal != 0) & ((before & 0xFFFF) <= room))
    rank = (before >> 16) + tl.minimum(before & 0xFFFF, room) - 1
    triple = codes + (rank >> 1) * 3
    first, second = kept & ((rank & 1) == 0), kept & ((rank & 1) != 0)
    tl.store(triple, (at & 255).to(tl.uint8), mask=first)
    tl.store(triple + 1, (at >> 8).to(tl.uint8), mask=first)
    tl.debug_barrier()
    half = tl.load(triple + 1, mask=second, other=0)
    tl.store(triple + 1, half | ((at & 15) << 4).to(tl.uint8), mask=second)
    tl.store(triple + 2, (at >> 4).to(tl.uint8), mask=second)
    tl.debug_barrier()


@triton.jit
def index_at(codes, place):
    """The index at a place (0 .. k - 1) of a record."""
    at = codes + (place >> 1) * 3 + (place & 1)
    word = tl.load(at).to(tl.int32) | (tl.load(at + 1).to(tl.int32) << 8)
    return tl.where((place & 1) == 0, word & 0xFFF, word >> 4)


@triton.jit
def code_at(codes, place, K: tl.constexpr, BITS: tl.constexpr):
    values = codes + K * 12 // 8
    if BITS == 8:
        code = tl.load(values.to(tl.pointer_type(tl.int8), bitcast=True) + place).to(tl.int32)
    else:
        code = (tl.load(values + (place >> 2)).to(tl.int32) >> ((place & 3) * 2)) & 3
    return code


@triton.jit
def read_scales(scales, chunk, BITS: tl.constexpr):
    """Bits of a chunk's scale, twice, or of the means of the smaller and of the larger magnitudes."""
    scales = scales.to(tl.pointer_type(tl.uint16), bitcast=True)
    if BITS == 8:
        low = tl.load(scales + chunk)
        high = low
    else:
        low, high = tl.load(scales + chunk * 2), tl.load(scales + chunk * 2 + 1)
    return low, high


@triton.jit
def value_of(code, low, high, weight, BITS: tl.constexpr):
    if BITS == 8:
        value = code.to(tl.float32) * (from_bf16_bits(low) * weight)
    else:
        value = tl.where((code & 1) != 0, from_bf16_bits(high) * weight, from_bf16_bits(low) * weight)
        value = tl.where(code >= 2, value * -1.0, value)
    return value


@triton.jit
def write_values(value, bad, codes, scales, K: tl.constexpr, BITS: tl.constexpr):
    """K values, by rising index -> codes and the bits of the two scales, written and returned."""
    size = tl.abs(value)
    values = codes + K * 12 // 8
    scales = scales.to(tl.pointer_type(tl.uint16), bitcast=True)
    place = tl.arange(0, K)
    if BITS == 8:
        low = bf16_bits(tl.div_rn(tl.max(size, axis=0), 127.0))
        inverse = tl.where(bad, 0.0, safe_inverse(from_bf16_bits(low)))
        low = tl.where(bad, 0x7FC0, low)
        high = low
        code = tl.minimum(tl.maximum(round_half_even(value * inverse), -127.0), 127.0).to(tl.int32)
        tl.store(values + place, code.to(tl.uint8))
        tl.store(scales, low.to(tl.uint16))
    else:
        mean = tl.div_rn(tl.sum(tree_sum(tl.reshape(size, (1, K)), 1, K), axis=0), K * 1.0)
        large = size >= mean
        num_large = tl.sum(large.to(tl.int32), axis=0)
        small_sum = tree_sum(tl.reshape(tl.where(large, 0.0, size), (1, K)), 1, K)
        large_sum = tree_sum(tl.reshape(tl.where(large, size, 0.0), (1, K)), 1, K)
        low = bf16_bits(tl.div_rn(tl.sum(small_sum, axis=0), tl.maximum(K - num_large, 1).to(tl.float32)))
        high = bf16_bits(tl.div_rn(tl.sum(large_sum, axis=0), tl.maximum(num_large, 1).to(tl.float32)))
        bad = bad | ((low & 0x7F80) == 0x7F80) | ((high & 0x7F80) == 0x7F80)
        low, high = tl.where(bad, 0x7FC0, low), tl.where(bad, 0x7FC0, high)
        code = large.to(tl.int32) + tl.where(value < 0, 2, 0)
        quads = tl.reshape(code, (K // 4, 4)) << (tl.arange(0, 4) * 2)[None, :]
        tl.store(values + tl.arange(0, K // 4), tl.sum(quads, axis=1).to(tl.uint8))
        tl.store(scales, low.to(tl.uint16))
        tl.store(scales + 1, high.to(tl.uint16))
    return code, low, high


@kernel
def topk_encode_kernel(
    x, b, s, codes, scales, numel: tl.int64, factor: tl.float32, whole: tl.int64,
    MODE: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """MODE and factor as ``encode_kernel``. State changes at K places; only the error of feedback is written everywhere."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    left = tl.minimum(numel - start, CHUNK).to(tl.int32)
    at = tl.arange(0, CHUNK)
    inside = at < left
    whole = (whole != 0) & (left == CHUNK)
    codes += chunk * (K * (12 + BITS) // 8)
    scales += chunk * (2 if BITS == 2 else 1)
    x += start
    b += start
    value = load_float(x, at, inside, whole)
    if MODE == "difference" or MODE == "choco":
        value = value - load_float(b, at, inside, whole)
    if MODE == "feedback":
        value = load_float(b, at, inside, whole) * factor + value
        store(b, at, value, inside, whole)
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bad = tl.max(size, axis=0) >= 0x7F800000
    write_indices(tl.where(bad, 0, size), codes, CHUNK, K)

    index = index_at(codes, tl.arange(0, K))
    there = index < left
    if MODE == "feedback":
        kept = load_float(b, index, there, False)
    else:
        kept = load_float(x, index, there, False)
    if MODE == "difference" or MODE == "choco":
        before = load_float(b, index, there, False)
        kept = kept - before
    code, low, high = write_values(tl.where(bad, 0.0, kept), bad, codes, scales, K, BITS)
    if MODE == "feedback":
        tl.store(b + index, kept + value_of(code, low, high, -1.0, BITS), mask=there)
    if MODE == "choco":
        tl.store(b + index, before + value_of(code, low, high, 1.0, BITS), mask=there)
        own = tl.load(s + start + index, mask=there, other=0)
        tl.store(s + start + index, own + value_of(code, low, high, factor, BITS), mask=there)


def topk_encode(mode: str, x: Tensor, b: Tensor, s: Tensor, factor: float, out: Coded, fmt: Format) -> None:
    launch(
        topk_encode_kernel, fmt.num_blocks(x.numel()), max(1, fmt.block // 256), x, b, s, out.codes, out.scales, x.numel(),
        float(factor), int(aligned(x, b)), MODE=mode, CHUNK=fmt.block, K=fmt.k, BITS=fmt.bits,
    )  # fmt: skip

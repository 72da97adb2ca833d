"""How does a program read and write its tile? fp32 or bf16 elements at any alignment, any length.

A tile whose pointers are multiples of 16 bytes and that the tensor fills (``whole``) takes loads and stores of 16 bytes without a
mask; any other takes an element at a time with one. A branch for all threads of a program, taken at run time: pointers from a
table say nothing about their alignment, and one compiled kernel serves all. It costs a compare, and the code twice.
bf16 is read and rounded by integer arithmetic: the interpreter's own cast does not round to nearest even, and neither hardware
agrees on the bits of NaN."""

# pyright: reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bf16_bits(x):
    """fp32 -> the bits of bf16, to nearest even, as int32; NaN is 0x7FC0."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int32)


@triton.jit
def from_bf16_bits(bits):
    return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def rounded_as(x, ptr):
    """x as it would be read back from ptr."""
    if ptr.dtype.element_ty == tl.bfloat16:
        x = from_bf16_bits(bf16_bits(x))
    return x


@triton.jit
def sixteenth(ptr):
    """ptr, known to be a multiple of 16. The shifts keep the mark with this branch: on ptr itself it would hold for both."""
    return tl.multiple_of(((ptr.to(tl.int64) >> 4) << 4).to(ptr.dtype), 16)


@triton.jit
def load(ptr, at, inside, whole):
    """Elements as they lie in memory, 0 where not inside."""
    if whole:
        x = tl.load(sixteenth(ptr) + at)
    else:
        x = tl.load(ptr + at, mask=inside, other=0)
    return x


@triton.jit
def store(ptr, at, x, inside, whole):
    if whole:
        tl.store(sixteenth(ptr) + at, x)
    else:
        tl.store(ptr + at, x, mask=inside)


@triton.jit
def load_float(ptr, at, inside, whole):
    """fp32 or bf16 -> fp32."""
    if ptr.dtype.element_ty == tl.bfloat16:
        x = from_bf16_bits(load(ptr.to(tl.pointer_type(tl.uint16), bitcast=True), at, inside, whole))
    else:
        x = load(ptr, at, inside, whole)
    return x


@triton.jit
def store_float(ptr, at, x, inside, whole):
    """fp32 -> fp32 or bf16."""
    if ptr.dtype.element_ty == tl.bfloat16:
        store(ptr.to(tl.pointer_type(tl.uint16), bitcast=True), at, bf16_bits(x).to(tl.uint16), inside, whole)
    else:
        store(ptr, at, x, inside, whole)


@triton.jit
def typed(address, ELEMENT: tl.constexpr):
    """An int64 address as a pointer."""
    return address.to(tl.pointer_type(ELEMENT))


@triton.jit
def bytes_at(ptr, offset):
    """A pointer to bytes, ``offset`` of them behind ptr."""
    return ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + offset


@triton.jit
def float_of(word):
    """The fp32 whose bits are the low half of an int64."""
    return word.to(tl.int32).to(tl.float32, bitcast=True)

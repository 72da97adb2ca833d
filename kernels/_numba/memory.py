"""How does a jitted function reach memory? By address, int64, of any alignment: one specialization a kernel, no alias checks.

x86 reads an unaligned vector as fast as an aligned one unless it crosses a cache line."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import signature

from dtrain.kernels._numba.simd import Vector, intrinsic

_BYTE = ir.IntType(8)
_LONG = ir.IntType(64)


def _loader(kind: Any, memory: Any = None, extend: str = "") -> Any:
    """Read a value of a numba type; ``memory`` is its LLVM type in memory where ``extend`` makes it longer."""
    stored = memory or kind.llvm

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], stored.as_pointer()), align=1)
            return getattr(builder, extend)(value, _LONG) if extend else value

        return signature(kind, types.int64), codegen

    return load


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a vector or a float32."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return signature(types.void, types.int64, value), codegen


def _narrow_store(bits: int) -> Any:
    kind = ir.IntType(bits)

    @intrinsic
    def store_low(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            low = builder.trunc(args[1], kind) if bits < 64 else args[1]
            builder.store(low, builder.inttoptr(args[0], kind.as_pointer()), align=1)
            return context.get_dummy_value()

        return signature(types.void, types.int64, types.int64), codegen

    return store_low


load_f32x8, load_f32x16, load_f32x32 = (_loader(Vector("f32", n)) for n in (8, 16, 32))
load_i32x8, load_i32x16, load_i32x32 = (_loader(Vector("i32", n)) for n in (8, 16, 32))
load_i16x8, load_i16x32 = (_loader(Vector("i16", n)) for n in (8, 32))
load_i8x16, load_i8x32 = (_loader(Vector("i8", n)) for n in (16, 32))
load_float = _loader(types.float32, ir.FloatType())
load_byte = _loader(types.int64, _BYTE, "zext")
load_signed_byte = _loader(types.int64, _BYTE, "sext")
load_half = _loader(types.int64, ir.IntType(16), "zext")
load_word = _loader(types.int64, ir.IntType(32), "zext")
load_long = _loader(types.int64, _LONG)
store_byte, store_half, store_word, store_long = (_narrow_store(bits) for bits in (8, 16, 32, 64))


@intrinsic
def store_double(typingctx: Any, address: Any, value: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], ir.DoubleType().as_pointer()), align=1)
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.float64), codegen


@intrinsic
def float_bits(typingctx: Any, value: Any) -> Any:
    """A float32's bits as int64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(32)), _LONG)

    return signature(types.int64, types.float32), codegen


@intrinsic
def bits_float(typingctx: Any, bits: Any) -> Any:
    """The float32 of the low 32 bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())

    return signature(types.float32, types.int64), codegen


@intrinsic
def lowest_set(typingctx: Any, bits: Any) -> Any:
    """The index of the lowest bit that is set; of none of them anything."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.IntType(1)(1))

    return signature(types.int64, types.int64), codegen


def longs(count: int) -> Any:
    """A jitted function that reads so many int64 in a row: what a kernel is called with."""
    result = types.UniTuple(types.int64, count)

    @intrinsic
    def read(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            first = builder.inttoptr(args[0], _LONG.as_pointer())
            return context.make_tuple(
                builder, result, [builder.load(builder.gep(first, [_LONG(i)]), align=8) for i in range(count)]
            )

        return signature(result, types.int64), codegen

    return read


def stack(num_bytes: int) -> Any:
    """A jitted function that gives the address of so many bytes of the caller's stack, aligned to a cache line."""

    @intrinsic
    def reserve(typingctx: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            # Not numba's alloca_once: that fills with zeros, which LLVM turns into a store a byte and takes minutes to combine.
            with builder.goto_entry_block():
                memory = builder.alloca(ir.ArrayType(_BYTE, num_bytes))
            memory.align = 64
            return builder.ptrtoint(memory, _LONG)

        return signature(types.int64), codegen

    return reserve


@intrinsic
def copy_bytes(typingctx: Any, to: Any, frm: Any, num_bytes: Any) -> Any:
    """Between places that do not overlap."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _BYTE.as_pointer()
        cgutils.raw_memcpy(
            builder, builder.inttoptr(args[0], pointer), builder.inttoptr(args[1], pointer), args[2], 1, align=1
        )
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64, types.int64), codegen


@intrinsic
def clear_bytes(typingctx: Any, to: Any, num_bytes: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(args[0], _BYTE.as_pointer()), args[1], 0)
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64), codegen


@intrinsic
def fetch(typingctx: Any, address: Any) -> Any:
    """Start reading a cache line that will be needed; the address need not exist."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kinds = [_BYTE.as_pointer(), *(ir.IntType(32),) * 3]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0"
        )
        builder.call(function, [builder.inttoptr(args[0], kinds[0]), *(ir.IntType(32)(i) for i in (0, 3, 1))])
        return context.get_dummy_value()

    return signature(types.void, types.int64), codegen


@intrinsic
def take(typingctx: Any, counter: Any) -> Any:
    """Add one to a counter that threads share; returns what it was."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _LONG.as_pointer()), _LONG(1), "seq_cst")

    return signature(types.int64, types.int64), codegen


@intrinsic
def add_shared(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to an int64 that threads share."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.atomic_rmw("add", builder.inttoptr(args[0], _LONG.as_pointer()), args[1], "seq_cst")
        return context.get_dummy_value()

    return signature(types.void, types.int64, types.int64), codegen


def _caller(num_args: int, floats: tuple[int, ...]) -> Any:
    """Call machine code at an address: int64 arguments but those that are float32."""
    kinds = tuple(types.float32 if i in floats else types.int64 for i in range(num_args))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        llvm = ir.FunctionType(ir.VoidType(), [context.get_value_type(kind) for kind in kinds])
        builder.call(builder.inttoptr(args[0], llvm.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature(types.void, types.int64, *kinds), codegen


@intrinsic
def call_encode(
    typingctx: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any
) -> Any:  # fmt: skip
    return _caller(10, ())


@intrinsic
def call_decode(
    typingctx: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any, j: Any, k: Any, m: Any
) -> Any:  # fmt: skip
    return _caller(12, (2, 10))

"""How does a jitted function compute on many numbers at once? Vectors as a numba type, lowered to LLVM's own.

A loop that LLVM must vectorize by itself gives up beyond 8 alias checks (Adam needs 10), and nothing says so but the clock. A
vector is a vector on every machine: LLVM cuts 32 lanes into what the CPU has, 4 x 8 with AVX2. Nothing here is contracted or
reassociated. Integers are unsigned but where a name says otherwise; a scalar operand fills all lanes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core import cgutils, types
from numba.core.typing import templates
from numba.core.typing.templates import AbstractTemplate, signature
from numba.extending import lower_builtin, models, register_model

# numba's own annotations hide that an intrinsic is called without its first argument.
intrinsic: Any = extending.intrinsic
infer_global: Any = templates.infer_global

_ELEMENT: dict[str, Any] = {f"i{bits}": ir.IntType(bits) for bits in (1, 8, 16, 32, 64)} | {
    "f32": ir.FloatType(),
    "f64": ir.DoubleType(),
}
_SCALAR = {"i1": types.boolean, "i8": types.uint8, "i16": types.uint16, "i32": types.uint32, "i64": types.int64}
_SCALAR |= {"f32": types.float32, "f64": types.float64}


class Vector(types.Type):
    """``width`` lanes of ``element``, as f32x32."""

    def __init__(self, element: str, width: int) -> None:
        self.element, self.width = element, width
        super().__init__(name=f"{element}x{width}")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENT[self.element], self.width)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _fill(builder: Any, scalar: Any, width: int) -> Any:
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width))


def _lanes(context: Any, builder: Any, value: Any, of: types.Type, like: Vector) -> Any:
    if isinstance(of, Vector):
        return value
    return _fill(builder, context.cast(builder, value, of, _SCALAR[like.element]), like.width)


def _binary(op: Callable[..., Any], on_floats: str | None, on_integers: str | None, compare: str = "") -> None:
    """Type and lower one operator for (vector, vector), (vector, scalar) and (scalar, vector)."""

    @infer_global(op)
    class Typed(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            vector = next((a for a in args if isinstance(a, Vector)), None)
            if vector is None or len(args) != 2:
                return None
            if not all(a == vector or (not isinstance(a, Vector) and isinstance(a, types.Number)) for a in args):
                return None
            result = Vector("i1", vector.width) if compare else vector
            return signature(result, *(types.unliteral(a) for a in args))

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        like = next(a for a in sig.args if isinstance(a, Vector))
        a, b = (_lanes(context, builder, v, of, like) for v, of in zip(args, sig.args, strict=True))
        method = on_floats if like.element[0] == "f" else on_integers
        if method is None:
            raise NotImplementedError(f"{op} on {like}")
        call = getattr(builder, method)
        return call(compare, a, b) if compare else call(a, b)

    for pair in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(op, *pair)(lower)


_binary(operator.add, "fadd", "add")
_binary(operator.iadd, "fadd", "add")
_binary(operator.sub, "fsub", "sub")
_binary(operator.mul, "fmul", "mul")
_binary(operator.truediv, "fdiv", None)
_binary(operator.and_, None, "and_")
_binary(operator.or_, None, "or_")
_binary(operator.xor, None, "xor")
_binary(operator.lshift, None, "shl")
_binary(operator.rshift, None, "lshr")
_binary(operator.lt, "fcmp_ordered", "icmp_unsigned", "<")
_binary(operator.le, "fcmp_ordered", "icmp_unsigned", "<=")
_binary(operator.gt, "fcmp_ordered", "icmp_unsigned", ">")
_binary(operator.ge, "fcmp_ordered", "icmp_unsigned", ">=")
_binary(operator.eq, "fcmp_ordered", "icmp_unsigned", "==")


def _llvm_name(kind: ir.Type) -> str:
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_llvm_name(kind.element)}"
    return {"float": "f32", "double": "f64"}.get(str(kind), str(kind))


def call_llvm(builder: Any, name: str, args: list[Any], result: Any = None) -> Any:
    """Call one of LLVM's intrinsics that is overloaded on its first argument."""
    kind = ir.FunctionType(result or args[0].type, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.{_llvm_name(args[0].type)}"), args)


def _elementwise(name: str, num_args: int, elements: tuple[str, ...] = ()) -> Any:
    """An LLVM intrinsic on vectors, or on float32 scalars, of one type; scalars beside a vector fill its lanes."""

    def typed(args: tuple[Any, ...]) -> Any:
        like = next((a for a in args if isinstance(a, Vector)), types.float32)
        if isinstance(like, Vector) and elements and like.element not in elements:
            return None

        def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            pairs = zip(values, sig.args, strict=True)
            if isinstance(like, Vector):
                return call_llvm(builder, name, [_lanes(context, builder, v, of, like) for v, of in pairs])
            return call_llvm(builder, name, [context.cast(builder, v, of, like) for v, of in pairs])

        return signature(like, *args), codegen

    if num_args == 1:
        return intrinsic(lambda typingctx, a: typed((a,)))
    if num_args == 2:
        return intrinsic(lambda typingctx, a, b: typed((a, b)))
    return intrinsic(lambda typingctx, a, b, c: typed((a, b, c)))


floor = _elementwise("llvm.floor", 1)
rint = _elementwise("llvm.nearbyint", 1)
root = _elementwise("llvm.sqrt", 1)
size = _elementwise("llvm.fabs", 1)
fma = _elementwise("llvm.fma", 3)
"""a b + c, rounded once."""
largest = _elementwise("llvm.umax", 2, ("i32",))
least_signed = _elementwise("llvm.smin", 2, ("i8", "i32"))
largest_signed = _elementwise("llvm.smax", 2, ("i8", "i32"))


def _convert(method: str, frm: str, to: str) -> Any:
    @intrinsic
    def convert(typingctx: Any, v: Any) -> Any:
        if not isinstance(v, Vector) or v.element != frm:
            return None
        result = Vector(to, v.width)
        return signature(result, v), lambda context, builder, sig, args: getattr(builder, method)(args[0], result.llvm)

    return convert


as_bits = _convert("bitcast", "f32", "i32")
as_floats = _convert("bitcast", "i32", "f32")
to_float = _convert("sitofp", "i32", "f32")
"""Signed."""
to_integer = _convert("fptosi", "f32", "i32")
"""Towards zero, signed; the value must fit."""
to_double = _convert("fpext", "f32", "f64")
low_byte = _convert("trunc", "i32", "i8")
low_half = _convert("trunc", "i32", "i16")
wider8 = _convert("zext", "i8", "i32")
wider8_signed = _convert("sext", "i8", "i32")
wider16 = _convert("zext", "i16", "i32")
wider32 = _convert("zext", "i32", "i64")


@intrinsic
def saturated_byte(typingctx: Any, v: Any) -> Any:
    """The nearest signed byte of signed integers; x86 has it as one instruction with the packing."""
    result = Vector("i8", v.width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        for name, bound in (("llvm.smax", -128), ("llvm.smin", 127)):
            value = call_llvm(builder, name, [value, ir.Constant(value.type, [bound] * v.width)])
        return builder.trunc(value, result.llvm)

    return signature(result, v), codegen


@intrinsic
def select(typingctx: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is set, else b; either may be a scalar, not both."""
    like = a if isinstance(a, Vector) else b
    if not isinstance(mask, Vector) or not isinstance(like, Vector):
        return None

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        a, b = (_lanes(context, builder, v, of, like) for v, of in zip(args[1:], sig.args[1:], strict=True))
        return builder.select(args[0], a, b)

    return signature(like, mask, a, b), codegen


def _filled(element: str, width: int) -> Any:
    @intrinsic
    def fill(typingctx: Any, scalar: Any) -> Any:
        like = Vector(element, width)
        return signature(like, scalar), lambda context, builder, sig, args: _lanes(context, builder, args[0], sig.args[0], like)

    return fill


floats8, floats32 = _filled("f32", 8), _filled("f32", 32)
bits8, bits16, bits32 = _filled("i32", 8), _filled("i32", 16), _filled("i32", 32)
doubles32, longs8 = _filled("f64", 32), _filled("i64", 8)


def _count(width: int) -> Any:
    @intrinsic
    def count(typingctx: Any) -> Any:
        like = Vector("i32", width)
        return signature(like), lambda context, builder, sig, args: ir.Constant(like.llvm, list(range(width)))

    return count


count8, count32 = _count(8), _count(32)
"""0, 1, 2, ..."""


def _halves(builder: Any, v: Any) -> tuple[Any, Any]:
    half = v.type.count // 2

    def part(lo: int) -> Any:
        mask = ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(lo, lo + half)))
        return builder.shuffle_vector(v, v, mask)

    return part(0), part(half)


@intrinsic
def tree_of_lanes(typingctx: Any, v: Any) -> Any:
    """First half plus second half, until one value is left: the order of ``parts.tree_sum``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        value = args[0]
        add = builder.fadd if v.element[0] == "f" else builder.add
        while value.type.count > 1:
            value = add(*_halves(builder, value))
        return builder.extract_element(value, ir.IntType(32)(0))

    return signature(_SCALAR[v.element], v), codegen


@intrinsic
def largest_lane(typingctx: Any, v: Any) -> Any:
    """The largest unsigned integer, as int64."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        most = call_llvm(builder, "llvm.vector.reduce.umax", [args[0]], args[0].type.element)
        return builder.zext(most, ir.IntType(64))

    return signature(types.int64, v), codegen


@intrinsic
def mask_bits(typingctx: Any, mask: Any) -> Any:
    """A mask of 32 lanes as an integer, the first lowest."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.zext(builder.bitcast(args[0], ir.IntType(32)), ir.IntType(64))

    return signature(types.int64, mask), codegen


@intrinsic
def bits_mask(typingctx: Any, bits: Any) -> Any:
    """The low 32 bits of an integer as a mask."""
    result = Vector("i1", 32)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), result.llvm)

    return signature(result, types.int64), codegen


@intrinsic
def join_nibbles(typingctx: Any, v: Any) -> Any:
    """32 bytes below 16 -> 16 bytes, the even one in the low half."""
    result = Vector("i8", v.width // 2)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        # A pair of bytes as one 16-bit number, high << 4 | low in its low byte: whole-vector shifts, no crossing of lanes but
        # in the last truncation.
        pairs = builder.bitcast(args[0], ir.VectorType(ir.IntType(16), result.width))
        four = ir.Constant(pairs.type, [4] * result.width)
        return builder.trunc(builder.or_(pairs, builder.lshr(pairs, four)), result.llvm)

    return signature(result, v), codegen


@intrinsic
def split_nibbles(typingctx: Any, v: Any) -> Any:
    """16 bytes -> 32 bytes below 16, the low half first."""
    result = Vector("i8", v.width * 2)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(ir.IntType(16), v.width)
        wide = builder.zext(args[0], kind)
        four, mask = ir.Constant(kind, [4] * v.width), ir.Constant(kind, [0x0F0F] * v.width)
        both = builder.and_(builder.or_(wide, builder.shl(wide, four)), mask)
        return builder.bitcast(both, result.llvm)

    return signature(result, v), codegen

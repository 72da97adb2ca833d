"""How many bytes must an operation of torch move, at least? Known from the shapes of its operands, or not known.

A floor: each operand is read or written once, and what a stride of 0 repeats counts once. None where the shapes do not tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_ITEM_BYTES = {
    "float": 4,
    "double": 8,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "long int": 8,
    "int": 4,
    "short int": 2,
    "signed char": 1,
    "unsigned char": 1,
    "bool": 1,
}

_IN_PLACE = frozenset({"aten::add_", "aten::sub_", "aten::mul_", "aten::div_"})
_ELEMENTWISE = frozenset({"aten::add", "aten::sub", "aten::mul", "aten::div"})
_UNARY = frozenset(
    f"aten::{name}" for name in ("neg", "abs", "exp", "gelu", "relu", "sqrt", "rsqrt", "tanh", "pow", "clamp_min", "_log_softmax")
)
_BACKWARD = frozenset({"aten::threshold_backward", "aten::_log_softmax_backward_data", "aten::gelu_backward"})
_SUMS = frozenset({"aten::sum", "aten::mean"})
_FILL = frozenset({"aten::fill_", "aten::zero_"})


def moved_bytes(name: str, dims: Sequence[Any], types: Sequence[str], strides: Sequence[Any]) -> int | None:
    """The arguments are those that torch.profiler writes with record_shapes."""
    if name == "aten::_fused_adamw_":
        return _fused_adamw(dims)
    tensors = [
        (list(shape), _ITEM_BYTES[kind], _stored(shape, stride) * _ITEM_BYTES[kind])
        for shape, kind, stride in zip(dims, types, strides, strict=True)
        if kind in _ITEM_BYTES
    ]
    if not tensors or len(tensors) < sum(1 for kind in types if kind not in ("", "Scalar", "ScalarList")):
        return None  # a kind that this table does not know
    tensors = [t for t in tensors if t[0]] or tensors  # a number comes as a tensor without dimensions, of a kind of its own
    shapes, items, sizes = zip(*tensors, strict=True)
    if name in _FILL:
        return sizes[0]
    if name == "aten::copy_" and len(sizes) == 2:
        return sum(sizes)
    if name in _IN_PLACE:
        return sizes[0] + sum(sizes)
    if name in _SUMS:
        return sizes[0]
    if name in _ELEMENTWISE and not any(shapes):
        return sum(sizes) + items[0]  # two numbers
    if len(set(items)) > 1:
        return None  # the kind of the result depends on rules that are torch's
    if name in _UNARY and len(sizes) == 1:
        return sizes[0] + items[0] * math.prod(shapes[0])
    if name in _BACKWARD and len(sizes) == 2:
        return sum(sizes) + items[0] * math.prod(shapes[0])
    if name in _ELEMENTWISE:
        return sum(sizes) + items[0] * math.prod(_broadcast(shapes))
    if name in ("aten::mm", "aten::bmm") and len(shapes) == 2:
        return sum(sizes) + items[0] * math.prod(shapes[0][:-1]) * shapes[1][-1]
    if name == "aten::addmm" and len(shapes) == 3:
        return sum(sizes) + items[0] * shapes[1][0] * shapes[2][1]
    return None


def _stored(shape: Sequence[int], stride: Sequence[int]) -> int:
    return math.prod(n for n, step in zip(shape, stride, strict=True) if step != 0)


def _broadcast(shapes: Sequence[Sequence[int]]) -> list[int]:
    most = max(len(shape) for shape in shapes)
    padded = [[1] * (most - len(shape)) + list(shape) for shape in shapes]
    return [0 if 0 in column else max(column) for column in zip(*padded, strict=True)]


def _fused_adamw(dims: Sequence[Any]) -> int | None:
    """Parameters and moments in fp32 are read and written, gradients are read: dtrain trains in fp32."""
    lists = dims[:4]
    if len(lists) < 4 or not all(shape and all(isinstance(inner, list) for inner in shape) for shape in lists):
        return None
    params, grads, mean, square = (sum(math.prod(shape) for shape in of) for of in lists)
    return 4 * (2 * params + grads + 2 * mean + 2 * square)

"""Did two backends write the same? Bytes, but for the two operations whose arithmetic is not fixed to the bit.

``sum_of_squares`` may add in any order, and ``outer_step`` fuses a multiply and an add only where the machine can; both have a
bound that is derived here. A NaN equals any NaN: IEEE 754 leaves its sign and payload open, and x86 and GPUs differ in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.kernels.operands import SUM_TILE, Format

ROUNDING = 2.0**-24
"""Half a unit in the last place of fp32: the relative error of one rounding."""


def map_tensors(operand: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Operands (tensors, numbers, and sequences or named tuples of them) with each tensor changed."""
    if isinstance(operand, Tensor):
        return change(operand)
    if isinstance(operand, tuple) and hasattr(operand, "_fields"):
        return type(operand)(*(map_tensors(part, change) for part in operand))
    if isinstance(operand, (tuple, list)):
        return type(operand)(map_tensors(part, change) for part in operand)
    return operand


def tensors(operand: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    map_tensors(operand, lambda t: found.append(t) or t)
    yield from found


def copies(operands: Any, device: torch.device) -> Any:
    return map_tensors(operands, lambda t: t.to(device, copy=True))


def difference(op: str, before: Sequence[Any], expected: Sequence[Any], got: Sequence[Any]) -> str | None:
    """What differs between two outcomes of an operation on the operands ``before``, in a line; None where nothing does."""
    formats = [operand for operand in before if isinstance(operand, Format)]
    cast = {"bf16": torch.bfloat16, "identity": torch.float32}.get(formats[0].kind) if formats else None
    if op == "cast_bf16":
        cast = torch.bfloat16
    bounds = _BOUNDS[op](before, expected) if op in _BOUNDS else {}
    for position, (a, b) in enumerate(zip(tensors(expected), tensors(got), strict=True)):
        b = b.cpu()
        if cast is not None and a.dtype == torch.uint8:  # codes that are floats
            a, b = (t[: t.numel() // cast.itemsize * cast.itemsize].clone().view(cast) for t in (a, b))
        if position in bounds:
            wrong = ~((a.double() - b.double()).abs() <= bounds[position]) & ~(a == b)
        else:
            wrong = _bits(a) != _bits(b)
        if a.is_floating_point():
            wrong &= ~(a.isnan() & b.isnan())
        if count := int(wrong.sum()):
            at = int(wrong.nonzero()[0])
            what = "is outside the bound" if position in bounds else "differs"
            return f"tensor {position} {what} in {count} of {a.numel()} elements, first at {at}: {a[at]} became {b[at]}"
    return None


def _bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def _outer_step(before: Sequence[Any], expected: Sequence[Any]) -> dict[int, Tensor]:
    """anchor' = anchor - lr (mu u + delta): each side errs by at most one rounding of mu u, of the sum, of its multiple and of
    anchor'; two sides, and 1.01 for terms of second order. x' = (x - sent) + anchor' adds a rounding a side of the sum, and of
    its cast where x is bf16. Operands: x 0, sent 1, anchor 2, momentum 3 (which is exact), delta 4."""
    _, _, _, _, delta, lr, mu = before
    x, _, anchor, momentum, _ = (t.double().abs() for t in tensors(expected))
    u = mu * momentum
    bound = 2.02 * ROUNDING * (lr * (u + 2 * (u + delta.double().abs())) + anchor) + 2.0**-149
    cast = 2.0**-8 if expected[0].dtype == torch.bfloat16 else 0.0
    return {0: bound * (1 + cast) + (2.02 * ROUNDING + cast) * x, 2: bound}


def _sum_of_squares(before: Sequence[Any], expected: Sequence[Any]) -> dict[int, Tensor]:
    """Squares of fp32 are exact in fp64; SUM_TILE - 1 additions in some order err by 2^-53 of the sum each, on two sides."""
    last = sum(1 for _ in tensors(expected)) - 1
    return {last: expected[-1].double().abs() * (2 * SUM_TILE * 2.0**-53)}


_BOUNDS: dict[str, Callable[[Sequence[Any], Sequence[Any]], dict[int, Tensor]]] = {
    "outer_step": _outer_step,
    "sum_of_squares": _sum_of_squares,
}

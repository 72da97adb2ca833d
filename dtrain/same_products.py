"""How do unlike machines multiply matrices to the same bits? What must agree is whole numbers, whose sums in fp64 are exact.

The order of a product's sum is the library's, and its precision may be the user's (TF32, bf16). Here all is fp64, to which no
such setting applies. Where islands must agree, more is done:
    out = P^T Q:    P and Q are rounded to whole multiples of a power of two, of as many bits that 2^52 bounds any sum of their
                    products. So it is exact in whatever order, and rounded once, to fp32.
    P = orth(A):    Gram-Schmidt by operations on elements, which IEEE 754 defines, and sums of two that have one order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TILE = 2**20
"""Elements that are fp64 at once."""
_Q_BITS = 22
_FP32_BITS = 24
_DEPENDENT = 1e-6
"""What is left of a row below this share of it is rounding of fp32."""


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out <- a b, of fp32 (r, n) and (n, c)."""
    if out.is_meta:
        return
    a = a.double()
    for part in _tiles(b.shape[1], b.shape[0]):
        out[:, part] = a @ b[:, part].double()


def subtract_product(p: Tensor, q: Tensor, out: Tensor) -> None:
    """out <- out - p^T q, of fp32 (r, m) and (r, k)."""
    if out.is_meta:
        return
    p, q = p.double(), q.double()
    for part in _tiles(*out.shape):
        out[part] = out[part].double() - p[:, part].T @ q


def exact_product(p: Tensor, q: Tensor, out: Tensor) -> None:
    """out <- p^T q, of fp32 (r, m) and (r, k), with the same bits on every machine. p and q lose what is below 2^-p_bits and
    2^-22 of their largest; p of ``orthonormal`` is such already."""
    if out.is_meta:
        return
    bits = _p_bits(len(p))
    (a, p_unit), (b, q_unit) = _whole(p, bits), _whole(q, _Q_BITS)
    for part in _tiles(*out.shape):
        out[part] = (a[:, part].T @ b).mul_(p_unit * q_unit)


def orthonormal(p: Tensor) -> Tensor:
    """fp32 (r, m) -> (r, m), r <= m: orthonormal rows to 2^-p_bits of the largest element, with the same bits on every machine.
    The first j span p's first j, and each adds something positive to those before it; where p has fewer directions than rows,
    fixed ones stand in."""
    if p.is_meta:
        return torch.empty_like(p)
    rows = p.double()
    lengths = root(_sum(rows.square())).mul_(_DEPENDENT)
    found = torch.empty_like(lengths)
    for j, row in enumerate(rows):
        found[j] = root(_sum(row.square()))
        _take_out(row, found[j], rows[j + 1 :])
    if not bool((found > lengths).all()):  # asked once: a GPU that is asked about each row waits for each
        rows = _with_stand_ins(p, lengths)
    whole, unit = _whole(rows, _p_bits(len(rows)))
    return whole.mul_(unit).float()


def _with_stand_ins(p: Tensor, least: Tensor) -> Tensor:
    """The same rows in fp64, and in the place of each of which ``least`` or less is left another (``_other``)."""
    rows = p.double()
    for j, row in enumerate(rows):
        length = root(_sum(row.square()))
        if not bool(length > least[j]):
            row.copy_(_other(j, rows[:j], len(row)))
            length = root(_sum(row.square()))
        _take_out(row, length, rows[j + 1 :])
    return rows


def _take_out(row: Tensor, length: Tensor, rest: Tensor) -> None:
    """Of the length 1, and the others have nothing of its direction. ``length``: a tensor, as a GPU divides by a number by
    multiplying."""
    row.div_(length)
    rest.sub_(_sum(rest * row) * row)


def root(x: Tensor) -> Tensor:
    """As IEEE 754 has it: a GPU's own, but not that of torch with MKL on a CPU, which of 70 numbers has about one off by its last
    bit."""
    if x.is_cuda:
        return x.sqrt()
    return x.new_tensor([math.sqrt(value) for value in x.flatten().tolist()]).view_as(x)


def _other(j: int, before: Tensor, numel: int) -> Tensor:
    """The direction that stands in for row j, at right angles to those before; twice, as little of it may be left."""
    row = torch.rand(numel, generator=torch.Generator().manual_seed(j)).to(before).sub_(0.5)
    for _ in range(2):
        for one in before:
            row.sub_(_sum(one * row) * one)
    return row


def _sum(x: Tensor) -> Tensor:
    """(..., n) -> (..., 1), in the place of x: the second half is added to the first, again and again."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        x[..., : n - half] += x[..., half:]
        x = x[..., :half]
    return x


def _p_bits(rank: int) -> int:
    return min(_FP32_BITS, 52 - _Q_BITS - (rank - 1).bit_length())


def _whole(x: Tensor, bits: int) -> tuple[Tensor, float]:
    """The nearest whole multiples of a power of two, up to 2^bits of it, and that."""
    _, exponent = math.frexp(float(x.abs().max())) if x.numel() else (0.0, 0)
    return x.double().mul(math.ldexp(1.0, bits - exponent)).round_(), math.ldexp(1.0, exponent - bits)


def _tiles(count: int, length: int) -> list[slice]:
    """Of ``count`` rows or columns of that length."""
    step = max(1, _TILE // max(1, length))
    return [slice(start, start + step) for start in range(0, count, step)]

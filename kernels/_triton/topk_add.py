"""How are top-k wires read? Added to fp32 only the kept elements are touched; a mixture that is rounded once is made densely."""

# pyright: reportArgumentType=false, reportInvalidTypeForm=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.launch import TILE, aligned, kernel, launch
from dtrain.kernels._triton.memory import float_of, load_float, store_float, typed
from dtrain.kernels._triton.topk import code_at, index_at, read_scales, value_of
from dtrain.kernels.operands import Coded, Format


@kernel
def topk_add_kernel(
    y, codes, scales, weight: tl.float32, numel: tl.int64, num_chunks: tl.int64,
    CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R chunks a program; chunks behind the last read the last again and write nothing."""
    wanted = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    chunk = tl.minimum(wanted, num_chunks - 1)
    record = (codes + chunk * (K * (12 + BITS) // 8))[:, None]
    place = tl.arange(0, K)[None, :]
    index = chunk[:, None] * CHUNK + index_at(record, place)
    low, high = read_scales(scales, chunk, BITS)
    value = value_of(code_at(record, place, K, BITS), low[:, None], high[:, None], weight, BITS)
    inside = (index < numel) & (wanted < num_chunks)[:, None]
    tl.store(y + index, tl.load(y + index, mask=inside, other=0) + value, mask=inside)


@triton.jit
def add_sparse(y, wires, num_wires, chunk, CHUNK: tl.constexpr, K: tl.constexpr, LOG_K: tl.constexpr, BITS: tl.constexpr):
    """y (CHUNK) + sum_j weight_j decode(wire_j): every element looks for its index among the K, which rise, by halving."""
    at = tl.arange(0, CHUNK)
    for j in range(num_wires):
        record = typed(tl.load(wires + 3 * j), tl.uint8) + chunk * (K * (12 + BITS) // 8)
        scales = typed(tl.load(wires + 3 * j + 1), tl.bfloat16)
        weight = float_of(tl.load(wires + 3 * j + 2))
        place = tl.zeros((CHUNK,), tl.int32)
        for level in range(LOG_K):
            step = K >> (level + 1)
            place += tl.where(index_at(record, place + (step - 1)) < at, step, 0)
        low, high = read_scales(scales, chunk, BITS)
        value = value_of(code_at(record, place, K, BITS), low, high, weight, BITS)
        y = tl.where(index_at(record, place) == at, y + value, y)
    return y


@kernel
def topk_mix_kernel(
    x, xhat, s, wires, num_wires: tl.int64, factor: tl.float32, numel: tl.int64, whole: tl.int64,
    MODE: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, LOG_K: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """MODE and factor as ``mix_kernel``."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk * CHUNK
    left = tl.minimum(numel - start, CHUNK).to(tl.int32)
    at = tl.arange(0, CHUNK)
    inside = at < left
    whole = (whole != 0) & (left == CHUNK)
    value = load_float(x + start, at, inside, whole)
    if MODE == "choco":
        own = load_float(s + start, at, inside, whole)
        own = add_sparse(own, wires, num_wires, chunk, CHUNK, K, LOG_K, BITS)
        store_float(s + start, at, own, inside, whole)
        value = value + (own - load_float(xhat + start, at, inside, whole)) * factor
    else:
        value = add_sparse(value * factor, wires, num_wires, chunk, CHUNK, K, LOG_K, BITS)
    store_float(x + start, at, value, inside, whole)


def topk_add(wire: Coded, y: Tensor, weight: float, fmt: Format) -> None:
    rows = max(1, TILE // fmt.k)
    num_chunks = fmt.num_blocks(y.numel())
    launch(
        topk_add_kernel, -(-num_chunks // rows), 4, y, wire.codes, wire.scales, float(weight), y.numel(), num_chunks,
        CHUNK=fmt.block, K=fmt.k, BITS=fmt.bits, R=rows,
    )  # fmt: skip


def topk_mix(mode: str, x: Tensor, xhat: Tensor, s: Tensor, factor: float, wires: Tensor, num_wires: int, fmt: Format) -> None:
    launch(
        topk_mix_kernel, fmt.num_blocks(x.numel()), max(1, fmt.block // 512), x, xhat, s, wires, num_wires, float(factor),
        x.numel(), int(aligned(x, xhat, s)), MODE=mode, CHUNK=fmt.block, K=fmt.k, LOG_K=fmt.k.bit_length() - 1, BITS=fmt.bits,
    )  # fmt: skip

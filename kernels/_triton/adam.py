"""How are AccumAdam and its gossip forms launched? One program a tile of a piece, one launch for all pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton.language as tl
from torch import Tensor

from dtrain.kernels._triton.check import CASTS, kind_rows, same_length
from dtrain.kernels._triton.launch import aligned, launch
from dtrain.kernels._triton.step import step_kernel
from dtrain.kernels._triton.tables import float_bits, on_device, tile_map
from dtrain.kernels.operands import Adam, Format, Noise, Piece, Public


def accum_adam(pieces: Sequence[Piece], adam: Adam, grad_scale: Tensor) -> None:
    _step("none", pieces, (), adam, grad_scale, 0.0, 0.0, (), (), None, Format("identity"), None)


def gossip_adam(
    pieces: Sequence[Piece], adam: Adam, grad_scale: Tensor, self_weight: float, wires: Sequence[Tensor],
    weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None = None,
) -> None:  # fmt: skip
    _step("mix", pieces, (), adam, grad_scale, 0.0, self_weight, wires, weights, out, fmt, noise)


def choco_gossip_adam(
    pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, grad_scale: Tensor, gamma: float, self_weight: float,
    wires: Sequence[Tensor], weights: Sequence[float], out: Tensor, fmt: Format, noise: Noise | None = None,
) -> None:  # fmt: skip
    if len(public) != len(pieces):
        raise ValueError(f"choco_gossip_adam needs one Public a piece, got {len(public)} for {len(pieces)} pieces")
    _step("choco", pieces, public, adam, grad_scale, gamma, self_weight, wires, weights, out, fmt, noise)


def _step(
    mode: str, pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, grad_scale: Tensor, gamma: float,
    self_weight: float, wires: Sequence[Tensor], weights: Sequence[float], out: Tensor | None, fmt: Format, noise: Noise | None,
) -> None:  # fmt: skip
    if fmt.kind == "topk":
        raise ValueError("topk has no fused step; use mix, accum_adam and encode, one after the other")
    if not pieces:
        return
    device, dtype = grad_scale.device, pieces[0].x.dtype
    rows, block, warps, bits = kind_rows(fmt, mode)
    num_tiles = [-(-p.x.numel() // (rows * block)) for p in pieces]
    table, body = _table(pieces, public, adam, fmt, num_tiles, dtype)
    _check_bodies((out, *wires) if out is not None else wires, body)
    words = [
        word
        for wire, weight in zip(wires, weights, strict=True)
        for word in (wire.data_ptr(), wire.data_ptr(), float_bits(weight))
    ]
    ends = grad_scale if out is None else out
    seed, first = noise or (0, 0)
    launch(
        step_kernel, sum(num_tiles), warps, on_device(table, device), tile_map(num_tiles, device), on_device(words, device),
        ends.view(torch.uint8), grad_scale, len(wires), int(aligned(ends, *wires)), float(self_weight), float(gamma),
        1.0 - adam.beta1, 1.0 - adam.beta2, float(adam.beta1), float(adam.beta2), (1.0 - adam.power2) ** -0.5,
        float(adam.eps), adam.lr / (1.0 - adam.power1), 1.0 / adam.every, int(adam.every > 1), int(adam.closes), seed, first,
        ELEMENT=tl.bfloat16 if dtype == torch.bfloat16 else tl.float32, MODE=mode, KIND=fmt.kind, BITS=bits, R=rows, B=block,
        NOISY=noise is not None and fmt.kind not in CASTS,
    )  # fmt: skip


def _table(
    pieces: Sequence[Piece], public: Sequence[Public], adam: Adam, fmt: Format, num_tiles: Sequence[int], dtype: torch.dtype
) -> tuple[list[int], int]:
    """The rows that ``step_kernel`` reads, and the bytes of a wire's body.

    0 x, 1 g, 2 m, 3 v, 4 a, 5 xhat, 6 s (addresses), 7 numel, 8 first tile, 9 first byte of the scales and 10 of the codes in a
    wire, 11 first element, 12 bits of 1 - lr wd, 13 flags: 1 where the state, 2 where the codes allow accesses of 16 bytes."""
    numels = [p.x.numel() for p in pieces]
    first_tile = list(accumulate(num_tiles, initial=0))
    first_element = list(accumulate(numels, initial=0))
    first_scale = list(accumulate((2 * fmt.num_scales(n) for n in numels), initial=0))
    first_code = list(accumulate((fmt.code_bytes(n) for n in numels), initial=first_scale[-1]))
    table: list[int] = []
    for i, p in enumerate(pieces):
        state = (p.x, p.g, p.m, p.v, *((p.a,) if adam.every > 1 else ()), *(public[i] if public else ()))
        same_length(*state)
        if p.x.dtype != dtype or p.g.dtype != dtype:
            raise ValueError(f"x and g of all pieces must have one dtype, got {p.x.dtype} and {p.g.dtype} besides {dtype}")
        addresses = [y.data_ptr() for y in (p.x, p.g, p.m, p.v, p.a, *(public[i] if public else (p.x, p.x)))]
        flags = int(aligned(*state)) + 2 * (first_code[i] % 16 == 0)
        decay = float_bits(1.0 - adam.lr * p.weight_decay)
        places = (numels[i], first_tile[i], first_scale[i], first_code[i], first_element[i])
        table += [*addresses, *places, decay, flags]
    return table, first_code[-1]


def _check_bodies(wires: Sequence[Tensor], body: int) -> None:
    for wire in wires:
        if wire.numel() != body:
            raise ValueError(f"a wire of these pieces has {body} bytes, got one of {wire.numel()}")

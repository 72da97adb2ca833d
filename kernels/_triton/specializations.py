"""Which kernels do the operations launch? Found by calling them all, with small tensors, while ``launch.recording`` listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton.language as tl
from torch import Tensor

from dtrain.kernels import _triton
from dtrain.kernels._triton.launch import TILE, Launch, recording
from dtrain.kernels.operands import Adam, Coded, Format, Noise, Piece, Public

BLOCK_KINDS = ("int8", "int4", "e3m0", "lut4", "sign")
ADAM = Adam(1e-3, 0.9, 0.95, 1e-8, 0.9, 0.95, 1, True)

ONLY_FP32 = ("decode_add_kernel", "topk_add_kernel", "checksum_kernel")

Call = tuple[str, Callable[[], None]]


def launches(blocks: tuple[int, ...], chunks: tuple[int, ...]) -> dict[Launch, str]:
    """Every kernel that the operations launch with blocks and chunks of these lengths, and the first operation that did."""
    found: dict[Launch, str] = {}
    for operation, call in _calls(blocks, chunks):
        with recording() as seen:
            call()
        for launch in seen:
            found.setdefault(launch, operation)
    return found


def few(found: dict[Launch, str]) -> dict[Launch, str]:
    """Every kernel in all its modes with one format, lut4, and in one mode with all; the dearer type and rounding."""
    return {launch: operation for launch, operation in found.items() if _dear(launch) and _telling(launch)}


def one_each(found: dict[Launch, str]) -> dict[Launch, str]:
    """Every kernel once, in its dearest form."""
    dearest: dict[str, Launch] = {}
    for launch in few(found):
        if _of(launch, "MODE", "choco") and _of(launch, "KIND", "lut4"):
            dearest.setdefault(launch.name, launch)
    return {launch: found[launch] for launch in dearest.values()}


def each_value(found: dict[Launch, str]) -> dict[Launch, str]:
    """So few that every kernel is there in its dearest form, and with every constant and type that it is launched with."""
    chosen, left = one_each(found), {launch: _values(launch) for launch in found}
    missing = set[tuple[str, str, object]]().union(*left.values()).difference(*(_values(launch) for launch in chosen))
    while missing:
        # Of those that add as many values, the dearest, then the first: an order that does not depend on hashes.
        best = max(left, key=lambda launch: (len(left[launch] & missing), _dear(launch)))
        chosen[best] = found[best]
        missing -= left[best]
    return chosen


def dealt(found: dict[Launch, str], hands: int) -> list[dict[Launch, str]]:
    """``each_value`` over so many hands: every kernel in each hand, every value in some hand, the dearest forms in the first."""
    kernels: dict[str, list[Launch]] = {}
    for launch in each_value(found):
        kernels.setdefault(launch.name, []).append(launch)
    return [
        {launch: found[launch] for forms in kernels.values() for launch in forms[hand::hands] or [forms[hand % len(forms)]]}
        for hand in range(hands)
    ]


def _values(launch: Launch) -> set[tuple[str, str, object]]:
    named = (*launch.constants, *launch.signature)
    return {(launch.name, name, value) for name, value in named}


def _dear(launch: Launch) -> bool:
    types = [t for name, t in launch.signature if name in ("x", "values", "y")]
    narrow = "*bf16" in types or not _of(launch, "ELEMENT", tl.float32) or launch.name in ONLY_FP32
    return narrow and (_of(launch, "NOISY", True) or _of(launch, "KIND", "identity") or _of(launch, "KIND", "bf16"))


def _telling(launch: Launch) -> bool:
    return _of(launch, "MODE", "choco") or _of(launch, "KIND", "lut4") or _of(launch, "MODE", "none")


def _of(launch: Launch, name: str, value: object) -> bool:
    """Whether the constant is this, or there is no such constant."""
    return dict(launch.constants).get(name, value) == value


def _calls(blocks: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[Call]:
    """Every operation with every kind of operand; nothing runs, so contents and lengths are of no account."""
    n = 2 * TILE
    y, one, flag, total = torch.zeros(n), torch.zeros(1), torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    dtypes = (torch.float32, torch.bfloat16)
    plain = (Format("identity"), Format("bf16"), *(Format(kind, block) for kind in BLOCK_KINDS for block in blocks))
    for fmt in plain:
        out, body = _wire(n, fmt), torch.zeros(fmt.code_bytes(n) + 2 * fmt.num_scales(n), dtype=torch.uint8)
        yield from _decoding(fmt, out, y)
        for x, noise in product((torch.zeros(n, dtype=dtype) for dtype in dtypes), (None, Noise(1, 2))):
            yield from _encoding(fmt, out, x, y, noise)
            pieces, public = [Piece(x, x, y, y, y, 0.0)], [Public(y, y)]
            rest = (0.5, [body], [0.5], body, fmt, noise)
            yield "gossip_adam", partial(_triton.gossip_adam, pieces, ADAM, one, *rest)
            yield "choco_gossip_adam", partial(_triton.choco_gossip_adam, pieces, public, ADAM, one, 0.5, *rest)
    for chunk, bits in product(chunks, (2, 8)):
        fmt = Format("topk", chunk, min(64, chunk // 4), bits)
        out = _wire(n, fmt)
        yield "topk_add", partial(_triton.topk_add, *out, y, 0.5, fmt.block, fmt.k, fmt.bits)
        yield from _decoding(fmt, out, y)
        for x in (torch.zeros(n, dtype=dtype) for dtype in dtypes):
            yield "topk_chunks", partial(_triton.topk_chunks, x, *out, fmt.block, fmt.k, fmt.bits)
            yield from _encoding(fmt, out, x, y, None)
    for x in (torch.zeros(n, dtype=dtype) for dtype in dtypes):
        yield "accum_adam", partial(_triton.accum_adam, [Piece(x, x, y, y, y, 0.0)], ADAM, one)
        yield "outer_step", partial(_triton.outer_step, x, x, y, y, y, 0.5, 0.5)
        yield "sum_of_squares", partial(_triton.sum_of_squares, [x], torch.zeros(1, dtype=torch.float64))
        yield "scale", partial(_triton.scale, [x], one)
        yield "flag_non_finite", partial(_triton.flag_non_finite, x, flag)
        yield "put_identity", partial(_triton.put_identity, x, torch.zeros(32 + 4 * n, dtype=torch.uint8), 32, 5)
    yield "checksum", partial(_triton.checksum, flag, 0, 0, total)


def _encoding(fmt: Format, out: Coded, x: Tensor, y: Tensor, noise: Noise | None) -> Iterator[Call]:
    if fmt.kind in BLOCK_KINDS:
        name = f"quantize_{fmt.kind}"
        yield name, partial(getattr(_triton, name), x, *out, fmt.block, noise)
    elif fmt.kind == "bf16":
        yield "cast_bf16", partial(_triton.cast_bf16, x, out.codes)
    yield "encode", partial(_triton.encode, x, out, fmt, noise)
    for b in {x.dtype: x, torch.float32: y}.values():
        yield "encode_difference", partial(_triton.encode_difference, x, b, out, fmt, noise)
    yield "encode_feedback", partial(_triton.encode_feedback, x, y, 0.5, out, fmt, noise)
    yield "choco_encode", partial(_triton.choco_encode, x, y, y, 0.5, out, fmt, noise)
    yield "mix", partial(_triton.mix, x, 0.5, [out], [0.5], fmt)
    yield "choco_mix", partial(_triton.choco_mix, x, y, y, 0.5, [out], [0.5], fmt)


def _decoding(fmt: Format, out: Coded, y: Tensor) -> Iterator[Call]:
    if fmt.kind in BLOCK_KINDS:
        name = f"dequantize_add_{fmt.kind}"
        yield name, partial(getattr(_triton, name), *out, y, 0.5, fmt.block)
    elif fmt.kind == "bf16":
        yield "add_bf16", partial(_triton.add_bf16, out.codes, y, 0.5)
    yield "decode_add", partial(_triton.decode_add, out, y, 0.5, fmt)


def _wire(numel: int, fmt: Format) -> Coded:
    codes = torch.zeros(fmt.code_bytes(numel), dtype=torch.uint8)
    return Coded(codes, torch.zeros(fmt.num_scales(numel), dtype=torch.bfloat16))

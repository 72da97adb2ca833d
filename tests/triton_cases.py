"""Does every interpreted Triton operation write what the reference writes? Every byte, those before and behind the outputs too.

A process of its own: TRITON_INTERPRET counts when triton is imported.

    python -m tests.triton_cases [--thorough] [OPERATION ...]

prints a JSON object, operation -> what differs (null: nothing). --thorough takes every case at aligned and unaligned addresses,
and more blocks; without it the two take turns."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from dtrain.kernels import OPERATIONS, SUM_TILE, Adam, Coded, Format, Noise, Piece, Public, _triton, reference, zones
from dtrain.kernels._triton.launch import TILE

GUARD = 64
SIZES = (1, 2, 31, 33, 63, 64, 100, 127, 1000, 1023, 1025, 2049)
FEW = (65, 1100)
BLOCKS = ("int8", "int4", "e3m0", "lut4", "sign")
NOISE = Noise(0x9E3779B9, 2**32 - 70)
"""The high word of the index changes within the first tile."""


class Arena:
    """Buffers between guard bytes, all filled with 0xA5 (or NaN) before use; element 0 at a multiple of 16 bytes or not."""

    def __init__(self, skew: int = 0) -> None:
        self.buffers: list[Tensor] = []
        self.skew, self.random = skew, torch.Generator().manual_seed(5)

    def empty(self, numel: int, dtype: torch.dtype, unit: int = 1) -> Tensor:
        guard = GUARD // dtype.itemsize
        buffer = torch.full(((numel + 2 * guard + unit) * dtype.itemsize,), 0xA5, dtype=torch.uint8).view(dtype)
        self.buffers.append(buffer)
        return buffer[guard + self.skew * unit :][:numel]

    def put(self, values: Tensor) -> Tensor:
        out = self.empty(values.numel(), values.dtype)
        return out.copy_(values)

    def normal(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.put(torch.randn(numel, generator=self.random).to(dtype))

    def hard(self, numel: int, dtype: torch.dtype = torch.float32, *, finite: bool = False) -> Tensor:
        """Normal values, and where there is room: zeros, negative zeros, denormals, huge values, ties, inf and NaN."""
        x = torch.randn(numel, generator=self.random)
        x[64:128], x[128:160], x[160:192] = 0.0, -0.0, x[160:192] * 1e-39
        x[192:256], x[256:320] = x[192:256] * 1e-41, x[256:320] * 8e37
        x[320:384] = x[320:384].sign() * 0.75
        x[159:160] = 0.0  # a block of -0.0 alone has mean -0.0; the interpreter's numpy starts every sum at +0.0
        x[384:385], x[600:601] = 3.0e38, -3.0e38
        if not finite:
            x[450:451], x[520:521] = torch.inf, torch.nan
        return self.put(x.to(dtype))

    def coded(self, numel: int, fmt: Format) -> Coded:
        """Room for a wire."""
        if fmt.kind in ("identity", "bf16"):
            codes = self.empty(numel, torch.float32 if fmt.kind == "identity" else torch.bfloat16).view(torch.uint8)
        else:
            codes = self.empty(fmt.code_bytes(numel), torch.uint8)
        return Coded(codes, self.empty(fmt.num_scales(numel), torch.bfloat16).fill_(torch.nan))

    def wire(self, numel: int, fmt: Format) -> Coded:
        out = self.coded(numel, fmt)
        reference.encode(torch.randn(numel, generator=self.random), out, fmt)
        return out

    def bodies(self, pieces: list[int], fmt: Format, count: int) -> list[Tensor]:
        """Whole wires of some pieces, from an address as even as their elements need."""
        size = sum(2 * fmt.num_scales(n) + fmt.code_bytes(n) for n in pieces)
        wires = [self.empty(size, torch.uint8, unit=4) for _ in range(count)]
        for wire in wires:
            for n, out in zip(pieces, zones(wire, fmt, pieces), strict=True):
                reference.encode(torch.randn(n, generator=self.random), out, fmt)
        return wires


Make = Callable[[Arena], tuple[Any, ...]]


turn = cycle((0, 1))
thorough = False


def compare(name: str, make: Make, tolerance: float = 0.0) -> None:
    """Once from addresses that allow wide loads (skew 0), or from others, or both."""
    probe = Arena()
    make(probe)
    small = max(b.numel() for b in probe.buffers) < TILE  # no whole tile, so no wide loads
    for skew in (0, 1) if thorough else (1 if small else next(turn),):
        ours, theirs = Arena(skew), Arena(skew)
        a, b = make(ours), make(theirs)
        getattr(_triton, name)(*a)
        getattr(reference, name)(*b)
        for i, (got, want) in enumerate(zip(ours.buffers, theirs.buffers, strict=True)):
            _same(got, want, f"buffer {i} of {_shown(a)}", tolerance)


def _same(got: Tensor, want: Tensor, what: str, tolerance: float) -> None:
    if got.is_floating_point() and tolerance:
        torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-30, equal_nan=True)
        return
    both = got.isnan() & want.isnan() if got.is_floating_point() else torch.zeros(got.shape, dtype=torch.bool)
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    wrong = ((got.view(width) != want.view(width)) & ~both).nonzero().flatten()
    if wrong.numel():
        i = int(wrong[0])
        raise AssertionError(f"{what}: {wrong.numel()} of {got.numel()} differ, first at {i}: {got[i]} for {want[i]}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{value.numel()}]"
    if isinstance(value, (tuple, list)) and not isinstance(value, (Format, Noise, Adam)):
        return f"({', '.join(map(_shown, value))})"
    return str(value)


def formats() -> Iterator[Format]:
    yield from (Format("identity"), Format("bf16"))
    yield from (Format(kind, block) for kind in BLOCKS for block in ((32, 64, 128, 4096) if thorough else (64,)))


TOPK = (Format("topk", 512, 4, 2), Format("topk", 256, 32, 8))


MORE_TOPK = (Format("topk", 4096, 64, 2), Format("topk", 1024, 1024, 2), Format("topk", 32, 8, 8))


def noises(fmt: Format) -> tuple[Noise | None, ...]:
    return (None, NOISE) if fmt.kind in BLOCKS else (None,)


DTYPES = (torch.float32, torch.bfloat16)


def quantize(kind: Any) -> None:
    for i, n in enumerate(SIZES):
        fmt = Format(kind, (32, 64, 1024, 64, 128, 256)[i % 6])
        for noise in noises(fmt):
            for dtype in (torch.float32, torch.bfloat16) if n == 1000 else (DTYPES[i % 2],):
                compare(f"quantize_{kind}", lambda m, n=n, d=dtype, f=fmt, z=noise: (m.hard(n, d), *m.coded(n, f), f.block, z))


def dequantize(kind: Any) -> None:
    for i, n in enumerate(SIZES):
        fmt = Format(kind, (32, 64, 128, 512)[i % 4])
        compare(f"dequantize_add_{kind}", lambda m, n=n, f=fmt: (*m.wire(n, f), m.normal(n), 0.3, f.block))


def cast_bf16() -> None:
    for n in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            compare("cast_bf16", lambda m, n=n, d=dtype: (m.hard(n, d), m.coded(n, Format("bf16")).codes))


def add_bf16() -> None:
    for n in SIZES:
        compare("add_bf16", lambda m, n=n: (m.wire(n, Format("bf16")).codes, m.hard(n), 0.3))


def topk_chunks() -> None:
    for i, (n, fmt) in enumerate(zip((1, 65, 1000, 1024, 5000, 2049, 100), (*TOPK, *TOPK, *MORE_TOPK), strict=True)):
        for dtype in (torch.float32, torch.bfloat16) if n < 1024 else (DTYPES[i % 2],):
            for finite in (True, False):
                compare(
                    "topk_chunks",
                    lambda m, n=n, f=fmt, d=dtype, z=finite: (m.hard(n, d, finite=z), *m.coded(n, f), f.block, f.k, f.bits),
                )


def topk_add() -> None:
    for n in (1, 65, 1000, 2049):
        for fmt in (*TOPK, *MORE_TOPK):
            compare("topk_add", lambda m, n=n, f=fmt: (*m.wire(n, f), m.normal(n), 0.3, f.block, f.k, f.bits))


def encode() -> None:
    for i, fmt in enumerate((*formats(), *TOPK)):
        compare("encode", lambda m, n=1100, f=fmt, d=DTYPES[i % 2]: (m.hard(n, d), m.coded(n, f), f, NOISE))


def decode_add() -> None:
    for fmt in (*formats(), *TOPK):
        for n in FEW:
            compare("decode_add", lambda m, n=n, f=fmt: (m.wire(n, f), m.normal(n), -1.7, f))


def encode_difference() -> None:
    for fmt in (*formats(), *TOPK):
        for i, n in enumerate(FEW):
            compare("encode_difference", lambda m, n=n, f=fmt, d=DTYPES[i % 2]: (m.hard(n, d), m.normal(n), m.coded(n, f), f))


def encode_feedback() -> None:
    for fmt in (*formats(), *TOPK):
        for i, n in enumerate(FEW):
            for noise in noises(fmt)[-1 - i :]:
                compare(
                    "encode_feedback",
                    lambda m, n=n, f=fmt, d=DTYPES[i % 2], z=noise: (m.hard(n, d), m.normal(n), 0.9, m.coded(n, f), f, z),
                )


def choco_encode() -> None:
    for fmt in (*formats(), *TOPK):
        for i, n in enumerate(FEW):
            compare(
                "choco_encode",
                lambda m, n=n, f=fmt, d=DTYPES[i % 2]: (m.hard(n, d), m.normal(n), m.normal(n), 0.4, m.coded(n, f), f, NOISE),
            )


def mix(name: str) -> None:
    for fmt in (*formats(), *TOPK):
        for i, (n, num_wires) in enumerate(((1, 2), (65, 0), (1100, 1), (1100, 3))):

            def make(
                m: Arena, n: int = n, f: Format = fmt, d: torch.dtype = DTYPES[i % 2], w: int = num_wires
            ) -> tuple[Any, ...]:
                x, wires, weights = m.normal(n, d), [m.wire(n, f) for _ in range(w)], [0.3, 0.2, 0.1][:w]
                if name == "mix":
                    return x, 0.4, wires, weights, f
                return x, m.normal(n), m.normal(n), 0.7, wires, weights, f

            compare(name, make)


PIECES = ([1], [65, 1, 1100], [64, 1024])


def pieces_of(m: Arena, numels: list[int], dtype: torch.dtype, every: int) -> list[Piece]:
    out = []
    for i, n in enumerate(numels):
        v = m.normal(n)
        v.square_()
        out.append(Piece(m.normal(n, dtype), m.normal(n, dtype), m.normal(n), v, m.normal(n if every > 1 else 0), 0.1 * i))
    return out


def adam_of(every: int, closes: bool) -> Adam:
    return Adam(3e-3, 0.9, 0.95, 1e-8, 0.9**3, 0.95**3, every, closes)


STEPS = ((1, True), (4, False), (4, True))


def accum_adam() -> None:
    for numels in PIECES:
        for every, closes in STEPS:
            for dtype in (torch.float32, torch.bfloat16):
                compare(
                    "accum_adam",
                    lambda m, p=numels, e=every, c=closes, d=dtype: (
                        pieces_of(m, p, d, e), adam_of(e, c), m.put(torch.tensor([0.7])),
                    ),
                )  # fmt: skip


def gossip_adam(name: str) -> None:
    for i, fmt in enumerate(formats()):
        for j, noise in enumerate(noises(fmt)):
            for k, (num_wires, numels) in enumerate(zip((0, 1, 3), PIECES, strict=True)):
                if not thorough and len(noises(fmt)) == 2 and (i + j + k) % 2:
                    continue  # each format with all pieces and wires, and with both ways of rounding, which take turns

                def make(
                    m: Arena, f: Format = fmt, p: list[int] = numels, w: int = num_wires, z: Noise | None = noise, at: int = i + j
                ) -> tuple[Any, ...]:
                    every, closes = STEPS[(at + w) % 3]
                    wires, weights, (out,) = m.bodies(p, f, w), [0.3, 0.2, 0.1][:w], m.bodies(p, f, 1)
                    pieces, rest = pieces_of(m, p, DTYPES[(at + w // 2) % 2], every), (0.4, wires, weights, out, f, z)
                    adam, grad_scale = adam_of(every, closes), m.put(torch.tensor([0.7]))
                    if name == "gossip_adam":
                        return pieces, adam, grad_scale, *rest
                    return pieces, [Public(m.normal(n), m.normal(n)) for n in p], adam, grad_scale, 0.6, *rest

                compare(name, make)


def outer_step() -> None:
    """Bit for bit: the interpreter's tl.fma rounds once, as does torch's ``add`` with ``alpha`` wherever a machine has the
    instruction. Where it has none, each of two fma rounds once
    more: |anchor'| may differ by 2^-24 (|mu u| lr + |lr (mu u + delta)|)."""
    for i, n in enumerate(SIZES):
        compare(
            "outer_step",
            lambda m, n=n, d=DTYPES[i % 2]: (m.normal(n, d), m.normal(n, d), *(m.normal(n) for _ in range(3)), 0.7, 0.9),
            tolerance=0.0,
        )


def sum_of_squares() -> None:
    """Any order of additions in fp64: 65536 positive terms differ by less than 65536 2^-53."""
    for numels in ([1], [65, 3000], [SUM_TILE + 5, 100]):
        for dtype in (torch.float32, torch.bfloat16):

            def make(m: Arena, numels: list[int] = numels, d: torch.dtype = dtype) -> tuple[Any, ...]:
                return [m.normal(n, d) for n in numels], m.empty(sum(-(-n // SUM_TILE) for n in numels), torch.float64)

            compare("sum_of_squares", make, tolerance=SUM_TILE * 2.0**-53)


def scale() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        compare("scale", lambda m, d=dtype: ([m.hard(n, d) for n in SIZES], m.put(torch.tensor([0.3]))))


def checksum() -> None:
    for n in (0, 1, 3, 4, 5, 1000, 4097, 16384, 20001):
        for first, start in ((0, 0), (2**32 - 3, -(2**62))):

            def make(m: Arena, n: int = n, first: int = first, start: int = start) -> tuple[Any, ...]:
                return m.empty(n, torch.uint8, unit=4).random_(0, 256, generator=m.random), first, start, m.empty(1, torch.int64)

            compare("checksum", make)


def flag_non_finite() -> None:
    for n in (0, *SIZES):
        for dtype in (torch.float32, torch.bfloat16):
            for finite in (True, False):
                compare("flag_non_finite", lambda m, n=n, d=dtype, z=finite: (m.hard(n, d, finite=z), m.empty(1, torch.uint8)))


def put_identity() -> None:
    for n in (0, *SIZES):
        for dtype in (torch.float32, torch.bfloat16):
            for finite in (True, False):

                def make(m: Arena, n: int = n, d: torch.dtype = dtype, z: bool = finite) -> tuple[Any, ...]:
                    return m.hard(n, d, finite=z), m.empty(4 * n + 36, torch.uint8, unit=4), 32, 5

                compare("put_identity", make)


CASES: dict[str, Callable[[], None]] = {
    **{f"quantize_{kind}": (lambda kind=kind: quantize(kind)) for kind in BLOCKS},
    **{f"dequantize_add_{kind}": (lambda kind=kind: dequantize(kind)) for kind in BLOCKS},
    **{f.__name__: f for f in (cast_bf16, add_bf16, topk_chunks, topk_add, encode, decode_add, encode_difference)},
    **{f.__name__: f for f in (encode_feedback, choco_encode, accum_adam, outer_step, sum_of_squares, scale)},
    **{f.__name__: f for f in (checksum, flag_non_finite, put_identity)},
    **{name: (lambda name=name: mix(name)) for name in ("mix", "choco_mix")},
    **{name: (lambda name=name: gossip_adam(name)) for name in ("gossip_adam", "choco_gossip_adam")},
}


def _sqrt(self: Tensor) -> Tensor:
    """Correctly rounded, as ``reference.py`` means it: torch's own on a CPU is MKL's, a fifth of whose fp32 results are off by
    one unit in the last place. 53 bits are enough for the second rounding to 24 to be innocent."""
    return torch.sqrt(self.double()).float()


def main(arguments: list[str]) -> None:
    global thorough  # noqa: PLW0603 - an option of this process
    thorough = "--thorough" in arguments
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # the interpreter's numpy overflows where a GPU would
    torch.set_num_threads(1)
    torch.Tensor.sqrt = _sqrt
    torch.Tensor.sqrt_ = lambda self: self.copy_(_sqrt(self))
    found: dict[str, str | None] = {}
    for name in [name for name in arguments if name != "--thorough"] or OPERATIONS:
        began, found[name] = time.process_time(), None
        try:
            CASES[name]()
        except AssertionError as e:
            found[name] = str(e)
        print(f"{name}: {time.process_time() - began:.1f} s {found[name] or ''}", file=sys.stderr)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])

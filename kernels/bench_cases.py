"""On what does a benchmark, or a comparison of backends, call each operation? One ``Case`` a way of calling one."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.kernels import reference
from dtrain.kernels.floors import PARTS, Sizes
from dtrain.kernels.operands import SUM_TILE, Adam, Coded, Format, Noise, Piece, Public, zones

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "uint8": torch.uint8}
TILE = 1 << 20
"""Elements that are drawn or encoded; a longer operand repeats them, as drawing 2^28 numbers would take longer than timing."""

BLOCK_FORMATS = ("int8", "int4", "e3m0", "lut4", "sign")
TOPK = Format("topk", 4096, 64, 2)
INT8 = Format("int8", 64)
SEED = 0x9E3779B9

Values = Callable[[int, int], Tensor]
"""(numel, salt) -> fp32 values on the CPU, others for another salt; numel is at most TILE."""


class Case(NamedTuple):
    op: str
    dtype: str = "fp32"
    """x and g."""
    fmt: Format | None = None
    wires: int = 0
    every: int = 1
    closes: bool = True
    random: bool = False
    """Whether codes are rounded at random."""

    @property
    def variant(self) -> str:
        """What a name does not say: ``int4:64, 2 wires``."""
        words = []
        if self.fmt is not None:
            fmt = self.fmt
            words.append(f"topk:{fmt.k}/{fmt.block}:{fmt.bits}" if fmt.kind == "topk" else f"{fmt.kind}:{fmt.block}")
            words[0] = words[0].removesuffix(":1")
        words += [f"{self.wires} wire{'s' if self.wires > 1 else ''}"] if self.wires else []
        if self.op.endswith("adam"):
            words.append(f"s={self.every}{' closes' if self.every > 1 and self.closes else ''}")
        return ", ".join([*words, *(["random"] if self.random else [])])

    def sizes(self, numel: int) -> Sizes:
        fmt = self.fmt or Format("int4", 64)
        return Sizes(numel, DTYPES[self.dtype].itemsize, fmt, self.wires, self.every, self.closes)

    def parts(self) -> tuple[Case, ...]:
        """What a fused operation does, one after another."""
        return tuple(self._replace(op=op) for op in PARTS.get(self.op, ()))


def default_cases(dtypes: tuple[str, ...], fmt: Format) -> list[Case]:
    """Every operation, in the order of ``OPERATIONS``; those that take any format in the given one."""
    out = []
    for dtype in dtypes:
        blocks = [Format(kind, 64) for kind in BLOCK_FORMATS]
        any_format = ("encode", "encode_difference", "encode_feedback", "choco_encode")
        out += [
            *(Case(f"quantize_{f.kind}", dtype, f) for f in blocks),
            Case("quantize_int4", dtype, Format("int4", 64), random=True),
            *(Case(f"dequantize_add_{f.kind}", "fp32", f) for f in blocks),
            *(Case("cast_bf16", dtype), Case("add_bf16", "fp32")),
            *(Case("topk_chunks", dtype, TOPK), Case("topk_add", "fp32", TOPK)),
            *(Case(op, dtype, fmt) for op in any_format[:1]),
            Case("decode_add", "fp32", fmt),
            *(Case(op, dtype, fmt) for op in any_format[1:]),
            *(Case(op, dtype, f, wires) for op in ("choco_mix", "mix") for f, wires in ((INT8, 1), (fmt, 2))),
            *(Case("accum_adam", dtype, None, 0, every, closes) for every, closes in ((1, True), (4, False), (4, True))),
            *(
                Case(op, dtype, f, wires, every, closes)
                for op in ("gossip_adam", "choco_gossip_adam")
                for f, wires in ((INT8, 1), (fmt, 2))
                for every, closes in ((1, True), (4, False))
            ),
            *(Case(op, dtype) for op in ("outer_step", "sum_of_squares", "scale")),
            *(Case("checksum", "uint8"), Case("flag_non_finite", dtype), Case("put_identity", dtype)),
        ]
    return list(dict.fromkeys(out))


IN_PLACE = (
    *(f"dequantize_add_{kind}" for kind in BLOCK_FORMATS),
    *("add_bf16", "topk_add", "decode_add", "encode_feedback", "choco_encode", "choco_mix", "mix", "accum_adam", "gossip_adam"),
    *("choco_gossip_adam", "outer_step", "scale"),
)
"""Operations that write what they read: measured against an in-place scale, the others against a copy."""


def normal(numel: int, salt: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(salt))


def operands(case: Case, numel: int, device: torch.device, values: Values = normal, *, weight: float = 0.5) -> tuple[Any, ...]:
    """The arguments of one call. Weights and rates keep values in range when a benchmark repeats it; only x, g and their like
    take ``values``: moments and wires are what an earlier, healthy step could have left."""
    made = _Maker(case, numel, device, values, weight)
    return made.operands()


def pieces_of(
    case: Case, sizes: list[int], device: torch.device, values: Values = normal, *, weight: float = 0.5
) -> tuple[Any, ...]:
    """The arguments of an optimizer's operation whose model has several parameters."""
    return _Maker(case, sum(sizes), device, values, weight).fused(sizes)


class _Maker:
    def __init__(self, case: Case, numel: int, device: torch.device, values: Values, weight: float) -> None:
        self.case, self.n, self.device, self.values, self.weight = case, numel, device, values, weight
        self.fmt = case.fmt or Format("int4", 64)
        self.noise = Noise(SEED, 2**32 - numel // 2) if case.random else None

    def x(self, salt: int, n: int | None = None) -> Tensor:
        n = self.n if n is None else n
        tile = self.values(min(n, TILE), salt).to(DTYPES[self.case.dtype]).to(self.device)
        return tile.repeat(-(-n // TILE))[:n]

    def state(self, salt: int, n: int | None = None) -> Tensor:
        n = self.n if n is None else n
        return normal(min(n, TILE), salt).to(self.device).repeat(-(-n // TILE))[:n]

    def zeros(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def empty_wire(self) -> Coded:
        codes, scales = self.fmt.code_bytes(self.n), self.fmt.num_scales(self.n)
        return Coded(self.zeros(codes, torch.uint8), self.zeros(scales, torch.bfloat16))

    def wire(self, salt: int, n: int | None = None) -> Coded:
        """What a peer sent: TILE elements encoded, and repeated."""
        n, fmt = self.n if n is None else n, self.fmt
        some = min(n, TILE)
        scales = torch.zeros(fmt.num_scales(some), dtype=torch.bfloat16)
        tile = Coded(torch.zeros(fmt.code_bytes(some), dtype=torch.uint8), scales)
        reference.encode(normal(some, 100 + salt), tile, fmt)
        codes, scales = (t.to(self.device).repeat(-(-n // TILE)) for t in tile)
        return Coded(codes[: fmt.code_bytes(n)], scales[: fmt.num_scales(n)])

    def wires(self) -> list[Coded]:
        return [self.wire(salt) for salt in range(self.case.wires)]

    def weights(self) -> list[float]:
        return [(1.0 - self.weight) / max(1, self.case.wires)] * self.case.wires

    def adam(self) -> Adam:
        return Adam(1e-3, 0.9, 0.99, 1e-8, 0.9**3, 0.99**3, self.case.every, self.case.closes)

    def piece(self, n: int, salt: int = 0) -> Piece:
        accumulated = self.state(salt + 5, n).mul_(0.1) if self.case.every > 1 else self.zeros(0, torch.float32)
        m, v = self.state(salt + 3, n).mul_(0.1), self.state(salt + 4, n).square_()
        return Piece(self.x(salt + 1, n), self.x(salt + 2, n), m, v, accumulated, 0.1)

    def fused(self, sizes: list[int]) -> tuple[Any, ...]:
        pieces = [self.piece(n, 10 * i) for i, n in enumerate(sizes)]
        grad_scale = self.factor()
        if self.case.op == "accum_adam":
            return pieces, self.adam(), grad_scale
        wires = [self.body([self.wire(salt + 2 * i, n) for i, n in enumerate(sizes)]) for salt in range(self.case.wires)]
        num_bytes = sum(self.fmt.code_bytes(n) + 2 * self.fmt.num_scales(n) for n in sizes)
        out = self.zeros(num_bytes, torch.uint8)
        ending = (self.weight, wires, self.weights(), out, self.fmt, self.noise)
        if self.case.op == "gossip_adam":
            return pieces, self.adam(), grad_scale, *ending
        public = [Public(self.state(10 * i + 6, n), self.state(10 * i + 7, n)) for i, n in enumerate(sizes)]
        return pieces, public, self.adam(), grad_scale, 0.25, *ending

    def factor(self) -> Tensor:
        return torch.tensor([2.0 * self.weight], device=self.device)

    def body(self, coded: list[Coded]) -> Tensor:
        return torch.cat([*(c.scales.view(torch.uint8) for c in coded), *(c.codes for c in coded)])

    def operands(self) -> tuple[Any, ...]:
        n, fmt, noise = self.n, self.fmt, self.noise
        match self.case.op:
            case op if op.startswith("quantize_"):
                return self.x(1), *self.empty_wire(), fmt.block, noise
            case op if op.startswith("dequantize_add_"):
                return *self.wire(0), self.x(1), self.weight, fmt.block
            case "cast_bf16":
                return self.x(1), self.zeros(2 * n, torch.uint8)
            case "add_bf16":
                return self.state(0).to(torch.bfloat16).view(torch.uint8), self.x(1), self.weight
            case "topk_chunks":
                return self.x(1), *self.empty_wire(), fmt.block, fmt.k, fmt.bits
            case "topk_add":
                return *self.wire(0), self.x(1), self.weight, fmt.block, fmt.k, fmt.bits
            case "encode":
                return self.x(1), self.empty_wire(), fmt, noise
            case "decode_add":
                return self.wire(0), self.x(1), self.weight, fmt
            case "encode_difference":
                return self.state(2), self.x(1), self.empty_wire(), fmt, noise
            case "encode_feedback":
                return self.x(1), self.state(2), 0.9, self.empty_wire(), fmt, noise
            case "choco_encode":
                return self.x(1), self.state(2), self.state(3), self.weight, self.empty_wire(), fmt, noise
            case "choco_mix":
                return self.x(1), self.state(2), self.state(3), 0.25, self.wires(), self.weights(), fmt
            case "mix":
                return self.x(1), self.weight, self.wires(), self.weights(), fmt
            case "accum_adam" | "gossip_adam" | "choco_gossip_adam":
                return self.fused([n])
            case "outer_step":
                return self.x(1), self.state(2), self.state(3), self.state(4), self.state(5), 0.7, 0.9
            case "sum_of_squares":
                return [self.x(1)], self.zeros(-(-n // SUM_TILE), torch.float64)
            case "scale":
                return [self.x(1)], self.factor()
            case "checksum":
                return self.state(1, -(-n // 4)).view(torch.uint8)[:n], 6, 12345, self.zeros(1, torch.int64)
            case "flag_non_finite":
                return self.x(1), self.zeros(1, torch.uint8)
            case "put_identity":
                return self.x(1), self.zeros(32 + 4 * n, torch.uint8), 32, 5
            case op:
                raise ValueError(f"there is no case for the operation {op}")


def in_parts(case: Case, arguments: tuple[Any, ...], ops: ModuleType) -> Callable[[], None] | None:
    """The parts of a fused operation, one after another on the same tensors; None where the operation has no parts."""
    if case.op == "gossip_adam":
        pieces, adam, grad_scale, self_weight, wires, weights, out, fmt, noise = arguments
        public, gamma = [None] * len(pieces), 0.0
    elif case.op == "choco_gossip_adam":
        pieces, public, adam, grad_scale, gamma, self_weight, wires, weights, out, fmt, noise = arguments
    else:
        return None
    split = [zones(wire, fmt, [p.x.numel() for p in pieces]) for wire in (out, *wires)]

    def run() -> None:
        for i, (p, q) in enumerate(zip(pieces, public, strict=True)):
            arrived = [wire[i] for wire in split[1:]]
            if q is None:
                ops.mix(p.x, self_weight, arrived, weights, fmt)
                ops.accum_adam([p], adam, grad_scale)
                ops.encode(p.x, split[0][i], fmt, noise)
            else:
                ops.choco_mix(p.x, q.xhat, q.s, gamma, arrived, weights, fmt)
                ops.accum_adam([p], adam, grad_scale)
                ops.choco_encode(p.x, q.xhat, q.s, self_weight, split[0][i], fmt, noise)

    return run

"""What do the tests of a kernel backend feed it, and how do they compare it with the specification?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dtrain.kernels import Adam, Coded, Format, Noise, Piece, Public, reference

GUARD = 64
"""Bytes before and behind an output that must stay as they were."""
NOISES = (None, Noise(seed=0x9E3779B9, first=(1 << 33) - 7))
"""Nearest; and at random, where the upper half of the elements' index changes within the first block."""
FORMATS = (
    Format("identity"),
    Format("bf16"),
    *(Format(kind, 64) for kind in ("int8", "int4", "e3m0", "lut4", "sign")),
    Format("topk", 256, 16, 2),
    Format("topk", 256, 16, 8),
)


def values(numel: int, seed: int = 0) -> Tensor:
    """fp32 over many binades, with signed zeros, ties of a quantizer and an all-zero stretch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + numel)
    x = torch.randn(numel, generator=generator) * torch.exp2(torch.randint(-6, 6, (numel,), generator=generator).float())
    x[::7] = torch.randint(-14, 15, x[::7].shape, generator=generator).float() / 2
    x[1::97] = -0.0
    x[numel // 2 : numel // 2 + 130] = 0.0
    return x


def extremes(numel: int, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Inputs at the ends of fp32."""
    generator = torch.Generator().manual_seed(seed + numel)
    x = values(numel, seed)
    yield "zeros", torch.zeros(numel)
    yield "negative zeros", -torch.zeros(numel)
    yield "denormals", torch.randint(-1 << 22, 1 << 22, (numel,), generator=generator).float() * 2.0**-149
    yield "small", x * 2.0**-126
    yield "large", x.sign() * (x.abs() + 1).clamp(max=64.0) * 2.0**121
    for name, value in (("inf", torch.inf), ("-inf", -torch.inf), ("nan", torch.nan)):
        bad = x.clone()
        bad[numel // 3] = value
        yield name, bad


def guarded(content: Tensor, offset: int = 0) -> tuple[Tensor, Callable[[], bool]]:
    """A copy of a tensor in the middle of a buffer, at any byte; and whether what surrounds it is untouched."""
    num_bytes = content.numel() * content.element_size()
    buffer = torch.full((2 * GUARD + num_bytes + offset,), 0xA5, dtype=torch.uint8)
    # A view of another dtype must start at a multiple of its size within its storage, so the storage starts at the offset.
    inner = torch.frombuffer(buffer.numpy(), dtype=content.dtype, count=content.numel(), offset=GUARD + offset)
    inner.copy_(content)
    return inner, lambda: bool((buffer[: GUARD + offset] == 0xA5).all() and (buffer[GUARD + offset + num_bytes :] == 0xA5).all())


def bits(t: Tensor) -> Tensor:
    """Integers that are equal where floats are, signs of zeros included; every NaN is the same."""
    if not t.is_floating_point():
        return t
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(kind)


def wire_zones(numel: int, fmt: Format) -> Coded:
    """Zones whose every byte is wrong until written."""
    return Coded(
        torch.full((fmt.code_bytes(numel),), 0xA5, dtype=torch.uint8), torch.full((fmt.num_scales(numel),), 123.0).bfloat16()
    )


def sent_wire(x: Tensor, fmt: Format, noise: Noise | None = None) -> Coded:
    wire = wire_zones(x.numel(), fmt)
    reference.encode(x, wire, fmt, noise)
    return wire


def body(x: list[Tensor], fmt: Format) -> Tensor:
    """A whole wire of several pieces."""
    parts = [sent_wire(p, fmt) for p in x]
    return torch.cat([*(c.scales.view(torch.uint8) for c in parts), *(c.codes for c in parts)])


def blank_body(numels: list[int], fmt: Format) -> Tensor:
    return torch.full((sum(2 * fmt.num_scales(n) + fmt.code_bytes(n) for n in numels),), 0xA5, dtype=torch.uint8)


def check(name: str, backend: ModuleType, args: tuple[object, ...], offset: int = 0, what: str = "") -> None:
    """Run one operation on two copies of its operands, by the backend and by the reference, and compare every operand."""
    inside: list[Callable[[], bool]] = []

    def copy(value: object, guard: bool) -> object:
        if isinstance(value, Tensor):
            if not guard or value.numel() == 0:
                return value.clone()
            inner, untouched = guarded(value, offset)
            inside.append(untouched)
            return inner
        if isinstance(value, (Coded, Piece, Public)):
            return type(value)(*(copy(v, guard) for v in value))  # type: ignore[arg-type]
        if isinstance(value, list):
            return [copy(v, guard) for v in value]
        return value

    mine, theirs = copy(list(args), True), copy(list(args), False)
    getattr(backend, name)(*mine)  # type: ignore[misc]
    with rounded_roots():
        getattr(reference, name)(*theirs)  # type: ignore[misc]
    fmt = next((v for v in args if isinstance(v, Format)), None)
    cast = {"identity": torch.float32, "bf16": torch.bfloat16}.get(fmt.kind if fmt else "")
    for i, (a, b) in enumerate(zip(tensors(mine), tensors(theirs), strict=True)):
        if cast and a.dtype == torch.uint8:
            a, b = a.view(cast), b.view(cast)  # torch's own NaN depends on where in a vector it stood
        if not torch.equal(bits(a), bits(b)):
            wrong = (bits(a) != bits(b)).nonzero().flatten()
            raise AssertionError(
                f"{name} {what}: tensor {i}, {a.numel()} of {a.dtype}, differs in {wrong.numel()} places, first "
                f"at {int(wrong[0])}: "
                f"{a[wrong[0]].item()} is not {b[wrong[0]].item()}"
            )
    assert all(untouched() for untouched in inside), f"{name} {what} wrote outside of its operands"


@contextmanager
def rounded_roots() -> Iterator[None]:
    """torch takes roots from MKL where it has it, whose last bit may be wrong (0.5 ulp is exceeded for 1 in 10 numbers); the
    specification says one rounding an operation."""

    def sqrt(t: Tensor) -> Tensor:
        return torch.from_numpy(np.sqrt(t.numpy()))

    with mock.patch.object(Tensor, "sqrt", sqrt), mock.patch.object(Tensor, "sqrt_", lambda t: t.copy_(sqrt(t))):
        yield


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from tensors(v)


def adam_numbers(every: int, closes: bool) -> Adam:
    return Adam(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, power1=0.9**3, power2=0.95**3, every=every, closes=closes)


def piece(numel: int, half: bool, every: int, seed: int = 0) -> Piece:
    kind = torch.bfloat16 if half else torch.float32
    a = values(numel, seed + 4) * 0.01 if every > 1 else torch.empty(0)
    x, g, m, v = (values(numel, seed + i) for i in range(4))
    return Piece(x.to(kind), g.to(kind), m * 0.1, v.square() * 0.01, a, 0.1)


def codec_operands(x: Tensor, fmt: Format, noise: Noise | None) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Each operation of any format, on one tensor (fp32 or bf16)."""
    n = x.numel()
    out, b, c = wire_zones(n, fmt), values(n, 1), values(n, 2)
    yield "encode", (x, out, fmt, noise)
    yield "encode_difference", (x, b.to(x.dtype), out, fmt, noise)
    yield "encode_feedback", (x, b, 0.95, out, fmt, noise)
    yield "choco_encode", (x, b, c, 0.4, out, fmt, noise)
    if noise is None:
        wires, weights = [sent_wire(values(n, 3 + j), fmt) for j in range(3)], [0.3, 1 / 3, -0.1]
        yield "decode_add", (wires[0], b, 1 / 3, fmt)
        yield "mix", (x, 0.7, wires[:1], weights[:1], fmt)
        yield "mix", (x, 0.7, wires, weights, fmt)
        yield "choco_mix", (x, b, c, 0.6, wires[:2], weights[:2], fmt)


def step_operands(
    numels: list[int], half: bool, fmt: Format, noise: Noise | None, adam: Adam
) -> Iterator[tuple[str, tuple[object, ...]]]:
    pieces = [piece(n, half, adam.every, i) for i, n in enumerate(numels)]
    public = [Public(values(n, 11 + i), values(n, 21 + i)) for i, n in enumerate(numels)]
    wires = [body([values(n, 31 + i + 5 * j) for i, n in enumerate(numels)], fmt) for j in range(2)]
    out, grad_scale = blank_body(numels, fmt), torch.tensor([0.37])
    yield "accum_adam", (pieces, adam, grad_scale)
    yield "gossip_adam", (pieces, adam, grad_scale, 0.5, wires, [0.3, 0.2], out, fmt, noise)
    yield "choco_gossip_adam", (pieces, public, adam, grad_scale, 0.7, 0.4, wires, [0.3, 0.2], out, fmt, noise)


def plain_operands(n: int, half: bool) -> Iterator[tuple[str, tuple[object, ...]]]:
    kind = torch.bfloat16 if half else torch.float32
    x, sent = values(n).to(kind), values(n, 1).to(kind)
    sent[: n // 2] = x[: n // 2]
    yield "outer_step", (x, sent, values(n, 2), values(n, 3), values(n, 4), 0.7, 0.9)
    yield "scale", ([x, values(n, 2)], torch.tensor([0.123]))
    yield "checksum", (x.view(torch.uint8), 0xFFFFFFF0, 12345, torch.zeros(1, dtype=torch.int64))
    yield "checksum", (values(n).view(torch.uint8)[: 4 * n - 1], 6, 0, torch.zeros(1, dtype=torch.int64))
    for _, extreme in extremes(n):
        yield "flag_non_finite", (extreme.to(kind), torch.full((1,), 7, dtype=torch.uint8))
        yield "put_identity", (extreme.to(kind), torch.full((4 * n + 40,), 7, dtype=torch.uint8), 32, 5)

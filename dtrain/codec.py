"""How is a bucket encoded on the wire, and how is it read back?

A codec is bound to a layout once: sizes and blocks are fixed then. Blocks never cross a parameter. A wire is
[scales][codes], without a header: both sides know its length from the layout. Non-finite input is refused by the
encoder, a non-finite scale by the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dtrain import codec_name, spans
from dtrain.bucket import Layout
from dtrain.errors import NonFinite, WireError
from dtrain.kernels import operations

State = dict[str, Tensor]


class BoundCodec(Protocol):
    @property
    def wire_bytes(self) -> int: ...

    def init(self, device: torch.device) -> State:
        """Residuals; {} when stateless."""
        ...

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        """fp32 x -> wire (uint8, wire_bytes)."""
        ...

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        """y += weight * decode(wire)."""
        ...


class Codec(Protocol):
    @property
    def grain(self) -> int:
        """Elements; a bucket may be cut at multiples of it within a parameter."""
        ...

    def bind(self, layout: Layout) -> BoundCodec: ...


@dataclass(frozen=True, slots=True)
class Identity:
    """fp32 as it is."""

    grain: int = 1

    def bind(self, layout: Layout) -> BoundCodec:
        return _BoundCast(4 * layout.numel, torch.float32)


@dataclass(frozen=True, slots=True)
class Bf16:
    """Half the bytes: bf16, round to nearest even."""

    grain: int = 1

    def bind(self, layout: Layout) -> BoundCodec:
        return _BoundCast(2 * layout.numel, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _BoundCast:
    wire_bytes: int
    dtype: torch.dtype

    def init(self, device: torch.device) -> State:
        return {}

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        with spans.span("encode", 4 * x.numel() + wire.numel()):
            if self.dtype == torch.bfloat16:
                operations().cast_bf16(x, wire)
            else:
                wire.view(self.dtype).copy_(x)
            # After the cast: fp32 above 3.39e38 becomes inf in bf16.
            if not torch.isfinite(wire.view(self.dtype)).all():
                raise NonFinite("the payload holds inf or NaN")

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        with spans.span("decode", wire.numel() + 8 * y.numel()):
            _check_length(wire, self.wire_bytes)
            if self.dtype == torch.bfloat16:
                operations().add_bf16(wire, y, weight)
            else:
                y.add_(wire.view(self.dtype), alpha=weight)


@dataclass(frozen=True, slots=True)
class Blocks:
    """int8 or int4 codes with one bf16 scale a block: 8 or 4 bits + 16 / block bits an element."""

    bits: int
    grain: int = 64

    def bind(self, layout: Layout) -> BoundCodec:
        """Runs of parameters that fill whole blocks are coded in one call."""
        runs: list[tuple[int, int]] = []
        open_run = False
        for span in layout.spans:
            if open_run:
                runs[-1] = (runs[-1][0], span.stop)
            else:
                runs.append((span.start, span.stop))
            open_run = span.numel % self.grain == 0
        num_blocks = sum(-(-(b - a) // self.grain) for a, b in runs)
        num_code_bytes = sum(_code_bytes(b - a, self.bits) for a, b in runs)
        return _BoundBlocks(2 * num_blocks + num_code_bytes, self.bits, self.grain, tuple(runs), num_blocks)


def _code_bytes(numel: int, bits: int) -> int:
    return -(-numel * bits // 8)


@dataclass(frozen=True, slots=True)
class _BoundBlocks:
    wire_bytes: int
    bits: int
    block: int
    runs: tuple[tuple[int, int], ...]
    num_blocks: int

    def init(self, device: torch.device) -> State:
        return {}

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        with spans.span("encode", 4 * x.numel() + wire.numel()):
            ops = operations()
            quantize = ops.quantize_int8 if self.bits == 8 else ops.quantize_int4
            scales, codes = self._split(wire)
            at_scale = at_code = 0
            for a, b in self.runs:
                num_scales, num_bytes = -(-(b - a) // self.block), _code_bytes(b - a, self.bits)
                quantize(x[a:b], codes[at_code : at_code + num_bytes], scales[at_scale : at_scale + num_scales], self.block)
                at_scale, at_code = at_scale + num_scales, at_code + num_bytes
            if not torch.isfinite(scales).all():
                raise NonFinite("the payload holds inf or NaN")

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        with spans.span("decode", wire.numel() + 8 * y.numel()):
            _check_length(wire, self.wire_bytes)
            scales, codes = self._split(wire)
            if not torch.isfinite(scales).all():
                raise WireError("a block's scale on the wire is inf or NaN")
            ops = operations()
            dequantize_add = ops.dequantize_add_int8 if self.bits == 8 else ops.dequantize_add_int4
            at_scale = at_code = 0
            for a, b in self.runs:
                num_scales, num_bytes = -(-(b - a) // self.block), _code_bytes(b - a, self.bits)
                part = codes[at_code : at_code + num_bytes]
                dequantize_add(part, scales[at_scale : at_scale + num_scales], y[a:b], weight, self.block)
                at_scale, at_code = at_scale + num_scales, at_code + num_bytes

    def _split(self, wire: Tensor) -> tuple[Tensor, Tensor]:
        end = 2 * self.num_blocks
        return wire[:end].view(torch.bfloat16), wire[end:]


def _check_length(wire: Tensor, expected: int) -> None:
    if wire.numel() != expected:
        raise WireError(f"a wire of {wire.numel()} bytes, {expected} were agreed")


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What the inner codec lost stays in a residual and goes out with the next round: sum sent + residual = sum of
    inputs.

    e <- e + x;  wire = C(e);  e <- e - decode(wire)          (Seide et al. 2014; Karimireddy et al., arXiv
    1901.09847)"""

    inner: Codec

    @property
    def grain(self) -> int:
        return self.inner.grain

    def bind(self, layout: Layout) -> BoundCodec:
        return _BoundErrorFeedback(self.inner.bind(layout), layout.numel)


class _BoundErrorFeedback:
    def __init__(self, inner: BoundCodec, numel: int) -> None:
        self.inner = inner
        self.numel = numel
        self.wire_bytes = inner.wire_bytes

    def init(self, device: torch.device) -> State:
        return {"residual": torch.zeros(self.numel, device=device)}

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        with spans.span("encode", 12 * x.numel() + wire.numel()):
            residual = state["residual"]
            residual.add_(x)
            self.inner.encode(residual, wire, {})
            self.inner.decode_add(wire, residual, weight=-1.0)

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        self.inner.decode_add(wire, y, weight=weight)


def by_name(name: str, *, error_feedback: bool) -> Codec:
    """``"identity"``, ``"bf16"``, ``"int8"``, ``"int4:32"`` -> Codec; raises ValueError for anything else."""
    base, block = codec_name.parse(name)
    codec: Codec
    match base:
        case "int8" | "int4":
            codec = Blocks(int(base[3:]), block)
        case "bf16":
            codec = Bf16()
        case _:
            codec = Identity()
    return ErrorFeedback(codec) if error_feedback else codec

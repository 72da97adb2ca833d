"""How is a bucket encoded on the wire, and how is it read back?

A codec is bound to a layout once: sizes and blocks are fixed then. Blocks never cross a parameter. A wire that arrives is
checked whole (``check``) before any of it is used; the other methods take wires that were, or one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dtrain import codec_name
from dtrain.bucket import Layout
from dtrain.codebook import Codebook
from dtrain.dct import Dct
from dtrain.kernels import Adam, Format, Noise, Piece, Public, prepare
from dtrain.own_name import is_own
from dtrain.spans import moving, span
from dtrain.wire import wire_format

State = dict[str, Tensor]

_NODE_STRIDE = 0x9E3779B1
"""Odd, so that no two islands draw the same random bits in the same round."""


class BoundCodec(Protocol):
    @property
    def wire_bytes(self) -> int: ...

    def init(self, device: torch.device) -> State:
        """Residuals and counters; {} when stateless."""
        ...

    def new_wire(self, device: torch.device) -> Tensor: ...

    def fresh_wire(self, device: torch.device) -> Tensor:
        """``new_wire`` for one round: nothing is kept of it, nor for it."""
        ...

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        """x -> wire (uint8, wire_bytes). On a CPU inf or NaN raise NonFinite here, on a GPU where the bytes are taken."""
        ...

    def check(self, wire: Tensor) -> None:
        """Raises WireError where a wire that arrived (host memory) is not what was agreed."""
        ...

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        """y += weight * decode(wire), for fp32 y."""
        ...

    def mix(self, x: Tensor, wires: Sequence[Tensor], weights: Sequence[float]) -> None:
        """x += sum_j weights_j decode(wires_j), in one pass."""
        ...


class Update(NamedTuple):
    """One AccumAdamW step of one bucket, to be done on the way from one round to the next."""

    pieces: Sequence[Piece]
    adam: Adam
    grad_scale: Tensor


class Codec(Protocol):
    @property
    def grain(self) -> int:
        """Elements; a bucket may be cut at multiples of it within a parameter."""
        ...

    def bind(self, layout: Layout, node: int = 0) -> BoundCodec:
        """``node`` seeds random rounding."""
        ...


class BoundPlain(BoundCodec, Protocol):
    def encode_feedback(self, x: Tensor, residual: Tensor, decay: float, wire: Tensor, state: State) -> None:
        """residual <- decay residual + x;  wire = C(residual);  residual -= decode(wire)."""
        ...


class Plain(Protocol):
    """A codec without error feedback, which can be had with it."""

    @property
    def grain(self) -> int: ...

    def bind(self, layout: Layout, node: int = 0) -> BoundPlain: ...


@dataclass(frozen=True, slots=True)
class Blocks:
    """The formats of ``kernels/WIRE.md``, by the kernels."""

    fmt: Format
    stochastic: bool = False

    @property
    def grain(self) -> int:
        return self.fmt.block

    def bind(self, layout: Layout, node: int = 0) -> BoundBlocks:
        return BoundBlocks(self.fmt, layout, node, stochastic=self.stochastic)


class BoundBlocks:
    """Runs of parameters that fill whole blocks are coded in one call."""

    def __init__(self, fmt: Format, layout: Layout, node: int, *, stochastic: bool) -> None:
        self.fmt, self.stochastic = fmt, stochastic
        self._runs = layout.runs(fmt.block)
        self._starts = tuple(a for a, _ in self._runs)
        self._first = layout.spans[0].global_offset if layout.spans else 0
        self._seed = node * _NODE_STRIDE
        self._spans = tuple((s.start, s.stop) for s in layout.spans)
        self._numel = layout.numel
        self._wire = wire_format(fmt, tuple(b - a for a, b in self._runs))
        self.wire_bytes = self._wire.wire_bytes
        self.fuses = fmt.kind != "topk"
        """Whether ``gossip_adam`` and its CHOCO form write this format."""

    def init(self, device: torch.device) -> State:
        return {"draws": torch.zeros(1, dtype=torch.int64)} if self.stochastic else {}

    def new_wire(self, device: torch.device) -> Tensor:
        return self._wire.new(device)

    def fresh_wire(self, device: torch.device) -> Tensor:
        return self._wire.fresh(device)

    def check(self, wire: Tensor) -> None:
        self._wire.check(wire)

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        with moving("encode", x, wire):
            if self.fmt.kind == "identity":
                self._wire.put(x, wire)
                return
            ops, noise = self._wire.operations(wire), self._draw(state)
            for a, run, part in zip(self._starts, self._cut(x), self._wire.parts(wire), strict=True):
                ops.encode(run, part, self.fmt, _moved(noise, a))
            self._wire.seal_finite(wire)

    def encode_feedback(self, x: Tensor, residual: Tensor, decay: float, wire: Tensor, state: State) -> None:
        """residual <- decay residual + x;  wire = C(residual);  residual -= decode(wire)."""
        with moving("encode", x, residual, residual, wire):
            ops, noise = self._wire.operations(wire), self._draw(state)
            for (a, b), part in zip(self._runs, self._wire.parts(wire), strict=True):
                ops.encode_feedback(x[a:b], residual[a:b], decay, part, self.fmt, _moved(noise, a))
            self._wire.seal_finite(wire)

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        with moving("decode", wire, y, y):
            ops = self._wire.operations(wire)
            for (a, b), part in zip(self._runs, self._wire.parts(wire), strict=True):
                ops.decode_add(part, y[a:b], weight, self.fmt)

    def mix(self, x: Tensor, wires: Sequence[Tensor], weights: Sequence[float]) -> None:
        with moving("decode", x, x, *wires):
            ops, parts = self._wire.operations(x), [self._wire.parts(wire) for wire in wires]
            for i, run in enumerate(self._cut(x)):
                ops.mix(run, 1.0, [part[i] for part in parts], weights, self.fmt)

    def choco_encode(self, x: Tensor, xhat: Tensor, s: Tensor, self_weight: float, wire: Tensor, state: State) -> None:
        """wire = C(x - xhat);  xhat += decode(wire);  s += self_weight decode(wire)."""
        with moving("encode", x, xhat, xhat, s, s, wire):
            ops, noise = self._wire.operations(wire), self._draw(state)
            for (a, b), part in zip(self._runs, self._wire.parts(wire), strict=True):
                ops.choco_encode(x[a:b], xhat[a:b], s[a:b], self_weight, part, self.fmt, _moved(noise, a))
            self._wire.seal_finite(wire)

    def choco_mix(
        self, x: Tensor, xhat: Tensor, s: Tensor, gamma: float, wires: Sequence[Tensor], weights: Sequence[float]
    ) -> None:
        """s += sum_j weights_j decode(wires_j);  x += gamma (s - xhat)."""
        with moving("decode", x, x, xhat, s, s, *wires):
            ops, parts = self._wire.operations(x), [self._wire.parts(wire) for wire in wires]
            for i, (a, b) in enumerate(self._runs):
                ops.choco_mix(x[a:b], xhat[a:b], s[a:b], gamma, [part[i] for part in parts], weights, self.fmt)

    def adam(self, update: Update) -> None:
        """The optimizer's step alone."""
        with span("optimizer", adam_bytes(update.pieces)):
            self._wire.operations(update.grad_scale).accum_adam(*update)

    def gossip_adam(
        self, update: Update, wires: Sequence[Tensor], weights: Sequence[float], wire: Tensor, state: State
    ) -> None:
        """``mix``, the optimizer's step, and ``encode``, in one pass over the parameters."""
        with span("gossip_adam", adam_bytes(update.pieces) + (len(wires) + 1) * self.wire_bytes):
            bodies = [self._wire.body(w) for w in wires]
            self._wire.operations(wire).gossip_adam(
                *(update.pieces, update.adam, update.grad_scale, 1.0, bodies, weights),
                *(self._wire.body(wire), self.fmt, self._draw(state)),
            )
            self._wire.seal_finite(wire)

    def choco_gossip_adam(
        self, update: Update, xhat: Tensor, s: Tensor, gamma: float, self_weight: float,
        wires: Sequence[Tensor], weights: Sequence[float], wire: Tensor, state: State,
    ) -> None:  # fmt: skip
        """``choco_mix``, the optimizer's step, and ``choco_encode``, in one pass."""
        with span("gossip_adam", adam_bytes(update.pieces) + 16 * self._numel + (len(wires) + 1) * self.wire_bytes):
            bodies = [self._wire.body(w) for w in wires]
            public = [Public(xhat[a:b], s[a:b]) for a, b in self._spans]
            self._wire.operations(wire).choco_gossip_adam(
                *(update.pieces, public, update.adam, update.grad_scale, gamma, self_weight, bodies, weights),
                *(self._wire.body(wire), self.fmt, self._draw(state)),
            )
            self._wire.seal_finite(wire)

    def _cut(self, x: Tensor) -> Sequence[Tensor]:
        """The runs of a tensor that is as long as the bucket; a view takes 2 us, so a single run is the tensor itself."""
        return (x,) if len(self._runs) == 1 else [x[a:b] for a, b in self._runs]

    def _draw(self, state: State) -> Noise | None:
        """New random bits at each encoding; the count lies in State, so that a resumed run draws the same."""
        if not self.stochastic:
            return None
        state["draws"] += 1
        return Noise((self._seed + int(state["draws"])) % 2**32, self._first)


def adam_bytes(pieces: Sequence[Piece]) -> int:
    """What an optimizer's step must move: x, m, v (and the accumulator) are read and written, the gradient is read."""
    return sum(p.x.numel() * (2 * p.x.element_size() + p.g.element_size() + 16) + 8 * p.a.numel() for p in pieces)


def _moved(noise: Noise | None, elements: int) -> Noise | None:
    return None if noise is None else Noise(noise.seed, noise.first + elements)


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What the inner codec lost stays in a residual and goes out with later rounds.

    e <- beta e + x;  wire = C(e);  e <- e - decode(wire)          (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847)

    With beta = 1 nothing is ever lost: sum sent + e = sum of inputs. With less (arXiv 2508.15706) each round forgets 1 - beta of
    what waits, which is of older parameters the longer it does: sum sent + e = sum of inputs - (1 - beta) sum of the e before."""

    inner: Plain
    decay: float = 1.0
    """beta, more than 0 and at most 1."""

    @property
    def grain(self) -> int:
        return self.inner.grain

    def bind(self, layout: Layout, node: int = 0) -> BoundCodec:
        return _BoundErrorFeedback(self.inner.bind(layout, node), layout.numel, self.decay)


class _BoundErrorFeedback:
    def __init__(self, inner: BoundPlain, numel: int, decay: float) -> None:
        self._inner, self._numel, self._decay = inner, numel, decay
        self.wire_bytes = inner.wire_bytes
        self.new_wire, self.fresh_wire, self.check = inner.new_wire, inner.fresh_wire, inner.check
        self.decode_add, self.mix = inner.decode_add, inner.mix

    def init(self, device: torch.device) -> State:
        return {"residual": torch.zeros(self._numel, device=device)} | self._inner.init(device)

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        self._inner.encode_feedback(x, state["residual"], self._decay, wire, state)


def prepare_kernels(name: str, device: torch.device, say: Callable[[], None]) -> None:
    """So that no round waits for them: ``dtrain.kernels.prepare`` for a codec, and for the exact merge."""
    by_kernels = not is_own(name) and codec_name.parse(name).base not in codec_name.TORCH
    prepare(device, [*([plain(name).fmt.kind] if by_kernels else []), "identity"], say)


def by_name(name: str, *, error_feedback: bool, feedback_decay: float = 1.0) -> Codec:
    """``"identity"``, ``"int4:32"``, ``"topk:64/4096:2"`` -> Codec; raises ValueError for anything else."""
    parsed = codec_name.parse(name)
    match parsed.base:
        case "codebook8":
            codec = Codebook(parsed.block)
        case "dct":
            codec = Dct(parsed.k, parsed.block)
        case _:
            codec = plain(name)
    return ErrorFeedback(codec, feedback_decay) if error_feedback else codec


def plain(name: str) -> Blocks:
    """A codec of the kernels, without error feedback."""
    parsed = codec_name.parse(name)
    kind = parsed.base
    assert kind in ("identity", "bf16", "int8", "int4", "e3m0", "lut4", "sign", "topk"), kind
    return Blocks(Format(kind, parsed.block, parsed.k, parsed.bits), parsed.stochastic)

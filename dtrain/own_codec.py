"""How does a researcher's own codec get in? As an object in a file of theirs: ``sync.codec = "mine.py:name"``.

It codes one flat vector of any length, on whatever device that is, as ``OwnCodec`` says. Every bucket of every island codes by a
copy of the object, by one thread at a time, so it may keep room to work in. Headers, checksums, error feedback and
mixing come from here, in plain torch; what the object must keep is tried when it is loaded."""

from __future__ import annotations

import copy
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dtrain import codec as codecs
from dtrain.bucket import Layout
from dtrain.codec import BoundPlain, Codec, ErrorFeedback, State
from dtrain.errors import NonFinite, WireError
from dtrain.own import digest, load_named
from dtrain.own_name import is_own
from dtrain.spans import span
from dtrain.wire import HEADER_BYTES, own_header

TRIED = (1, 1000, 4097)
"""Lengths with which an own codec is tried."""
LARGE = 1e6
"""Standard deviation of the largest values that it is tried with: more than fp16 holds, and less than a loss survives."""


@runtime_checkable
class OwnCodec(Protocol):
    def wire_bytes(self, numel: int) -> int:
        """Bytes of the code of ``numel`` elements, at least one, whatever they are."""
        ...

    def encode(self, x: Tensor, out: Tensor) -> None:
        """Fill ``out`` (uint8, wire_bytes(numel)) with the code of ``x`` (fp32, numel), always the same; leave x alone."""
        ...

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Fill ``out`` (fp32, numel) with what ``wire`` stands for, all finite, and leave the wire alone."""
        ...


def codec_of(name: str, *, error_feedback: bool, feedback_decay: float = 1.0) -> Codec:
    """A codec of the project's, or one's own that ``check_codec`` has let pass."""
    if not is_own(name):
        return codecs.by_name(name, error_feedback=error_feedback, feedback_decay=feedback_decay)
    own = Own(_load(name), zlib.crc32(f"{digest(name)}:{name.rpartition(':')[2]}".encode()))
    return ErrorFeedback(own, feedback_decay) if error_feedback else own


def check_codec(name: str) -> None:
    """Raises ValueError where there is no such codec, or it breaks what ``OwnCodec`` says."""
    try:
        codec = copy.deepcopy(_load(name))
    except (TypeError, copy.Error) as e:
        raise ValueError(f"sync.codec = {name!r} cannot be copied for each bucket: {e}; keep what cannot outside of it") from e
    for numel in TRIED:
        for reason, broken in _breaks(codec, numel):
            if broken:
                raise ValueError(f"sync.codec = {name!r}: with {numel} elements {reason}")


def _breaks(codec: OwnCodec, numel: int) -> list[tuple[str, bool]]:
    size = codec.wire_bytes(numel)
    if not isinstance(size, int) or size < 1:
        return [(f"wire_bytes is {size!r}; return a whole number from 1", True)]
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    scales = (("", 1.0), ("zeros: ", 0.0), (f"values of {LARGE:g}: ", LARGE))
    return [found for word, scale in scales for found in _breaks_with(codec, scale * x, size, word)]


def _breaks_with(codec: OwnCodec, x: Tensor, size: int, word: str) -> list[tuple[str, bool]]:
    before, zeros, ones = x.clone(), torch.zeros(size, dtype=torch.uint8), torch.full((size,), 255, dtype=torch.uint8)
    codec.encode(x, zeros)
    codec.encode(x, ones)
    out, kept = torch.full_like(x, float("nan")), zeros.clone()
    chance = bool((zeros != ones).any())
    codec.decode(zeros, out)
    found = [
        ("encode changes x; work on a copy", not torch.equal(x, before)),
        ("encode leaves bytes of out as they were, or writes others the second time; fill all, without chance", chance),
        ("decode changes the wire; work on a copy", not torch.equal(zeros, kept)),
        ("decode leaves elements of out as they were, or not finite; fill all of it", not bool(torch.isfinite(out).all())),
    ]
    return [(word + reason, broken) for reason, broken in found]


def _load(name: str) -> OwnCodec:
    path, word, found = load_named(name, "codec")
    if isinstance(found, type) or not isinstance(found, OwnCodec):
        raise ValueError(
            f"sync.codec = {name!r}: {path.name} has no codec {word}; define {word} there, an object with wire_bytes, encode "
            "and decode (dtrain.own_codec.OwnCodec)"
        )
    return found


@dataclass(frozen=True, slots=True)
class Own:
    """An own codec, ready to be bound."""

    codec: OwnCodec
    number: int

    @property
    def grain(self) -> int:
        return 1

    def bind(self, layout: Layout, node: int = 0) -> BoundPlain:
        return _BoundOwn(copy.deepcopy(self.codec), own_header(self.number, layout.numel), layout.numel)


class _BoundOwn:
    def __init__(self, codec: OwnCodec, header: bytes, numel: int) -> None:
        self._codec, self._header, self._numel = codec, header, numel
        self._one_at_a_time = threading.Lock()  # a wire is checked while the next payload is encoded
        self.wire_bytes = HEADER_BYTES + (codec.wire_bytes(numel) if numel else 0)

    def init(self, device: torch.device) -> State:
        return {}

    def new_wire(self, device: torch.device) -> Tensor:
        wire = torch.zeros(self.wire_bytes, dtype=torch.uint8)
        wire[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        return wire.to(device)

    def encode(self, x: Tensor, wire: Tensor, state: State) -> None:
        self._encoded(x, wire)

    def _encoded(self, x: Tensor, wire: Tensor) -> Tensor:
        """Encode, and what the wire now stands for: inf or NaN in a wire would be in everybody's parameters a step later."""
        with span("encode", (x.element_size() + 4) * x.numel() + 2 * wire.numel()):
            if not torch.isfinite(x).all():
                raise NonFinite("the payload holds inf or NaN")
            if self._numel:
                with self._one_at_a_time:
                    self._codec.encode(x.float(), wire[HEADER_BYTES:])
            decoded = self._decoded(wire)
            if not torch.isfinite(decoded).all():
                most = float(x.abs().max())
                raise NonFinite(f"an own codec makes inf or NaN of a payload of values up to {most:.3g}; clamp them")
            wire[len(self._header) : HEADER_BYTES] = self._checksum(wire).to(wire.device)
            return decoded

    def encode_feedback(self, x: Tensor, residual: Tensor, decay: float, wire: Tensor, state: State) -> None:
        residual.mul_(decay).add_(x)
        residual.sub_(self._encoded(residual, wire))

    def check(self, wire: Tensor) -> None:
        if wire.numel() != self.wire_bytes:
            raise WireError(f"a wire of {wire.numel()} bytes, {self.wire_bytes} were agreed")
        if bytes(wire[: len(self._header)].tolist()) != self._header:
            raise WireError("a wire whose header is of another codec, or another file of one")
        if not torch.equal(self._checksum(wire), wire[len(self._header) : HEADER_BYTES]):
            raise WireError("a wire whose checksum does not fit its bytes: they changed on the way")
        if not torch.isfinite(self._decoded(wire)).all():
            raise WireError("a wire that an own codec makes inf or NaN of")

    def decode_add(self, wire: Tensor, y: Tensor, *, weight: float) -> None:
        with span("decode", wire.numel() + 8 * y.numel()):
            y.add_(self._decoded(wire), alpha=weight)

    def mix(self, x: Tensor, wires: Sequence[Tensor], weights: Sequence[float]) -> None:
        with span("decode", 2 * x.element_size() * x.numel() + len(wires) * self.wire_bytes):
            moved = torch.zeros(self._numel, device=x.device)
            for wire, weight in zip(wires, weights, strict=True):
                moved.add_(self._decoded(wire), alpha=weight)
            x.add_(moved)

    def _decoded(self, wire: Tensor) -> Tensor:
        out = torch.empty(self._numel, device=wire.device)
        if self._numel:
            with self._one_at_a_time:
                self._codec.decode(wire[HEADER_BYTES:], out)
        return out

    def _checksum(self, wire: Tensor) -> Tensor:
        host = wire.cpu().numpy()
        summed = zlib.crc32(host[HEADER_BYTES:].tobytes(), zlib.crc32(self._header))
        return torch.frombuffer(bytearray(summed.to_bytes(8, "little")), dtype=torch.uint8)

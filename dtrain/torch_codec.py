"""How is a codec that is written in plain torch bound to a bucket? Header, checksum, error feedback and mixing come from here.

It is one for what the kernels do not code: codecs of somebody's own (``own_codec.py``), and the project's that are a few lines
of torch. Their bytes are ``kernels/WIRE.md``'s; a wire is decoded once when it is encoded and once when it is checked."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dtrain.errors import NonFinite, WireError
from dtrain.spans import span
from dtrain.wire import HEADER_BYTES


class Code(Protocol):
    """Of a flat vector of one length."""

    def encode(self, x: Tensor, out: Tensor) -> None:
        """Fill ``out`` (uint8) with the code of ``x`` (fp32)."""
        ...

    def decode(self, wire: Tensor, out: Tensor) -> None:
        """Fill ``out`` (fp32) with what ``wire`` (uint8) stands for; NaN where it is no code, for then it is refused."""
        ...


class BoundTorch:
    """A ``codec.BoundPlain``. ``called``: what an error says codes."""

    def __init__(self, code: Code, header: bytes, numel: int, body_bytes: int, called: str) -> None:
        self._code, self._header, self._numel, self._called = code, header, numel, called
        self._one_at_a_time = threading.Lock()  # a wire is checked while the next payload is encoded
        self.wire_bytes = HEADER_BYTES + body_bytes

    def init(self, device: torch.device) -> dict[str, Tensor]:
        return {}

    def new_wire(self, device: torch.device) -> Tensor:
        wire = torch.zeros(self.wire_bytes, dtype=torch.uint8)
        wire[: len(self._header)] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        return wire.to(device)

    def fresh_wire(self, device: torch.device) -> Tensor:
        return self.new_wire(device)

    def encode(self, x: Tensor, wire: Tensor, state: dict[str, Tensor]) -> None:
        self._encoded(x, wire)

    def _encoded(self, x: Tensor, wire: Tensor) -> Tensor:
        """Encode, and what the wire now stands for: inf or NaN in a wire would be in everybody's parameters a step later."""
        with span("encode", (x.element_size() + 4) * x.numel() + 2 * wire.numel()):
            if x.is_meta:
                return self._decoded(wire)
            if not torch.isfinite(x).all():
                raise NonFinite("the payload holds inf or NaN")
            if self._numel:
                with self._one_at_a_time:
                    self._code.encode(x.float(), wire[HEADER_BYTES:])
            decoded = self._decoded(wire)
            if not torch.isfinite(decoded).all():
                most = float(x.abs().max())
                raise NonFinite(f"{self._called} makes inf or NaN of a payload of values up to {most:.3g}; clamp them")
            wire[len(self._header) : HEADER_BYTES] = self._checksum(wire).to(wire.device)
            return decoded

    def encode_feedback(self, x: Tensor, residual: Tensor, decay: float, wire: Tensor, state: dict[str, Tensor]) -> None:
        residual.mul_(decay).add_(x)
        residual.sub_(self._encoded(residual, wire))

    def check(self, wire: Tensor) -> None:
        if wire.numel() != self.wire_bytes:
            raise WireError(f"a wire of {wire.numel()} bytes, {self.wire_bytes} were agreed")
        if bytes(wire[: len(self._header)].tolist()) != self._header:
            raise WireError("a wire whose header is of another codec, cut or length, or another file of one")
        if not torch.equal(self._checksum(wire), wire[len(self._header) : HEADER_BYTES]):
            raise WireError("a wire whose checksum does not fit its bytes: they changed on the way")
        if not torch.isfinite(self._decoded(wire)).all():
            raise WireError(f"a wire that {self._called} makes inf or NaN of")

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
        if self._numel and not wire.is_meta:
            with self._one_at_a_time:
                self._code.decode(wire[HEADER_BYTES:], out)
        return out

    def _checksum(self, wire: Tensor) -> Tensor:
        host = wire.cpu().numpy()
        summed = zlib.crc32(host[HEADER_BYTES:].tobytes(), zlib.crc32(self._header))
        return torch.frombuffer(bytearray(summed.to_bytes(8, "little")), dtype=torch.uint8)

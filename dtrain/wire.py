"""What stands in front of a wire's bytes, and how does a reader know that they are what was agreed? (``kernels/WIRE.md``)"""

from __future__ import annotations

import struct
import zlib
from functools import cached_property

import torch
from torch import Tensor

from dtrain.errors import NonFinite, WireError
from dtrain.kernels import Coded, Format, operations, zones

HEADER_BYTES = 32
VERSION = 1
_MAGIC = b"dtw"
CODEC_NUMBERS = {"identity": 0, "bf16": 1, "int8": 2, "int4": 3, "e3m0": 4, "lut4": 5, "sign": 6, "topk": 7}
_OWN = 255

_STRUCT = struct.Struct("<3sBBBHHBBIQ")
_FIELDS = ("magic", "version", "codec", "non-finite flag", "block", "k", "bits", "reserved byte", "cut", "number of elements")
_CHECKED = _STRUCT.size  # 24: the checksum covers them, and is behind them
_FLAG = 5
_WORDS = _CHECKED // 4
_CPU = torch.device("cpu")


class WireFormat:
    """The wires of one bucket: what their header says, where the parts of their body lie."""

    def __init__(self, fmt: Format, numels: tuple[int, ...]) -> None:
        """``numels``: elements of each run (WIRE.md)."""
        self.fmt, self.numels = fmt, numels
        self.numel = sum(numels)
        self.num_scales = sum(fmt.num_scales(n) for n in numels)
        self.wire_bytes = HEADER_BYTES + 2 * self.num_scales + sum(fmt.code_bytes(n) for n in numels)
        cut = zlib.crc32(struct.pack(f"<{len(numels)}Q", *numels))
        number = CODEC_NUMBERS[fmt.kind]
        self._header = _STRUCT.pack(_MAGIC, VERSION, number, 0, fmt.block, fmt.k, fmt.bits, 0, cut, self.numel)

    @cached_property
    def _start(self) -> int:
        """The checksum of the header, from which that of a body goes on."""
        out = torch.zeros(1, dtype=torch.int64)
        operations(_CPU).checksum(torch.frombuffer(bytearray(self._header), dtype=torch.uint8), 0, 0, out)
        return int(out)

    def new(self, device: torch.device) -> Tensor:
        """A wire to write into, its header in place; zeros, so that it can be a part of State."""
        wire = torch.zeros(self.wire_bytes, dtype=torch.uint8)
        wire[:_CHECKED] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        return wire.to(device)

    def body(self, wire: Tensor) -> Tensor:
        return wire[HEADER_BYTES:]

    def parts(self, wire: Tensor) -> list[Coded]:
        """The zones of each run."""
        return zones(wire[HEADER_BYTES:], self.fmt, self.numels)

    def seal(self, wire: Tensor) -> None:
        """Note in the header whether the body holds inf or NaN, and its checksum. Nothing waits for a GPU."""
        ops = operations(wire.device)
        ops.flag_non_finite(self._finite(wire), wire[_FLAG : _FLAG + 1])
        ops.checksum(wire[HEADER_BYTES:], _WORDS, self._start, wire[_CHECKED:HEADER_BYTES].view(torch.int64))

    def check(self, wire: Tensor) -> None:
        """Raises WireError, saying which, where a wire that arrived (host memory) differs from what was agreed."""
        if wire.numel() != self.wire_bytes:
            raise WireError(f"a wire of {wire.numel()} bytes, {self.wire_bytes} were agreed")
        header = bytes(wire[:_CHECKED].numpy())
        if header != self._header:
            pairs = zip(_FIELDS, _STRUCT.unpack(header), _STRUCT.unpack(self._header), strict=True)
            name, got, want = next(pair for pair in pairs if pair[1] != pair[2])
            raise WireError(f"a wire whose header says {name} {got!r}, {want!r} was agreed")
        ops, found = operations(_CPU), torch.empty(1, dtype=torch.int64)
        ops.checksum(wire[HEADER_BYTES:], _WORDS, self._start, found)
        if int(found) != int(wire[_CHECKED:HEADER_BYTES].view(torch.int64)):
            raise WireError("a wire whose checksum does not fit its bytes: they changed on the way")
        if self.fmt.kind == "topk" and not self._indices_rise(wire):
            raise WireError("a wire whose top-k indices do not rise within their chunk")
        flag = torch.zeros(1, dtype=torch.uint8)
        ops.flag_non_finite(self._finite(wire), flag)
        if flag:
            raise WireError("a wire with a scale or value that is inf or NaN")

    def _indices_rise(self, wire: Tensor) -> bool:
        """Whether each chunk's indices are different and inside it; else two islands might add equal ones in another order."""
        fmt, ok = self.fmt, True
        for part in self.parts(wire):
            triples = part.codes.view(-1, fmt.k * (12 + fmt.bits) // 8)[:, : fmt.k * 12 // 8].reshape(-1, 3).int()
            first, second = triples[:, 0] | (triples[:, 1] & 15) << 8, triples[:, 1] >> 4 | triples[:, 2] << 4
            index = torch.stack((first, second), 1).view(-1, fmt.k)
            ok = ok and bool((index.diff(dim=1) > 0).all() and (index[:, -1] < fmt.block).all())
        return ok

    def _finite(self, wire: Tensor) -> Tensor:
        """What must be finite: the scales, or where there are none the values."""
        if self.num_scales:
            return wire[HEADER_BYTES : HEADER_BYTES + 2 * self.num_scales].view(torch.bfloat16)
        return wire[HEADER_BYTES:].view(torch.float32 if self.fmt.kind == "identity" else torch.bfloat16)


def own_header(cut: int, numel: int) -> bytes:
    """Of a wire by a codec of somebody's own; ``cut``: 32 bits of which one."""
    return _STRUCT.pack(_MAGIC, VERSION, _OWN, 0, 0, 0, 0, 0, cut, numel)


def same_header(one: Tensor, other: Tensor) -> bool:
    """Whether two wires are of one codec, cut and length. Bytes that are no wire of dtrain's, which a method of one's own may
    keep, are like any others."""
    if bytes(other[:3].tolist()) != _MAGIC:
        return True
    return torch.equal(one[:_CHECKED].cpu(), other[:_CHECKED].cpu())


def refuse_non_finite(wire: Tensor) -> None:
    """Raises NonFinite where a sealed wire says that its payload held inf or NaN: it must not be sent."""
    if wire.numel() > HEADER_BYTES and bytes(wire[:3].tolist()) == _MAGIC and wire[_FLAG]:
        raise NonFinite("the payload holds inf or NaN")

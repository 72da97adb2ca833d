"""What stands in front of a wire's bytes, and how does a reader know that they are what was agreed? (``kernels/WIRE.md``)"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.errors import NonFinite, WireError
from dtrain.kernels import Coded, Format, KeptCoded, operations, zones

HEADER_BYTES = 32
VERSION = 1
_MAGIC = b"dtw"
CODEC_NUMBERS = {
    "identity": 0, "bf16": 1, "int8": 2, "int4": 3, "e3m0": 4, "lut4": 5, "sign": 6, "topk": 7, "codebook8": 8, "dct": 9,
}  # fmt: skip
_OWN = 255

_STRUCT = struct.Struct("<3sBBBHHBBIQ")
_FIELDS = ("magic", "version", "codec", "non-finite flag", "block", "k", "bits", "reserved byte", "cut", "number of elements")
_CHECKED = _STRUCT.size  # 24: the checksum covers them, and is behind them
_FLAG = 5
_WORDS = _CHECKED // 4
_CPU = torch.device("cpu")


class _Making(threading.local):
    """What the WireFormats that this thread makes are like."""

    shared: dict[tuple[Format, tuple[int, ...]], WireFormat] | None = None
    """What stays in the process: one for all wires of a kind, and no checksums."""


_making = _Making()


@contextmanager
def without_checksums() -> Iterator[None]:
    """What ``wire_format`` gives this thread in the block seals without, for good: its wires must be such as nobody checks, as
    they do not leave the process. It is one for all codecs that are alike, so they know each other's wires."""
    kept, _making.shared = _making.shared, {}
    try:
        yield
    finally:
        _making.shared = kept


def wire_format(fmt: Format, numels: tuple[int, ...]) -> WireFormat:
    """``numels``: elements of each run (WIRE.md)."""
    if _making.shared is None:
        return WireFormat(fmt, numels, checksums=True)
    found = _making.shared.get((fmt, numels))
    return found or _making.shared.setdefault((fmt, numels), WireFormat(fmt, numels, checksums=False))


class _Views(NamedTuple):
    """What lies where in one wire."""

    body: Tensor
    parts: list[KeptCoded]
    """The zones of each run."""
    finite: Tensor
    """What must be finite: the scales, or where there are none the values."""
    flag: Tensor
    checksum: Tensor
    flagged: memoryview | None
    """The flag's memory, on a CPU: read in a tenth of the time that ``item`` takes."""


class WireFormat:
    """The wires of one bucket: what their header says, where the parts of their body lie."""

    def __init__(self, fmt: Format, numels: tuple[int, ...], *, checksums: bool) -> None:
        self.fmt, self.numels = fmt, numels
        self.numel = sum(numels)
        self._checksums = checksums
        self.num_scales = sum(fmt.num_scales(n) for n in numels)
        self.wire_bytes = HEADER_BYTES + 2 * self.num_scales + sum(fmt.code_bytes(n) for n in numels)
        cut = _cut_of(numels)
        number = CODEC_NUMBERS[fmt.kind]
        self._header = _STRUCT.pack(_MAGIC, VERSION, number, 0, fmt.block, fmt.k, fmt.bits, 0, cut, self.numel)
        self._made: dict[int, _Views] = {}
        """Address of a wire that ``new`` made -> its views, which keep the memory. Cutting them anew for each encoding took
        15 us, as long as all that is done to 10,000 elements."""

    @cached_property
    def _start(self) -> int:
        """The checksum of the header, from which that of a body goes on."""
        out = torch.zeros(1, dtype=torch.int64)
        operations(_CPU).checksum(torch.frombuffer(bytearray(self._header), dtype=torch.uint8), 0, 0, out)
        return int(out)

    def new(self, device: torch.device) -> Tensor:
        """A wire to write into again and again, its header in place; zeros, so that it can be a part of State. On the meta device
        a length."""
        wire = self.fresh(device)
        if not wire.is_meta:
            self._made[wire.data_ptr()] = self._cut(wire)
        return wire

    def fresh(self, device: torch.device) -> Tensor:
        """``new`` for a wire that is written once: its memory is free as soon as nobody has it."""
        wire = torch.zeros(self.wire_bytes, dtype=torch.uint8, device=device)
        if not wire.is_meta:
            wire[:_CHECKED] = torch.frombuffer(bytearray(self._header), dtype=torch.uint8).to(device)
        return wire

    def operations(self, near: Tensor) -> ModuleType:
        """``dtrain.kernels.operations`` where a tensor lies; for a CPU looked up once."""
        return self._on_cpu if near.is_cpu else operations(near.device)

    @cached_property
    def _on_cpu(self) -> ModuleType:
        return operations(_CPU)

    def body(self, wire: Tensor) -> Tensor:
        return self._views(wire).body

    def parts(self, wire: Tensor) -> Sequence[Coded]:
        """The zones of each run."""
        made = self._made.get(wire.data_ptr())
        return zones(wire[HEADER_BYTES:], self.fmt, self.numels) if made is None else made.parts

    def put(self, x: Tensor, wire: Tensor) -> None:
        """Write the numbers of an identity wire, those of all runs one behind the other, and ``seal_finite``."""
        assert self.fmt.kind == "identity"
        self.operations(wire).put_identity(x, wire, HEADER_BYTES, _FLAG)
        views = self._views(wire)
        self._sum(views)
        _refuse(views)

    def seal(self, wire: Tensor) -> None:
        """Note in the header whether the body holds inf or NaN, and its checksum. Nothing waits for a GPU."""
        self._seal(self._views(wire))

    def seal_finite(self, wire: Tensor) -> None:
        """``seal``; on a CPU a body with inf or NaN raises NonFinite."""
        views = self._views(wire)
        self._seal(views)
        _refuse(views)

    def _seal(self, views: _Views) -> None:
        self.operations(views.body).flag_non_finite(views.finite, views.flag)
        self._sum(views)

    def _sum(self, views: _Views) -> None:
        if self._checksums:
            self.operations(views.body).checksum(views.body, _WORDS, self._start, views.checksum)

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
        ops.flag_non_finite(self._views(wire).finite, flag)
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

    def _views(self, wire: Tensor) -> _Views:
        return self._made.get(wire.data_ptr()) or self._cut(wire)

    def _cut(self, wire: Tensor) -> _Views:
        body = wire[HEADER_BYTES:]
        if self.num_scales:
            finite = body[: 2 * self.num_scales].view(torch.bfloat16)
        else:
            finite = body.view(torch.float32 if self.fmt.kind == "identity" else torch.bfloat16)
        checksum = wire[_CHECKED:HEADER_BYTES].view(torch.int64)
        kept = [KeptCoded(*part) for part in zones(body, self.fmt, self.numels)]
        flag = wire[_FLAG : _FLAG + 1]
        return _Views(body, kept, finite, flag, checksum, flag.numpy().data if wire.is_cpu else None)


def _refuse(views: _Views) -> None:
    if views.flagged is not None and views.flagged[0]:
        raise NonFinite("the payload holds inf or NaN")


def _cut_of(lengths: tuple[int, ...]) -> int:
    return zlib.crc32(struct.pack(f"<{len(lengths)}Q", *lengths))


def torch_header(codec: str, cut: tuple[int, ...], numel: int, *, block: int, k: int = 0) -> bytes:
    """Of a wire by one of the project's codecs that are plain torch; ``cut``: the lengths that both sides cut a bucket into."""
    return _STRUCT.pack(_MAGIC, VERSION, CODEC_NUMBERS[codec], 0, block, k, 0, 0, _cut_of(cut), numel)


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

"""How does a researcher's own codec get in? As an object in a file of theirs: ``sync.codec = "mine.py:name"``.

It codes one flat vector of any length, on whatever device that is, as ``OwnCodec`` says. Every bucket of every island codes by a
copy of the object, by one thread at a time, so it may keep room to work in. Headers, checksums, error feedback and
mixing come from ``torch_codec.py``; what the object must keep is tried when it is loaded."""

from __future__ import annotations

import copy
import zlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dtrain import codec as codecs
from dtrain.bucket import Layout
from dtrain.codec import BoundPlain, Codec, ErrorFeedback
from dtrain.own import digest, load_named
from dtrain.own_name import is_own
from dtrain.torch_codec import BoundTorch
from dtrain.wire import own_header

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
        codec, numel = copy.deepcopy(self.codec), layout.numel
        return BoundTorch(codec, own_header(self.number, numel), numel, codec.wire_bytes(numel) if numel else 0, "an own codec")

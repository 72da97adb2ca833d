"""Who holds a wire in a simulation? Between the islands of one process a wire travels as a reference, and is copied only where
its island may write to it again.

That memory which nobody holds any more is written next keeps the most of it in the caches: 1,000 islands' states are not."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.codec import BoundCodec

_CPU = torch.device("cpu")


class SharedWires:
    """The wires of one bucket, the same on all islands. A wire that is not known has one holder, the State that it lies in."""

    __slots__ = ("_codecs", "_free", "_holders")

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        """id of a wire -> States, inboxes and flights that have it."""
        self._free: dict[int, list[Tensor]] = {}
        """Bytes -> wires that nobody has."""
        self._codecs: dict[int, BoundCodec] = {}
        """Bytes -> who makes such wires: it knows what lies where in those that it made (wire.py)."""

    def room(self, wire: Tensor, codec: BoundCodec) -> Tensor:
        holders, key = self._holders, id(wire)
        self._codecs[codec.wire_bytes] = codec
        others = holders.get(key, 1) - 1
        if others:
            holders[key] = others
            free = self._free.get(codec.wire_bytes)
            wire = free.pop() if free else codec.new_wire(wire.device)
            key = id(wire)
        holders[key] = 1
        return wire

    def lend(self, wire: Tensor, receivers: int) -> Tensor:
        """What they may have: the wire itself where its island asked for ``room`` before it wrote it, else a copy."""
        held = self._holders.get(id(wire))
        if held is None:
            held, free = 0, self._free.get(wire.numel())
            wire = free.pop().copy_(wire) if free else wire.clone()
        self._holders[id(wire)] = held + receivers
        return wire

    def place(self, wire_bytes: int, receivers: int) -> Tensor:
        """Where to write a wire that comes from another process, for so many islands."""
        if free := self._free.get(wire_bytes):
            wire = free.pop()
        elif (codec := self._codecs.get(wire_bytes)) is not None:
            wire = codec.new_wire(_CPU)
        else:
            wire = torch.empty(wire_bytes, dtype=torch.uint8)
        self._holders[id(wire)] = receivers
        return wire

    def keep(self, wire: Tensor, room: Tensor) -> Tensor:
        self.drop(room)
        return wire

    def drop(self, wire: Tensor) -> None:
        """One holder less."""
        key = id(wire)
        others = self._holders.get(key, 1) - 1
        if others:
            self._holders[key] = others
        else:
            self._holders.pop(key, None)
            self._free.setdefault(wire.numel(), []).append(wire)

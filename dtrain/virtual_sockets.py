"""How do two shares of a simulation hand each other what is said at the end of a window? Over a pair of sockets of this machine.

Each says as much as the other hears, and neither reads while it writes, so one has to listen first: of two shares the lower one
speaks. Whoever goes through the others in order never waits in a circle: of all pairs that are not done, the least, in the order
(lower, higher), can go on."""

from __future__ import annotations

import pickle
import socket
import struct
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dtrain.config import Job
from dtrain.virtual import Account, Key, Shapes, Simulation, Stuck
from dtrain.virtual_windows import Failure, Said, Windows

_LENGTH = struct.Struct("<Q")
_BUFFER_BYTES = 1 << 20
"""Of a socket; at Linux' 208 KiB the two wake each other more often."""


ANOTHER_IS_GONE = 3
"""Exit status of a process that has missed another."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a further process is told first."""

    job: Job
    shapes: Shapes
    first_step: int
    owners: list[int]
    """Island -> its share."""
    own: int
    files: Mapping[int, int]
    """Other share but the first -> the number of the open file that leads to it."""
    with_parameters: bool


@dataclass(frozen=True, slots=True)
class Done:
    """What it tells in the end, of its islands in order; where they are asked for, their parameters follow."""

    stuck: Stuck | None
    accounts: list[Account]
    resent_bytes: list[float]


class Gone(Exception):
    """The other end of a line has closed it."""

    def __init__(self, share: int) -> None:
        super().__init__(share)
        self.share = share


class Line:
    """To one other share."""

    def __init__(self, share: int, end: socket.socket) -> None:
        self.share, self._end = share, end
        end.settimeout(None)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)

    def close(self) -> None:
        self._end.close()

    def send(self, what: object) -> None:
        content = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
        self.send_bytes(_LENGTH.pack(len(content)) + content)

    def receive(self) -> Any:
        length = bytearray(_LENGTH.size)
        self.receive_bytes(length)
        content = bytearray(*_LENGTH.unpack(length))
        self.receive_bytes(content)
        return pickle.loads(content)

    def send_bytes(self, content: bytes | bytearray | memoryview) -> None:
        try:
            self._end.sendall(content)
        except (BrokenPipeError, ConnectionResetError):
            raise Gone(self.share) from None

    def receive_bytes(self, into: bytearray | memoryview) -> None:
        left = memoryview(into).cast("B")
        while left:
            try:
                received = self._end.recv_into(left, 0, socket.MSG_WAITALL)
            except ConnectionResetError:
                received = 0
            if not received:
                raise Gone(self.share)
            left = left[received:]


def carry(at_end: Windows, lines: Sequence[Line], own: int, part: Simulation) -> Failure | None:
    """All windows of share ``own``; ``lines`` to the others, in order."""
    try:
        said = next(at_end)
        while True:
            said = at_end.send(_exchange(lines, own, part, said))
    except StopIteration as end:
        return end.value


def _exchange(lines: Sequence[Line], own: int, part: Simulation, said: Mapping[int, Said]) -> list[tuple[float, Failure | None]]:
    heard: list[tuple[float, Failure | None]] = []
    for line in lines:
        if own < line.share:
            _say(line, part, said[line.share])
        heard.append(_hear(line, part))
        if own > line.share:
            _say(line, part, said[line.share])
    return heard


def portable(error: Exception) -> Exception:
    """What another process can raise; it has no more of the traceback than its text."""
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  (whatever a class of somebody's own does there)
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error


_Index = tuple[float, "Failure | None", list[tuple[Key, int, list[tuple[float, int]]]]]
"""``earliest_s``, ``failure``, and of each wire its key, its bytes and where it goes; the bytes of all follow."""


def _say(line: Line, part: Simulation, said: Said) -> None:
    failure = said.failure
    if failure is not None:
        error = portable(failure.error)
        error.add_note("".join(traceback.format_exception(failure.error)))
        failure = Failure(failure.time_s, error)
    index: _Index = (said.earliest_s, failure, [(p.key, p.wire.numel(), p.to) for p in said.parcels])
    line.send(index)
    for parcel in said.parcels:
        line.send_bytes(memory(parcel.wire))
        part.sent(parcel.key, parcel.wire, len(parcel.to))


def _hear(line: Line, part: Simulation) -> tuple[float, Failure | None]:
    index: _Index = line.receive()
    earliest_s, failure, parcels = index
    for key, wire_bytes, to in parcels:
        wire = part.place(key, wire_bytes, len(to))
        line.receive_bytes(memory(wire))
        for arrival_s, peer in to:
            part.receive(arrival_s, peer, key, wire)
    return earliest_s, failure


def memory(x: Tensor) -> memoryview:
    """Of a contiguous tensor."""
    return x.numpy().data

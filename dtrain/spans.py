"""Which part of a step runs now, and which rounds of the link fly? Noted on one clock while somebody profiles, else free.

``span`` marks a part of a step; spans nest, and time belongs to the innermost. Names end up in ``dtrain profile``'s table."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

from torch import Tensor
from torch.profiler import record_function


class Span(NamedTuple):
    """One part of a step on one thread; nanoseconds since 1970, as torch.profiler's."""

    name: str
    thread: int
    begun_ns: int
    ended_ns: int
    moved_bytes: int
    """What must go through memory at least; 0 where nobody knows."""


class Mark(NamedTuple):
    """A flight posted its wires of one phase, or is done."""

    at_ns: int
    kind: int
    round: int
    bucket: int
    sent_bytes: int
    received_bytes: int
    done: bool


class Recorder:
    """What one process has noted. Lists are appended to by several threads, each append whole."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.marks: list[Mark] = []
        self.rooms: list[int] = []
        """Bytes of buffers that were made once, and stay."""
        self.annotates = False
        """Whether torch.profiler runs, and is told the names too."""
        # One clock that never jumps, laid on the wall clock once.
        self._offset_ns = time.time_ns() - time.perf_counter_ns()

    def now_ns(self) -> int:
        return self._offset_ns + time.perf_counter_ns()


_recorder: Recorder | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def record(recorder: Recorder | None) -> None:
    """From now on spans of this process go there; None: nowhere."""
    global _recorder  # noqa: PLW0603  (one process, one profile; handing it through every codec would cost every signature)
    _recorder = recorder


def span(name: str, moved_bytes: int = 0) -> AbstractContextManager[None]:
    """Mark the block as one part of a step; costs 0.1 us where nobody profiles."""
    return _NOTHING if _recorder is None else _Open(_recorder, name, moved_bytes)


def moving(name: str, *operands: Tensor) -> AbstractContextManager[None]:
    """``span`` of a part that goes through its operands once each; one that is written where it was read is named twice."""
    if _recorder is None:
        return _NOTHING
    return _Open(_recorder, name, sum(x.element_size() * x.numel() for x in operands))


def mark(kind: int, number: int, bucket: int, *, sent_bytes: int, received_bytes: int, done: bool) -> None:
    """Say how far a flight is: it has posted the wires of a phase, or it is done."""
    if _recorder is not None:
        _recorder.marks.append(Mark(_recorder.now_ns(), kind, number, bucket, sent_bytes, received_bytes, done))


def room(x: Tensor) -> Tensor:
    """Say of a buffer that it was made once and stays, beside State; returns it."""
    if _recorder is not None:
        _recorder.rooms.append(x.element_size() * x.numel())
    return x


class _Open(AbstractContextManager[None]):
    __slots__ = ("_annotation", "_begun_ns", "_moved_bytes", "_name", "_recorder")

    def __init__(self, recorder: Recorder, name: str, moved_bytes: int) -> None:
        self._recorder, self._name, self._moved_bytes = recorder, name, moved_bytes

    def __enter__(self) -> None:
        self._annotation = record_function(f"dtrain.{self._name}") if self._recorder.annotates else None
        if self._annotation is not None:
            self._annotation.__enter__()
        self._begun_ns = self._recorder.now_ns()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ended_ns = self._recorder.now_ns()
        if self._annotation is not None:
            self._annotation.__exit__(kind, error, trace)
        self._recorder.spans.append(Span(self._name, threading.get_native_id(), self._begun_ns, ended_ns, self._moved_bytes))

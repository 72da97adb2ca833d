"""Does a doctor that answers leave in time, however slowly the other side reads and writes? By a clock that the test moves."""

from __future__ import annotations

import socket
import struct
from types import SimpleNamespace

import pytest

from dtrain.launch import doctor_meet
from dtrain.launch.doctor_meet import MOST_BYTES, MOST_S, compare_clocks


class Slow(socket.socket):
    """Each call takes so many seconds, or its whole timeout where that is less; ``words`` are read, and then zeros for ever."""

    def __init__(self, each_s: float, words: bytes = b"") -> None:
        super().__init__()
        self.now_s, self.each_s, self._words = 1000.0, each_s, words

    def sendall(self, data: bytes, flags: int = 0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._take()

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        self._take()
        said, self._words = self._words[:bufsize], self._words[bufsize:]
        return said or bytes(bufsize)

    def _take(self) -> None:
        timeout_s = self.gettimeout()
        assert timeout_s is not None, "a call without an end"
        self.now_s += min(self.each_s, timeout_s)
        if self.each_s > timeout_s:
            raise TimeoutError


@pytest.mark.parametrize("each_s", [6.0, 7.0], ids=["ends between two calls", "ends within one"])
@pytest.mark.parametrize("words", [b"D", b"U", b"T" * 1000], ids=["a slow reader", "a slow writer", "many questions"])
def test_a_connection_lasts_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch, words: bytes, each_s: float) -> None:
    """512 pieces of 64 KiB would take an hour."""
    slow = Slow(each_s, words + struct.pack("!I", MOST_BYTES))
    monkeypatch.setattr(doctor_meet, "time", SimpleNamespace(monotonic=lambda: slow.now_s))
    with slow, pytest.raises((EOFError, TimeoutError)):
        doctor_meet._Answers(slow, lambda: 0).until_the_end()
    assert slow.now_s == 1000 + MOST_S


def test_one_call_lasts_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(1e9)
    monkeypatch.setattr(doctor_meet, "time", SimpleNamespace(monotonic=lambda: slow.now_s))
    with slow, pytest.raises(TimeoutError):
        compare_clocks(slow, clock=lambda: 0)
    assert slow.now_s == 1000 + doctor_meet._ANSWER_S

"""What does a site see of a launcher that answers no more? PeerLost, after a time, and before it whoever asks the site to stop.

A word at the meeting point waits for its answer inside torch, without a clock, and Python hears no signal until it comes: a
launcher that a person has suspended, or whose host is gone, would hold a site for ever. So words go out from a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from datetime import timedelta
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from torch._C._distributed_c10d import Store

from dtrain.errors import PeerLost
from dtrain.membership import meeting_store

_SLICE_S = 0.1
"""Signals are heard between these."""
_AGAIN = "start it again with --resume, and then this"
_Answer = TypeVar("_Answer")
_Asked = SimpleQueue[tuple[Callable[[], Any], Future[Any]]]


class TimedStore(Store):
    """The meeting point at ``host:port``. Each word raises PeerLost where the launcher does not answer within timeout_s, or is
    gone."""

    def __init__(self, meet: str, timeout_s: float) -> None:
        super().__init__()
        self._meet, self._timeout_s = meet, timeout_s
        self._asked = _Asked()
        Thread(target=_ask, args=(self._asked,), name="meeting point", daemon=True).start()  # it may hang when all else ends
        self._store = self._answer(lambda: meeting_store(meet, timeout_s))

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def set(self, key: str, value: str) -> None:
        self._answer(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        return self._answer(lambda: self._store.get(key))

    def check(self, keys: list[str]) -> bool:
        return self._answer(lambda: self._store.check(keys))

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        return self._answer(lambda: self._store.compare_set(key, expected_value, desired_value))

    def delete_key(self, key: str) -> bool:
        return self._answer(lambda: self._store.delete_key(key))

    def _answer(self, word: Callable[[], _Answer]) -> _Answer:
        answer, gives_up = Future[_Answer](), time.monotonic() + self._timeout_s
        self._asked.put((word, answer))
        while not wait([answer], _SLICE_S).done:
            if time.monotonic() > gives_up:
                raise PeerLost((), f"the launcher at {self._meet} has not answered for {self._timeout_s:g} s; {_AGAIN}")
        try:
            return answer.result()
        except RuntimeError as e:  # the store's way to say that its other end has closed, or is not there
            raise PeerLost((), f"the launcher at {self._meet} is gone; {_AGAIN} ({str(e).partition(chr(10))[0][:80]})") from e


def _ask(asked: _Asked) -> None:
    while True:
        _say(*asked.get())


def _say(word: Callable[[], Any], answer: Future[Any]) -> None:
    try:
        answer.set_result(word())
    except Exception as e:  # noqa: BLE001  (raised again by who waits for the answer; a dead thread would hang it)
        answer.set_exception(e)

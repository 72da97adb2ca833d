"""How do all islands hear the same words in the same order, whoever says them and however far the store is?

Each word takes the next number and is kept under it, so nobody's word has to wait for another's. Where all change one text by
compare-and-set the far ones lose: with a round trip of 100 ms none came through beside a near island that wrote each 15 ms.

An island that was killed between its number and its word leaves a gap. After a while somebody fills it with a word that says
nothing; who was only slow finds its number taken, and takes another."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Protocol

from torch._C._distributed_c10d import Store

NOTHING = "-"
_GAP_S = 10.0
_MOST = 1000
"""Words that are fetched at once."""


class Words(Protocol):
    """Called by one thread of an island."""

    def say(self, word: str) -> int:
        """Returns the word's number, from 1."""
        ...

    def heard(self, after: int) -> Sequence[str]:
        """What follows the first ``after`` words, or the beginning of it; NOTHING is among it where nobody said something."""
        ...


class StoreWords:
    """Words at the meeting point. To say one takes two round trips, to hear that there is none one, and three to hear some."""

    def __init__(self, store: Store, prefix: str, *, gap_s: float = _GAP_S) -> None:
        self._store, self._prefix, self._gap_s = store, prefix, gap_s
        self._gap, self._gap_since = 0, 0.0
        """The number of the word that is missing, and since when it is."""

    def say(self, word: str) -> int:
        while True:
            number = self._store.add(_count(self._prefix), 1)
            if self._store.compare_set(_key(self._prefix, number), "", word).decode() == word:
                return number

    def heard(self, after: int) -> Sequence[str]:
        said = min(self._store.add(_count(self._prefix), 0), after + _MOST)
        keys = [_key(self._prefix, number) for number in range(after + 1, said + 1)]
        while keys and not self._store.check(keys):  # to get a key that is not there would wait for it
            if len(keys) == 1:
                self._wait_or_fill(after + 1)
            del keys[len(keys) // 2 :]
        return [word.decode() for word in self._store.multi_get(keys)] if keys else []

    def _wait_or_fill(self, number: int) -> None:
        now = time.monotonic()
        if self._gap != number:
            self._gap, self._gap_since = number, now
        elif now - self._gap_since > self._gap_s:
            self._store.compare_set(_key(self._prefix, number), "", NOTHING)


def forget(store: Store, prefix: str, after: int, heard: int) -> int:
    """Drop the words after the first ``after`` up to the one numbered ``heard``; returns the last one's number."""
    last = min(heard, store.add(_count(prefix), 0)) if heard > after else after
    for number in range(after + 1, last + 1):
        store.delete_key(_key(prefix, number))
    return last


class MemoryWords:
    """Of islands in one process."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._lock = threading.Lock()

    def say(self, word: str) -> int:
        with self._lock:
            self._said.append(word)
            return len(self._said)

    def heard(self, after: int) -> Sequence[str]:
        with self._lock:
            return self._said[after:]


def _count(prefix: str) -> str:
    return f"{prefix}/count"


def _key(prefix: str, number: int) -> str:
    return f"{prefix}/{number}"

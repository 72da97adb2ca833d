"""Which tokens does a step of a stream hold? Those of its number: an island's rows, laid end to end, are cut into sequences.

Row k of the data set is held out where k mod 50 = 49; the others go to the islands in turns, in the order in which they are
stored: the seed changes nothing, so shuffle what is stored. Step s of an island that takes B sequences has its sequences s B to
s B + B - 1, of T + 1 tokens, the last of which is the next one's first. After the last row the first comes again.

So a batch follows from (island, step) alone, and a resumed run needs no state, but it pays: it reads, and makes tokens of, all
that its island had before. Each rank reads the rows of all islands, and makes tokens of its island's. Of another number of
islands the rows are dealt anew: some come again, and some never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtrain.data.tokens import Tokenizer

HOLD_OUT_EVERY = 50
HELD_BYTES = 256 * 1024
"""Of held-out text that a stream is asked for, once; 512 sequences of 128 bytes are a quarter of it."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Rows that can be read again from the first one."""

    source: str
    rows: Callable[[], Iterator[bytes]]
    tokenizer: Tokenizer


def held_out(stream: Stream) -> list[bytes]:
    """The first held-out rows, HELD_BYTES of them or all; raises ValueError where there is none."""
    held, size = list[bytes](), 0
    for k, row in enumerate(stream.rows()):
        if k % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1:
            held.append(row)
            size += len(row)
            if size >= HELD_BYTES:
                break
    if not held:
        raise ValueError(
            f'data.source = "{stream.source}" has fewer than {HOLD_OUT_EVERY} rows, of which none is held out; leave '
            "data.streaming out"
        )
    return held


class Dealt:
    """One island's tokens."""

    def __init__(self, stream: Stream, island: int, num_islands: int) -> None:
        self._stream, self._island, self._num_islands = stream, island, num_islands
        self._begin()

    def windows(self, first: int, count: int, context: int, *, step_first: int) -> NDArray[Any]:
        """``count`` sequences from number ``first``, (count, context + 1). What lies before sequence ``step_first`` is forgotten,
        and read again from the start where it is asked for."""
        tokens = self._tokens(first * context, (first + count) * context + 1, step_first * context)
        return tokens[np.arange(count)[:, None] * context + np.arange(context + 1)]

    def _begin(self) -> None:
        self._rows = self._own_rows()
        self._kept: list[NDArray[Any]] = []
        self._start = self._stop = 0

    def _tokens(self, start: int, stop: int, keep_from: int) -> NDArray[Any]:
        if keep_from < self._start:
            self._begin()
        while self._stop < stop:
            (tokens,) = self._stream.tokenizer.encode([next(self._rows)])
            self._stop += len(tokens)
            if self._stop > keep_from:
                self._kept.append(tokens)
            else:
                self._kept, self._start = [], self._stop
        cut = max(0, keep_from - self._start)
        whole = np.concatenate(self._kept)[cut:]
        self._kept, self._start = [whole], self._start + cut
        return whole[start - self._start : stop - self._start]

    def _own_rows(self) -> Iterator[bytes]:
        while True:
            rows = self._once()
            first = next(rows, None)
            if first is None:
                raise ValueError(
                    f'data.source = "{self._stream.source}" has no row for island {self._island} of {self._num_islands}; use '
                    "fewer islands, or more rows"
                )
            yield from chain([first], rows)

    def _once(self) -> Iterator[bytes]:
        dealt = 0
        for k, row in enumerate(self._stream.rows()):
            if k % HOLD_OUT_EVERY < HOLD_OUT_EVERY - 1:
                if dealt % self._num_islands == self._island:
                    yield row
                dealt += 1

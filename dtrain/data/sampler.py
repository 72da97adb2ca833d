"""Which tokens does a batch hold? Training batches are a pure function of (seed, island, rank, step, micro-batch), so a resumed
run needs no data state; held-out sequences are fixed, so every run is measured on the same text.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.corpus import Corpus

Shard = Literal["iid", "by_file"]


def sample_batch(
    corpus: Corpus,
    *,
    seed: int,
    island: int,
    num_islands: int,
    rank: int,
    step: int,
    micro: int,
    batch: int,
    context: int,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (batch, context) int64 each. ``"iid"`` draws from all files, ``"by_file"`` from the island's own."""
    own = _own_files(corpus, island, num_islands) if shard == "by_file" else np.arange(corpus.num_files)
    lengths = np.diff(corpus.file_starts)[own]
    num_starts = int(lengths.sum()) - context
    if num_starts < 1:
        raise ValueError(
            f'data.source = "{corpus.source}" has {num_starts + context} training tokens for island {island}, '
            f"too few for model.context = {context}; use a shorter context or more text"
        )
    starts = (_random_words(seed, island, rank, step, micro, batch) % np.uint64(num_starts)).astype(np.int64)
    positions = starts[:, None] + np.arange(context + 1)  # (batch, context + 1), in the island's files laid end to end
    if shard == "by_file":
        ends = np.cumsum(lengths)
        file = np.searchsorted(ends, positions, side="right")  # which of the island's files each position falls into
        positions += (corpus.file_starts[own] - (ends - lengths))[file]
    return _inputs_and_targets(corpus.train, positions)


def heldout_sequences(corpus: Corpus, context: int, count: int = 512) -> tuple[Tensor, Tensor]:
    """``count`` fixed sequences, (count, context) int64 inputs and targets, evenly spaced over all that is held out.

    No token is predicted twice where count * context + 1 tokens are held out; where there are fewer, sequences overlap evenly.
    """
    num_starts = len(corpus.heldout) - context
    if num_starts < 1:
        raise ValueError(
            f'data.source = "{corpus.source}" holds out {len(corpus.heldout)} tokens, '
            f"too few for model.context = {context}; use a shorter context or more text"
        )
    starts = np.arange(count, dtype=np.int64) * (num_starts - 1) // max(1, count - 1)
    return _inputs_and_targets(corpus.heldout, starts[:, None] + np.arange(context + 1))


def _own_files(corpus: Corpus, island: int, num_islands: int) -> NDArray[np.int64]:
    if corpus.num_files < num_islands:
        raise ValueError(
            f'islands.shard = "by_file" needs a training file for each of {num_islands} islands, '
            f'"{corpus.source}" has {corpus.num_files}; use islands.shard = "iid" or more files'
        )
    return np.arange(island, corpus.num_files, num_islands)


def _random_words(seed: int, island: int, rank: int, step: int, micro: int, count: int) -> NDArray[np.uint64]:
    """Philox is a counter-based generator: its words depend on key and counter alone, and no two of ours share both.

    The counter's lowest word counts the blocks of one batch. Raw words, because numpy may change how it derives integers from
    them; the bias of their remainder is below 2^-30 for a corpus of up to 2^34 tokens.
    """
    philox = np.random.Philox(key=[seed, island], counter=[0, micro, step, rank])
    return philox.random_raw(count)


def _inputs_and_targets(tokens: NDArray[Any], positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(tokens[positions].astype(np.int64))  # (batch, context + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

"""Which tokens does a batch hold? An island's training batch is a pure function of (seed, island, step), whatever ranks and
micro-batches share it, so a resumed run needs no data state; held-out sequences are fixed, so every run is measured on the same
text.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.data.corpus import Corpus, Shard, num_heldout_starts, num_starts, own_files

_NOISE = 2**63
"""Beyond the blocks that a batch's words count."""


def sample_batch(
    corpus: Corpus,
    *,
    seed: int,
    island: int,
    num_islands: int,
    step: int,
    first: int,
    batch: int,
    context: int,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (batch, context) int64 each, of the island's sequences for this step those from number ``first``.
    ``"iid"`` draws from all files, ``"by_file"`` from the island's own."""
    own = own_files(corpus, island, num_islands, shard)
    lengths = np.diff(corpus.file_starts)[own]
    count = num_starts(corpus, own, island=island, context=context)
    starts = (_random_words(seed, island, step, first, batch) % np.uint64(count)).astype(np.int64)
    positions = starts[:, None] + np.arange(context + 1)  # (batch, context + 1), in the island's files laid end to end
    if shard == "by_file":
        ends = np.cumsum(lengths)
        file = np.searchsorted(ends, positions, side="right")  # which of the island's files each position falls into
        positions += (corpus.file_starts[own] - (ends - lengths))[file]
    return inputs_and_targets(corpus.train[positions])


def heldout_sequences(corpus: Corpus, context: int, count: int = 512) -> tuple[Tensor, Tensor]:
    """``count`` fixed sequences, (count, context) int64 inputs and targets, evenly spaced over all that is held out.

    No token is predicted twice where count * context + 1 tokens are held out; where there are fewer, sequences overlap evenly.
    """
    starts = np.arange(count, dtype=np.int64) * (num_heldout_starts(corpus, context) - 1) // max(1, count - 1)
    return inputs_and_targets(corpus.heldout[starts[:, None] + np.arange(context + 1)])


def noise_seed(*, seed: int, island: int, rank: int, step: int, micro: int) -> int:
    """Of what a model of somebody's own draws while it trains (dropout): another for each micro-batch, and the same after a
    resume."""
    philox = np.random.Philox(key=[seed, island], counter=[_NOISE, micro, step, rank])
    return int(philox.random_raw(1)[0]) % 2**63


def _random_words(seed: int, island: int, step: int, first: int, count: int) -> NDArray[np.uint64]:
    """Philox is a counter-based generator: its words depend on key and counter alone, and no two of ours share both.

    The counter's lowest word counts blocks of four words. Raw words, because numpy may change how it derives integers from
    them; the bias of their remainder is below 2^-30 for a corpus of up to 2^34 tokens.
    """
    skipped = first % 4
    philox = np.random.Philox(key=[seed, island], counter=[first // 4, 0, step, 0])
    return philox.random_raw(skipped + count)[skipped:]


def inputs_and_targets(sequences: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """(batch, context) int64 each, of sequences (batch, context + 1)."""
    windows = torch.from_numpy(sequences.astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

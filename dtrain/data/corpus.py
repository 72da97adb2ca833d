"""What is trained on, and what is held out? Text as tokens, or a file of them, with a hash that names the data and its split.

Every 50th piece of a corpus is held out, or the last one where there are fewer than 50. A piece is a file of a folder, or one of
50 or more equal blocks of a single text file, so that what is held out resembles the rest, or a row of a data set. A token file
holds out its last 2 %. Of a stream (``stream.py``) only the held-out text is read, and the hash is of that.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dtrain.data import hf_rows
from dtrain.data.stream import HOLD_OUT_EVERY, Stream, held_out
from dtrain.data.tokens import BYTES, Tokenizer, load_tokenizer
from dtrain.sections import Data

Shard = Literal["iid", "by_file"]

BLOCK_BYTES = 64 * 1024  # of a single text file: hundreds of sequences, so that few of them lose their beginning to a cut
STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    source: str
    train: NDArray[Any]
    """All training tokens, file after file: uint8, uint16 or uint32; memory-mapped if they came from a token file."""
    file_starts: NDArray[np.int64]
    """File k is train[file_starts[k] : file_starts[k + 1]]; num_files + 1 entries."""
    heldout: NDArray[Any]
    vocab: int
    """Of the model: num_words, or a multiple of 64 above it."""
    num_words: int
    """Every token is below it."""
    bytes_per_token: float | None
    """Of the held-out text; None of a token file without its tokenizer, as nobody says what its tokens stand for."""
    hash: str
    """sha256 over the contents and the split, in hex."""
    stream: Stream | None = None
    """Where training tokens come from instead of ``train``."""

    @property
    def num_files(self) -> int:
        """Training files; the held-out ones do not count."""
        return len(self.file_starts) - 1


def corpus_of(data: Data) -> Corpus:
    """What a job's [data] says."""
    return load_corpus(data.source, data.tokenizer, streaming=data.streaming)


def load_corpus(source: str, tokenizer: str = BYTES, *, streaming: bool = False) -> Corpus:
    """``"stdlib"`` (the running Python's own library), or the path of a text file, a folder of text files, or a token file, or a
    data set of Hugging Face (``hf_rows.py``). Every process that trains makes its tokens itself."""
    words = load_tokenizer(tokenizer)
    if source.startswith(hf_rows.PREFIX):
        return _from_stream(source, words) if streaming else _from_rows(source, words)
    try:
        if source == "stdlib":
            return _from_files(source, _stdlib_files(), words)
        return _from_path(Path(source), words, tokenizer)
    except OSError as e:
        at = "" if e.filename is None or str(e.filename) == source else f" at {e.filename}"
        raise ValueError(
            f'data.source = "{source}" cannot be read{at}: {e.strerror or e}; use "stdlib", or a path that can be read'
        ) from None


def _from_rows(source: str, tokenizer: Tokenizer) -> Corpus:
    rows = list(hf_rows.texts(source, streaming=False))
    if len(rows) < 2:
        raise ValueError(f'data.source = "{source}" has {len(rows)} rows with text; use 2 or more, as one is held out')
    train, heldout = _split(rows)
    return _text_corpus(source, train, heldout, tokenizer)


def _from_stream(source: str, tokenizer: Tokenizer) -> Corpus:
    stream = Stream(source, lambda: hf_rows.texts(source, streaming=True), tokenizer)
    held = held_out(stream)
    tokens, starts = tokenizer.encode(held), np.zeros(1, dtype=np.int64)
    heldout = np.concatenate(tokens)
    digest = hashlib.sha256(f"{_hash(heldout[:0], starts, heldout)} {tokenizer.digest}".encode()).hexdigest()
    vocab, per_token = _padded(tokenizer.num_words), _bytes_per_token(held, tokens)
    return Corpus(source, heldout[:0], starts, heldout, vocab, tokenizer.num_words, per_token, digest, stream)


def check_fits(corpus: Corpus, *, context: int, num_islands: int, shard: Shard) -> None:
    """Raises ValueError, with one line, where an island could not draw a batch or the held-out text is too short."""
    for island in range(0 if corpus.stream is not None else num_islands if shard == "by_file" else 1):
        num_starts(corpus, own_files(corpus, island, num_islands, shard), island=island, context=context)
    num_heldout_starts(corpus, context)


def own_files(corpus: Corpus, island: int, num_islands: int, shard: Shard) -> NDArray[np.int64]:
    """The training files that an island draws from, by their number."""
    if shard == "iid":
        return np.arange(corpus.num_files)
    if corpus.num_files < num_islands:
        raise ValueError(
            f'islands.shard = "by_file" needs a training file for each of {num_islands} islands, '
            f'"{corpus.source}" has {corpus.num_files}; use islands.shard = "iid" or more files'
        )
    return np.arange(island, corpus.num_files, num_islands)


def num_starts(corpus: Corpus, own: NDArray[np.int64], *, island: int, context: int) -> int:
    """At how many places a training sequence can start in an island's files, laid end to end."""
    num_tokens = int(np.diff(corpus.file_starts)[own].sum())
    if num_tokens <= context:
        raise ValueError(
            f'data.source = "{corpus.source}" has {num_tokens} training tokens for island {island}, '
            f"too few for model.context = {context}; use a shorter context or more text"
        )
    return num_tokens - context


def num_heldout_starts(corpus: Corpus, context: int) -> int:
    """At how many places a held-out sequence can start."""
    if len(corpus.heldout) <= context:
        raise ValueError(
            f'data.source = "{corpus.source}" holds out {len(corpus.heldout)} tokens, '
            f"too few for model.context = {context}; use a shorter context or more text"
        )
    return len(corpus.heldout) - context


def _from_path(path: Path, tokenizer: Tokenizer, tokenizer_name: str) -> Corpus:
    if path.is_dir():
        return _from_files(str(path), _text_files(path), tokenizer)
    if not path.is_file():
        raise ValueError(f'data.source = "{path}" does not exist; use "stdlib", a text file, a folder, or a .bin token file')
    if path.stat().st_size == 0:
        raise ValueError(f'data.source = "{path}" is an empty file; use one that holds text or tokens')
    if path.suffix == ".bin":
        return _from_token_file(path, None if tokenizer_name == BYTES else tokenizer)
    return _from_text_file(path, tokenizer)


def _stdlib_files() -> list[Path]:
    """The library's .py files but for tests and what pip installed; not _sysconfigdata*, which tells where Python was built."""
    files = _walk(Path(sysconfig.get_path("stdlib")), STDLIB_SKIPPED)
    return [f for f in files if f.suffix == ".py" and not f.name.startswith("_sysconfigdata")]


def _text_files(folder: Path) -> list[Path]:
    files = _walk(folder, frozenset())
    token_files = [f for f in files if f.suffix == ".bin"]
    if token_files:
        raise ValueError(f'data.source = "{folder}" holds the token file {token_files[0].name}; name one token file itself')
    return files


def _walk(root: Path, skipped: frozenset[str]) -> list[Path]:
    """Non-empty files below root, sorted by their path from root; hidden ones (.git and the like) are not text to train on."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    kept = (f for f in files if f.is_file() and f.stat().st_size > 0)
    return sorted(kept, key=lambda f: f.relative_to(root).as_posix())


def _from_files(source: str, files: Sequence[Path], tokenizer: Tokenizer) -> Corpus:
    if len(files) < 2:
        raise ValueError(
            f'data.source = "{source}" is a folder with {len(files)} non-empty files; '
            "use 2 or more, as one is held out, or name a single file"
        )
    train, heldout = _split([f.read_bytes() for f in files])
    return _text_corpus(source, train, heldout, tokenizer)


def _from_text_file(path: Path, tokenizer: Tokenizer) -> Corpus:
    content = path.read_bytes()
    num_blocks = HOLD_OUT_EVERY * max(1, len(content) // (HOLD_OUT_EVERY * BLOCK_BYTES))
    bounds = [len(content) * i // num_blocks for i in range(num_blocks + 1)]
    if tokenizer.digest != BYTES:  # of which a character is not to be cut in two
        bounds = [_character(content, bound) for bound in bounds]
    train, heldout = _split([content[a:b] for a, b in pairwise(bounds)])
    whole = _text_corpus(str(path), train, heldout, tokenizer)
    starts = whole.file_starts[[0, -1]]  # still one file, whatever was cut out of it
    return replace(whole, file_starts=starts, hash=_hash(whole.train, starts, whole.heldout))


def _character(content: bytes, at: int) -> int:
    """Where the next character of UTF-8 begins."""
    while at < len(content) and content[at] & 0xC0 == 0x80:
        at += 1
    return at


def _split(pieces: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    held = set(range(HOLD_OUT_EVERY - 1, len(pieces), HOLD_OUT_EVERY)) or {len(pieces) - 1}
    train = [piece for k, piece in enumerate(pieces) if k not in held]
    return train, [pieces[k] for k in sorted(held)]


def _text_corpus(source: str, train: Sequence[bytes], heldout: Sequence[bytes], tokenizer: Tokenizer) -> Corpus:
    """Each text a file."""
    each, held = tokenizer.encode(train), tokenizer.encode(heldout)
    starts = np.cumsum([0, *map(len, each)], dtype=np.int64)
    tokens, last = np.concatenate(each), np.concatenate(held)
    vocab, per_token = _padded(tokenizer.num_words), _bytes_per_token(heldout, held)
    return Corpus(source, tokens, starts, last, vocab, tokenizer.num_words, per_token, _hash(tokens, starts, last))


def _bytes_per_token(texts: Sequence[bytes], tokens: Sequence[NDArray[Any]]) -> float:
    return sum(map(len, texts)) / max(1, sum(map(len, tokens)))


def _padded(num_words: int) -> int:
    return -(-num_words // 64) * 64  # a multiple of 64 keeps the output head's rows aligned


def _from_token_file(path: Path, tokenizer: Tokenizer | None) -> Corpus:
    dtype = np.dtype("<u4" if path.name.endswith(".u32.bin") else "<u2")
    size_bytes = path.stat().st_size
    if size_bytes % dtype.itemsize:
        raise ValueError(
            f'data.source = "{path}" has {size_bytes} bytes, not a multiple of {dtype.itemsize}; '
            "tokens are uint16, or uint32 in a file named *.u32.bin"
        )
    tokens = np.memmap(path, dtype=dtype, mode="r")
    num_heldout = max(1, len(tokens) // HOLD_OUT_EVERY)
    train, heldout = tokens[:-num_heldout], tokens[-num_heldout:]
    starts = np.array([0, len(train)], dtype=np.int64)
    num_words, per_token = int(tokens.max()) + 1, None
    if tokenizer is not None:
        if num_words > tokenizer.num_words:
            raise ValueError(
                f'data.source = "{path}" has token {num_words - 1}, and data.tokenizer knows {tokenizer.num_words}; name the one '
                "that made the file"
            )
        num_words, per_token = tokenizer.num_words, tokenizer.num_bytes(heldout) / len(heldout)
    return Corpus(str(path), train, starts, heldout, _padded(num_words), num_words, per_token, _hash(train, starts, heldout))


def _hash(train: NDArray[Any], starts: NDArray[np.int64], heldout: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{train.dtype.str} {len(train)} {len(heldout)} {len(starts)} ".encode())
    for part in (starts.astype("<i8"), train, heldout):
        digest.update(part.data)  # the buffer itself: a memory-mapped file is hashed without a copy
    return digest.hexdigest()

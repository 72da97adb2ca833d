"""How does text become tokens? Each byte is one, or a tokenizer of Hugging Face says: ``data.tokenizer``, a tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from dtrain.extras import require

BYTES = "bytes"


class Tokenizer(Protocol):
    @property
    def num_words(self) -> int:
        """Every token is below it."""
        ...

    @property
    def digest(self) -> str:
        """Names what it makes of a text."""
        ...

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        """Of each text its tokens, uint8, uint16 or uint32; nothing is added to them."""
        ...

    def num_bytes(self, tokens: NDArray[Any]) -> int:
        """Of the text that they stand for."""
        ...


def load_tokenizer(where: str) -> Tokenizer:
    """``"bytes"``, or the path of a tokenizer.json or of the folder that holds one."""
    if where == BYTES:
        return ByteTokens()
    require("tokenizers", asked=f'data.tokenizer = "{where}"', extra="hf")
    path = Path(where, "tokenizer.json") if Path(where).is_dir() else Path(where)
    if not path.is_file():
        raise ValueError(f'data.tokenizer = "{where}": there is no file {path}; use "bytes", or a tokenizer.json or its folder')
    return FileTokens(path)


class ByteTokens:
    num_words = 256
    digest = BYTES

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def num_bytes(self, tokens: NDArray[Any]) -> int:
        return len(tokens)


class FileTokens:
    """What is no UTF-8 in a text becomes U+FFFD."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Loaded

        text = path.read_bytes()
        try:
            self._loaded = Loaded.from_buffer(text)
        except ValueError as e:
            reason = str(e).splitlines()[0]
            raise ValueError(f'data.tokenizer = "{path}" is no tokenizer: {reason}; name a tokenizer.json') from None
        self.num_words = max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1
        self.digest = hashlib.sha256(text).hexdigest()
        self._dtype = np.dtype(np.uint16 if self.num_words <= 2**16 else np.uint32)

    def encode(self, texts: Sequence[bytes]) -> list[NDArray[Any]]:
        words = [text.decode("utf-8", errors="replace") for text in texts]
        return [np.array(of.ids, dtype=self._dtype) for of in self._loaded.encode_batch(words, add_special_tokens=False)]

    def num_bytes(self, tokens: NDArray[Any]) -> int:
        return len(cast(str, self._loaded.decode(tokens.tolist(), skip_special_tokens=False)).encode())

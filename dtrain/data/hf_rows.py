"""Which texts does a data set of Hugging Face hold? ``data.source = "hf:NAME_OR_PATH:SPLIT:COLUMN"``, read by ``datasets``.

A path is a json, jsonl, parquet, csv or txt file, or a folder that ``datasets.load_dataset`` knows; a name is one of the hub,
which is asked for it. A row is a text, and ends with a line's end. Only jobs that need ``datasets`` wait for its import."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.extras import require

PREFIX = "hf:"
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}


class Named(NamedTuple):
    """What stands behind ``hf:``."""

    where: str
    split: str
    column: str

    @property
    def source(self) -> str:
        return f"{PREFIX}{self.where}:{self.split}:{self.column}"


def parse(source: str) -> Named:
    """Raises ValueError where that is not written as it should be."""
    found = re.fullmatch(r"hf:([^:]+)(?::([^:\[\]]+(?:\[[^\]]*\])?))?(?::([^:]+))?", source)
    if found is None:
        raise ValueError(f'data.source = "{source}" names no data set; write "hf:NAME_OR_PATH", "hf:NAME:train:text" in full')
    return Named(found[1], found[2] or "train", found[3] or "text")


def absolute(source: str) -> str:
    """The same from any working directory; a name on the hub stays one."""
    named = parse(source)
    return named._replace(where=os.path.abspath(named.where)).source if os.path.exists(named.where) else source


def texts(source: str, *, streaming: bool) -> Iterator[bytes]:
    """Every row that is not empty, as UTF-8 and a line's end."""
    named = parse(source)
    require("datasets", asked=f'data.source = "{source}"', extra="hf")
    with _one_line(source):
        for row in _load(named, streaming=streaming):
            text = row.get(named.column)
            if not isinstance(text, str):
                columns = ", ".join(key for key, value in row.items() if isinstance(value, str)) or "none"
                raise ValueError(f"there is no text in column {named.column}; columns of text: {columns}")
            if text:
                yield text.encode() + b"\n"


def _load(named: Named, *, streaming: bool) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(named.where)
    if not path.is_file():
        return datasets.load_dataset(named.where, split=named.split, streaming=streaming)
    if path.suffix not in _BUILDERS:
        raise ValueError(f"{path.name} is none of {', '.join(_BUILDERS)} files; name one, a folder, or a name on the hub")
    files = {named.split.partition("[")[0]: str(path)}
    return datasets.load_dataset(_BUILDERS[path.suffix], data_files=files, split=named.split, streaming=streaming)


@contextmanager
def _one_line(source: str) -> Iterator[None]:
    """Around what is read, or fetched: what is wrong with that is a person's to mend."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ValueError(f'data.source = "{source}" cannot be read: {reason}') from e

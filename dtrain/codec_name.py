"""How is a codec written in a job file? ``"int4:64"``: what it is, and how many elements share a scale. Pure."""

from __future__ import annotations

from typing import NamedTuple

MAX_BLOCK = 4096
DEFAULT_BLOCK = 64


class CodecName(NamedTuple):
    base: str
    block: int
    """Elements a scale; 1 where there are no scales."""


def parse(name: str) -> CodecName:
    """``"identity"``, ``"bf16"``, ``"int8"``, ``"int4:32"`` -> CodecName; raises ValueError for anything else."""
    base, colon, block_text = name.partition(":")
    if base in ("int8", "int4"):
        block = int(block_text) if block_text.isdecimal() else 0 if colon else DEFAULT_BLOCK
        if block < 2 or block % 2 or MAX_BLOCK % block:
            raise ValueError(f"codec {name!r}: the block is a power of two from 2 to {MAX_BLOCK}, as in {base}:64")
        return CodecName(base, block)
    if name not in ("identity", "bf16"):
        raise ValueError(
            f'codec {name!r} is not known; use "identity", "bf16", "int8", "int4", with a block size as in "int4:64"'
        )
    return CodecName(name, 1)

"""How is a codec written in a job file? ``"int4:64"``: what it is, and how many elements share a scale. Pure."""

from __future__ import annotations

from typing import NamedTuple

MIN_BLOCK, MAX_BLOCK = 32, 4096
DEFAULT_BLOCK = 64
CASTS = ("identity", "bf16")
BLOCKS = ("int8", "int4", "e3m0", "lut4", "sign")
TORCH = ("codebook8", "dct")
"""In plain torch: what codes by the kernels takes none of them."""
MIN_CODEBOOK_BLOCK = 512
MIN_DCT_CHUNK, MAX_DCT_CHUNK = 8, 64
"""Of a side; the square of the largest is as much as an index of 12 bits counts."""
STOCHASTIC = "stochastic"


class CodecName(NamedTuple):
    base: str
    block: int = 1
    """Elements a scale; 1 where there are no scales; for top-k the chunk, for dct its side."""
    k: int = 0
    bits: int = 0
    stochastic: bool = False


def parse(name: str) -> CodecName:
    """``"bf16"``, ``"int4:32"``, ``"e3m0:64:stochastic"``, ``"topk:64/4096:2"``, ``"codebook8:4096"``, ``"dct:32/64"``
    -> CodecName; raises ValueError for anything else."""
    base, *rest = name.split(":")
    if base in CASTS and not rest:
        return CodecName(base)
    if base in CASTS:
        raise ValueError(f"codec {name!r}: {base} has no block and rounds to nearest; write {base} alone")
    if base == "topk" and rest and rest[-1] == STOCHASTIC:
        raise ValueError(f"codec {name!r}: top-k values are rounded to nearest only; leave :{STOCHASTIC} out")
    if base == "topk":
        return _topk(name, rest)
    if base == "codebook8":
        return _codebook(name, rest)
    if base == "dct":
        return _dct(name, rest)
    if base not in BLOCKS:
        raise ValueError(
            f'codec {name!r} is not known; use "identity", "bf16", one of {", ".join(BLOCKS)} with a block size as in "int4:64", '
            '"topk:64/4096:2", "codebook8:4096", or "dct:32/64"'
        )
    stochastic = bool(rest) and rest[-1] == STOCHASTIC
    sizes = rest[:-1] if stochastic else rest
    block = _size(sizes[0]) if len(sizes) == 1 else 0 if sizes else DEFAULT_BLOCK
    if len(sizes) > 1 or (len(rest) == 2 and not stochastic):
        raise ValueError(f"codec {name!r}: behind the block only :{STOCHASTIC} may stand, as in {base}:64:{STOCHASTIC}")
    if not _is_power(block, MIN_BLOCK, MAX_BLOCK):
        raise ValueError(
            f"codec {name!r}: the block is a power of two from {MIN_BLOCK} to {MAX_BLOCK}, as in {base}:64; behind it may stand "
            f":{STOCHASTIC}"
        )
    return CodecName(base, block, stochastic=stochastic)


def _topk(name: str, rest: list[str]) -> CodecName:
    kept, slash, chunk_text = (rest[0] if rest else "64/4096").partition("/")
    k, chunk, bits = _size(kept), _size(chunk_text), _size(rest[1]) if len(rest) > 1 else 2
    powers = _is_power(chunk, MIN_BLOCK, MAX_BLOCK) and _is_power(k, 4, chunk)
    if len(rest) > 2 or not slash or bits not in (2, 8) or not powers:
        raise ValueError(
            f'codec {name!r}: write "topk:K/CHUNK:BITS", as in "topk:64/4096:2"; K and CHUNK are powers of two, CHUNK from '
            f"{MIN_BLOCK} to {MAX_BLOCK}, K from 4 to CHUNK, and BITS is 2 or 8"
        )
    return CodecName("topk", chunk, k, bits)


def _codebook(name: str, rest: list[str]) -> CodecName:
    block = _size(rest[0]) if rest else MAX_BLOCK
    if len(rest) > 1 or not _is_power(block, MIN_CODEBOOK_BLOCK, MAX_BLOCK):
        raise ValueError(
            f'codec {name!r}: write "codebook8:BLOCK", as in "codebook8:4096"; BLOCK, whose elements share 256 means, is a power '
            f"of two from {MIN_CODEBOOK_BLOCK} to {MAX_BLOCK}"
        )
    return CodecName("codebook8", block)


def _dct(name: str, rest: list[str]) -> CodecName:
    kept, _, chunk_text = (rest[0] if rest else "32/64").partition("/")
    k, chunk = _size(kept), _size(chunk_text)
    if len(rest) > 1 or not _is_power(chunk, MIN_DCT_CHUNK, MAX_DCT_CHUNK) or not 1 <= k <= chunk**2:
        raise ValueError(
            f'codec {name!r}: write "dct:K/CHUNK", as in "dct:32/64"; CHUNK, the side of a square, is a power of two from '
            f"{MIN_DCT_CHUNK} to {MAX_DCT_CHUNK}, and K, what is kept of it, at most its square"
        )
    return CodecName("dct", chunk, k)


def _size(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _is_power(n: int, smallest: int, largest: int) -> bool:
    return smallest <= n <= largest and n & (n - 1) == 0

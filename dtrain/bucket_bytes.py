"""How large is a bucket, where nobody says it? A share of the model, within limits."""

from __future__ import annotations

MIN_BUCKET_BYTES = 2**19
"""Below it the cost of a message, not its length, is what an exchange takes: a bucket's round trip is about 1 ms of
threads."""

MAX_BUCKET_BYTES = 64 * 2**20

_FEW, _MANY, _FEW_UP_TO_BYTES = 8, 16, 64 * 2**20
"""Buckets of a model up to so many bytes, and of a larger one. Of 8 buckets a rank of an island of four has two. At least two
waves fly, so all of its round would be in memory at once: of a model of 203 MB more than a seventh of all that the rank keeps."""


def largest_bytes(model_bytes: int) -> int:
    """Of a bucket, where nobody says it: an eighth of the model, beyond 64 MiB a sixteenth, 8 MiB at least; within the limits
    above."""
    few = -(-min(model_bytes, _FEW_UP_TO_BYTES) // _FEW)
    return min(MAX_BUCKET_BYTES, max(MIN_BUCKET_BYTES, few, -(-model_bytes // _MANY)))

"""What is an algorithm? What to send and how to land it; in between, ``yield`` means "the bytes are on the wire".

``send`` is a generator. Until its first yield it may read and change the parameters; after it, it runs in the
background and touches only State and Link, and it may yield again for a further phase. ``land`` runs on the main
thread when its step has come. What survives a yield lies in State, which ``init`` creates whole, so that checkpoint
keys agree on every rank from step 0. ``grad`` rewrites gradients before the update. ``fused`` is landing, optimizer step
and sending in one pass over the parameters, for methods that have it. ``merged`` is told that the exact mean of all islands has
taken the place of the parameters, and ``rest`` that it is about to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from dtrain.bucket import Bucket, Layout
from dtrain.codec import State, Update
from dtrain.link import Link, Peers

Fused = Callable[[Bucket, State, Link, Update, bool], Iterator[None]]
"""(bucket, state, link, the optimizer's step, whether a round that arrived lands first): like ``land``, the step and ``send``."""


class Algorithm(NamedTuple):
    init: Callable[[Bucket], State]
    send: Callable[[Bucket, State, Link], Iterator[None]] | None = None
    land: Callable[[Bucket, State], None] | None = None
    grad: Callable[[Bucket, State, Link], Iterator[None]] | None = None
    fused: Fused | None = None
    merged: Callable[[Bucket, State], None] | None = None
    rest: Callable[[Bucket, State], None] | None = None


Method = Callable[[Layout, Peers], Algorithm]
"""An algorithm before it knows its bucket: binds codecs and paths to a layout."""

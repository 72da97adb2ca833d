"""How does a rank talk to more than one rank of another island? Over one transport a lane, which share an inbox."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dtrain.transport.base import Inbox, Left, Tag, Transport, nobody


class Lanes:
    """A wire takes the lane of its bucket; what is no bucket takes the first."""

    def __init__(self, transports: Mapping[int, Transport], lane_of: Mapping[int, int], inbox: Inbox) -> None:
        """``transports``: by lane, all of this inbox; ``lane_of``: a bucket's, filled in once buckets are cut."""
        self.inbox = inbox
        self.wires_on: torch.device = next(iter(transports.values())).wires_on
        self._transports, self._lane_of = transports, lane_of

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        self._of(tag).post(peer, tag, wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        self._of(tag).expect(peer, tag, wire_bytes)

    def forget(self, peer: int, tag: Tag) -> None:
        self._of(tag).forget(peer, tag)

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        for transport in self._transports.values():
            transport.close(drain_s=drain_s, left=left)

    def _of(self, tag: Tag) -> Transport:
        return self._transports[self._lane_of.get(tag.bucket, min(self._transports))]

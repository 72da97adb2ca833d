"""How do islands in one process talk? A hub of inboxes; for tests and ``dtrain sim``."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.transport.base import Inbox, Left, Tag, nobody


class LocalHub:
    """The inboxes of all islands of one process."""

    def __init__(self, num_islands: int) -> None:
        self.inboxes = [Inbox() for _ in range(num_islands)]

    def transport(self, node: int) -> LocalTransport:
        return LocalTransport(self, node)


class LocalTransport:
    def __init__(self, hub: LocalHub, node: int) -> None:
        self.inbox = hub.inboxes[node]
        self.wires_on = torch.device("cpu")
        self._hub = hub
        self._node = node

    def post(self, peer: int, tag: Tag, wire: Tensor) -> None:
        self._hub.inboxes[peer].deliver(self._node, tag, wire)

    def expect(self, peer: int, tag: Tag, wire_bytes: int) -> None:
        """Nothing to make ready: the sender puts the wire into the inbox."""

    def forget(self, peer: int, tag: Tag) -> None:
        """Nothing waits for it."""

    def close(self, *, drain_s: float, left: Left = nobody) -> None:
        """Nothing is under way: a post is a delivery."""

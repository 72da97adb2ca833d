"""How are islands made equal at the start, and averaged exactly at the end? Two exchanges outside the rounds, on the
same link.

Both are generators like an algorithm's ``send``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from dtrain.bucket import Layout
from dtrain.codec import Identity
from dtrain.link import Link, Peers
from dtrain.reduce import all_to_all

DIGEST_BYTES = 32


def align(x: Tensor, link: Link) -> Iterator[None]:
    """Compare the islands' values by hash; where one differs from island 0's, island 0 sends its own."""
    digest = torch.frombuffer(bytearray(hashlib.sha256(_bytes(x)).digest()), dtype=torch.uint8).to(x.device)
    others = [peer for peer in range(link.num_nodes) if peer != link.node]
    for peer in others:
        link.post(peer, digest)
        link.expect(peer, DIGEST_BYTES)
    yield
    digests = {peer: link.received(peer) for peer in others} | {link.node: digest}
    differing = [n for n in range(link.num_nodes) if not torch.equal(digests[n], digests[0])]
    if link.node == 0:
        whole = x.detach().clone().view(torch.uint8)
        for peer in differing:
            link.post(peer, whole)
    elif link.node in differing:
        link.expect(0, x.numel() * x.element_size())
    yield
    if link.node in differing:
        x.copy_(link.received(0).view(x.dtype))


def merge(layout: Layout, x: Tensor, out: Tensor, link: Link) -> Iterator[None]:
    """out <- mean over islands of x, in fp32 and node order, the same bits on every island."""
    path = all_to_all(Identity())(layout, Peers(link.node, link.num_nodes))
    yield from path.run(x.to(torch.float32), out, {}, link)


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()

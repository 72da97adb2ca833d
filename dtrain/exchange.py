"""What do islands exchange outside the rounds? A few facts, their values where they differ, and their exact mean.

All are generators like an algorithm's ``send``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dtrain.bucket import Layout
from dtrain.codec import plain
from dtrain.link import Link, Peers
from dtrain.reduce import all_to_all

DIGEST_BYTES = 32


def tell(own: Tensor, everyone: list[Tensor], link: Link) -> Iterator[None]:
    """Send one small uint8 tensor of a length that all know to all; fills ``everyone``, in node order."""
    for peer in link.others():
        link.post(peer, own)
        link.expect(peer, own.numel())
    yield
    everyone += [own if n == link.node else link.received(n) for n in range(link.num_nodes)]


def align(tensors: Sequence[Tensor], link: Link) -> Iterator[None]:
    """Compare the islands' values by hash; where one differs from island 0's, island 0 sends its own, byte for byte."""
    digest = torch.frombuffer(bytearray(_digest(tensors)), dtype=torch.uint8).to(tensors[0].device)
    digests: list[Tensor] = []
    yield from tell(digest, digests, link)
    digests = [d.cpu() for d in digests]
    differing = [n for n in range(link.num_nodes) if not torch.equal(digests[n], digests[0])]
    if link.node == 0 and differing:
        whole = torch.cat([_bytes(x).clone() for x in tensors])
        for peer in differing:
            link.post(peer, whole)
    elif link.node in differing:
        link.expect(0, sum(x.numel() * x.element_size() for x in tensors))
    yield
    if link.node in differing:
        received, offset = link.received(0), 0
        for x in tensors:
            size = x.numel() * x.element_size()
            # The copy starts at an address that every dtype can be read from.
            x.copy_(received[offset : offset + size].clone().view(x.dtype).view(x.shape))
            offset += size


def merge(layout: Layout, x: Tensor, out: Tensor, link: Link) -> Iterator[None]:
    """out <- mean over islands of x, in fp32 and node order, the same bits on every island."""
    path = all_to_all(plain("identity"))(layout, Peers(link.node, link.num_nodes))
    yield from path.run(x.to(torch.float32), out, {}, link)


def _digest(tensors: Sequence[Tensor]) -> bytes:
    hashed = hashlib.sha256()
    for x in tensors:
        hashed.update(_bytes(x).cpu().numpy().data)
    return hashed.digest()


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)

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
    digests: list[Tensor] = []
    yield from tell(digest(tensors).to(tensors[0].device), digests, link)
    digests = [d.cpu() for d in digests]
    yield from _give(tensors, [n for n in range(link.num_nodes) if not torch.equal(digests[n], digests[0])], link)


def replace(tensors: Sequence[Tensor], differing: Sequence[int], link: Link) -> Iterator[None]:
    """Island 0 sends these islands its values, byte for byte, and hears of each that has them: no more is under way to one
    that is slow."""
    yield from _give(tensors, differing, link)
    if link.node == 0:
        for peer in differing:
            link.expect(peer, 1)
    elif link.node in differing:
        link.post(0, torch.zeros(1, dtype=torch.uint8, device=tensors[0].device))
    yield


def _give(tensors: Sequence[Tensor], differing: Sequence[int], link: Link) -> Iterator[None]:
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


def digest(tensors: Sequence[Tensor]) -> Tensor:
    """(DIGEST_BYTES) uint8, on the CPU."""
    hashed = hashlib.sha256()
    for x in tensors:
        hashed.update(_bytes(x).cpu().numpy().data)
    return torch.frombuffer(bytearray(hashed.digest()), dtype=torch.uint8)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().view(-1).view(torch.uint8)

"""By what path do groups of neighbouring islands bring their payloads together, so that one a group crosses the far link?

Of groups of k islands, island p of a group owns the bucket there; of island i of group g, x_gi is the payload:
    first    the others send x_gi to their group's owner, whose y_g = mean_i x_gi, in island order;
    between  the owners, one a group, bring the y_g together by the path within (``reduce.py``, ``low_rank.py``);
    last     each owner sends the result to its group.
The first and the last are fp32 and stay near; whatever the codec within loses is lost, and kept for later, by owners alone. All
islands of a group use the bits that its owner sent, the owner too, and owners end with the same as the path within gives them.

Bytes of a bucket of m elements, H those of a header: an island that owns it not sends H + 4 m, near; its owner (k - 1)(H + 4 m),
near, and what the path within sends of m elements among as many nodes as there are groups, far."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dtrain.bucket import Layout
from dtrain.codec import State, plain
from dtrain.combine import mean
from dtrain.link import Link, Peers, carried
from dtrain.reduce import BoundReduce, Reduce, encoder
from dtrain.topology.static import complete


def hierarchical(within: Reduce, islands: int, owner: int) -> Reduce:
    """``islands`` of neighbouring numbers are a group, and ``owner`` is the place in it that owns the bucket."""

    def bind(layout: Layout, peers: Peers) -> BoundReduce:
        group, place = divmod(peers.node, islands)
        across = Peers(group, peers.num_nodes // islands)
        path = within(layout, across)
        codec = plain("identity").bind(layout, peers.node)
        encode = encoder(codec)
        first = group * islands
        owners = range(owner, peers.num_nodes, islands)
        others = [node for node in range(first, first + islands) if node != peers.node]

        def init(device: torch.device) -> State:
            return path.init(device) if place == owner else {}

        def own(x: Tensor, out: Tensor, state: State, link: Link) -> Iterator[None]:
            sent = encode(x, {}, link)
            for node in others:
                link.expect(node, codec.wire_bytes, codec.check)
            yield
            wires = [sent if node == link.node else link.received(node) for node in range(first, first + islands)]
            mean(out, wires, [1] * islands, codec)
            row = complete(0, across.node, across.num_nodes)
            far = Link(across.node, across.num_nodes, row, link.round, keeps_nothing=link.keeps_nothing)
            yield from carried(path.run(out, out, state, far), far, link, owners)
            result = encode(out, {}, link)
            for node in others:
                link.post(node, result)
            codec.decode_add(result, out.zero_(), weight=1.0)

        def follow(x: Tensor, out: Tensor, state: State, link: Link) -> Iterator[None]:
            link.post(first + owner, encode(x, {}, link))
            yield
            for _ in range(path.phases):  # the owner's, whose wires are numbered by them
                yield
            link.expect(first + owner, codec.wire_bytes, codec.check)
            yield
            codec.decode_add(link.received(first + owner), out.zero_(), weight=1.0)

        return BoundReduce(init, own if place == owner else follow, phases=path.phases + 2)

    return bind

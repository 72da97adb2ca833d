"""By what path are the islands' payloads brought together?

An algorithm runs a reduce by ``yield from``: it encodes before the first yield, and between yields the bytes fly. A mean weighs
each island by its share (``Peers.shares``).
Bytes an island sends for n islands and a wire of w bytes: gather (n - 1) w; all-to-all 2 (n - 1) / n w, whatever n.
(Gossip's path, neighbours, is part of its algorithms: what arrives is mixed where it lands.)"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.bucket import Layout
from dtrain.codec import BoundCodec, Codec, ErrorFeedback, State
from dtrain.combine import Combine, mean
from dtrain.link import Link, Peers
from dtrain.spans import room


class BoundReduce(NamedTuple):
    init: Callable[[torch.device], State]
    """Residuals of the codecs."""
    run: Callable[[Tensor, Tensor, State, Link], Iterator[None]]
    """(payload fp32, out fp32, state, link). The payload is read before the first yield only; it may be out
    itself."""
    phases: int
    """How often it yields."""
    takes_back: bool = False
    """Whether a payload that is left out of its round (``Link.left_out``) goes out with the next one by itself."""


Reduce = Callable[[Layout, Peers], BoundReduce]


def gather(codec: Codec, combined: Callable[[Layout], Combine] = lambda layout: mean) -> Reduce:
    """Each island sends its wire to all others; everyone combines all wires, its own decoded bytes included. Where the round's
    row draws some of them, those alone encode and send, and all combine theirs. Of a round that is without some islands, the
    members' are combined; an island that is none gets what it sent back into its residual, where it has one:
    e <- e + decode(wire), as if nothing had been sent."""

    def bind(layout: Layout, peers: Peers) -> BoundReduce:
        bound = codec.bind(layout, peers.node)
        combine, encode, shares = combined(layout), encoder(bound), peers.shares
        takes_back = isinstance(codec, ErrorFeedback)

        def run(x: Tensor, out: Tensor, state: State, link: Link) -> Iterator[None]:
            wires = {link.node: encode(x, state, link)} if link.row.self_weight else {}
            told, heard = set(link.row.sends), {peer for peer, _ in link.row.recvs}
            for peer in link.others():
                if peer in told:
                    link.post(peer, wires[link.node])
                if peer in heard:
                    link.expect(peer, bound.wire_bytes, bound.check)
            yield
            senders = sorted({*wires, *heard} if link.members is None else link.members)
            of = wires | {peer: link.received(peer) for peer in senders if peer != link.node}
            combine(out, [of[j] for j in senders], [shares[j] for j in senders], bound)
            if link.left_out and takes_back:
                bound.decode_add(wires[link.node], state["residual"], weight=1.0)

        return BoundReduce(bound.init, run, phases=1, takes_back=takes_back)

    return bind


def all_to_all(codec: Codec) -> Reduce:
    """Reduce-scatter, then all-gather: part j of every payload goes to node j, which combines it and sends the result
    to all.

    The owner encodes the combined part again (with a residual of its own where the codec keeps one) and uses its own
    decoded bytes like everyone else, so that all islands end with the same bits."""

    def bind(layout: Layout, peers: Peers) -> BoundReduce:
        cuts = layout.cuts(peers.num_nodes, codec.grain)
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        bound = [codec.bind(layout.part(p.start, p.stop), peers.node) for p in parts]
        encoders, shares = [encoder(b) for b in bound], peers.shares
        mine = bound[peers.node]
        # The owner's second rounding draws other random bits than its first, or the two would not cancel out.
        mine_layout = layout.part(parts[peers.node].start, parts[peers.node].stop)
        encode_mine = encoder(codec.bind(mine_layout, peers.num_nodes + peers.node))
        part = Scratch(parts[peers.node].stop - parts[peers.node].start)

        def init(device: torch.device) -> State:
            state = {f"to{j}.{k}": v for j, b in enumerate(bound) for k, v in b.init(device).items()}
            return state | {f"owner.{k}": v for k, v in mine.init(device).items()}

        def run(x: Tensor, out: Tensor, state: State, link: Link) -> Iterator[None]:
            of = split(state)
            wires = [encode(x[p], of[f"to{j}"], link) for j, (encode, p) in enumerate(zip(encoders, parts, strict=True))]
            for peer in link.others():
                link.post(peer, wires[peer])
                link.expect(peer, mine.wire_bytes, mine.check)
            yield
            combined = part.on(out.device, link)
            mean(combined, [wires[j] if j == link.node else link.received(j) for j in range(link.num_nodes)], shares, mine)
            result = encode_mine(combined, of["owner"], link)
            del wires, combined  # the second phase keeps none of the first's memory
            for peer in link.others():
                link.post(peer, result)
                link.expect(peer, bound[peer].wire_bytes, bound[peer].check)
            yield
            out.zero_()
            for j, (b, p) in enumerate(zip(bound, parts, strict=True)):
                b.decode_add(result if j == link.node else link.received(j), out[p], weight=1.0)

        return BoundReduce(init, run, phases=2)

    return bind


def encoder(codec: BoundCodec) -> Callable[[Tensor, State, Link], Tensor]:
    """Encode into a wire that is made once and written again each round; into a fresh one where the link keeps nothing."""
    made: list[Tensor] = []

    def encode(x: Tensor, state: State, link: Link) -> Tensor:
        if link.keeps_nothing:
            wire = codec.fresh_wire(x.device)
            link.fresh.append(wire)
        else:
            if not made:
                made.append(room(codec.new_wire(x.device)))
            wire = made[0]
        codec.encode(x, wire, state)
        return wire

    return encode


class Scratch:
    """fp32 that no one reads after the round, made once, or each time where the link keeps nothing."""

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._made: Tensor | None = None

    def on(self, device: torch.device, link: Link) -> Tensor:
        if link.keeps_nothing:
            return torch.empty(self._numel, device=device)
        if self._made is None:
            self._made = room(torch.empty(self._numel, device=device))
        return self._made


def split(state: State) -> Mapping[str, State]:
    """``init``'s residuals by what stands before the dot, in one pass: 1,000 parts have 1,000."""
    of: defaultdict[str, State] = defaultdict(dict)
    for name, tensor in state.items():
        part, _, own = name.partition(".")
        of[part][own] = tensor
    return of

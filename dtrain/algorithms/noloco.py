"""Local training with an outer optimizer, and pairs in place of all: no island ever waits for more than one other.

NoLoCo (Kolehmainen et al. 2025, arXiv 2506.10911): every H steps all islands are paired at random, and with means over a pair (or
over the one island that an odd number leaves alone), C any codec,
    Delta = theta - phi;   u <- a u + b mean C(Delta) - g (C(phi) - mean C(phi));   phi <- phi + u;   theta <- phi.
Both vectors travel in one wire. With a delay, as in ``diloco.py``, what was done in flight stays: theta <- phi + (theta - sent).
What C loses of phi is in both islands' difference and moves no mean; what it loses of Delta is lost. The mean over all islands
goes as with a heavy ball of all: u <- a u + b mean Delta. Which (a, b, g) do not drive islands apart: ``pair_momentum.py``.
Anchors differ between islands, so an exact average is a new start: phi = x, u = 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from dtrain.algorithm import Algorithm, Method
from dtrain.algorithms.arrivals import Arrivals
from dtrain.bucket import Bucket, Layout
from dtrain.codec import Codec, State
from dtrain.link import Link, Peers


def noloco(codec: Codec, lr: float, momentum: float, gamma: float) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        n = layout.numel
        bound = codec.bind(_twice(layout), peers.node)
        arrivals = Arrivals(bound, min(1, peers.num_nodes - 1))

        def init(b: Bucket) -> State:
            anchor = b.x.to(torch.float32).clone()
            zeros = {name: torch.zeros_like(anchor) for name in ("momentum", "sent")}
            own = {"both": torch.zeros(2 * n, device=b.x.device), "own": bound.new_wire(b.x.device)}
            return {"anchor": anchor} | zeros | own | arrivals.init(b.x.device) | bound.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            both, sent = state["both"], state["sent"]
            sent.copy_(b.x)
            both[:n].copy_(state["anchor"])
            torch.sub(sent, state["anchor"], out=both[n:])
            state["own"] = own = link.room(state["own"], bound)
            bound.encode(both, own, state)
            yield from arrivals.fly(state, link)

        def land(b: Bucket, state: State) -> None:
            both, u, anchor = state["both"], state["momentum"], state["anchor"]
            wires, _ = arrivals.arrived(state)
            if wires:
                both.zero_()
                bound.decode_add(state["own"], both, weight=0.5)
                both[:n].neg_()
                bound.decode_add(wires[0], both, weight=0.5)
            else:  # alone, and both is still what was sent
                both[:n].zero_()
            u.mul_(momentum).add_(both[n:], alpha=lr).add_(both[:n], alpha=gamma)
            anchor.add_(u)
            # x - sent is exactly zero where nothing moved in flight, so a round without delay lands exactly on the anchor.
            b.x.sub_(state["sent"]).add_(anchor)

        def merged(b: Bucket, state: State) -> None:
            state["anchor"].copy_(b.x)
            state["momentum"].zero_()

        return Algorithm(init, send, land, merged=merged)

    return bind


def _twice(layout: Layout) -> Layout:
    """Of two vectors behind each other."""
    n = layout.numel
    return Layout((*layout.spans, *(replace(s, start=s.start + n, stop=s.stop + n) for s in layout.spans)))

"""Local training with an outer optimizer on the islands' mean progress.

DiLoCo (Douillard et al. 2023, arXiv 2311.08105): every H steps
    delta_i = theta - x_i;   delta = mean_i delta_i;   theta <- Outer(theta, delta);   x_i <- theta.
With a delay the round flies while training goes on, and what the island did meanwhile must not be lost. Four landings:
    keep:   x_i <- theta' + (x_i - x_i,sent): the new anchor, and the progress made in flight on top.
            A round may be without some islands (arXiv 2604.21428): delta is the mean over its members, and one that is none keeps
            all its progress, x_i <- theta' + (x_i - theta), so that delta_i = theta' - x_i has it all in the next round.
    blend:  (arXiv 2501.18512) x_i <- alpha x_i + (1 - alpha) theta'; what alpha takes of that progress stays in the next delta_i.
    eager:  (arXiv 2502.12996) the island's own share is applied at once and the rest a round later,
            g_i^t = delta_i^t / n + (delta^{t-1} - delta_i^{t-1} / n);   theta_i <- Outer(theta_i, g_i^t);   x_i <- theta_i.
            What the others did in the last round is applied before an exact average.
    pure:   (DiLoCoX, arXiv 2506.21263) the whole round is applied a round later,
            delta_i^t = theta - x_i;   theta <- Outer(theta, delta^{t-1});   x_i <- theta, and delta_i^t is sent.
            The first has no round before it, and x_i goes on where it is; the second's delta_i^t is counted from there.
            The last one's is applied before an exact average.
Without delay, keep is DiLoCo to the bit, and so is blend with alpha = 0; with one island, eager is.

An exact average that takes the parameters' place (``rest``) comes after a round that eager and pure have not applied. It is then,
theta -> theta', and x_i <- theta' + (x_i - theta), so that the average has every delta_i^s once, s = 1 ... t, as an Outer has
that is given all delta^s in time. Of pure that is one more update: theta' = Outer(theta, delta^t). Of eager each late part,
l_i^s = delta^s - delta_i^s / n, has come an update late, and with Nesterov's u and mu in time means
    theta_i' = theta_i - lr ((1 + mu) l_i^t + mu^2 L_i),   u_i' = u_i + l_i^t - (1 - mu) L_i,   L_i = sum_s<t mu^(t-1-s) l_i^s.
L_i is kept, with momentum: L_i <- mu L_i + l_i at each update that takes l_i along. One more update instead would move all of u
once more, an island's own part too. A round of eager that has not landed is no part of the average, nor is one dropped.

Islands of unequal speed (``slots.py``) count by the steps that they trained: mean_i = sum_i w_i, and eager's 1 / n is w_i.
Where rounds have participants, FedAvg's drawn clients (arXiv 1602.05629), the mean is that of K islands, drawn anew each round:
they alone send, and all take the result. What the others trained since the last round is given up."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dtrain import payload
from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import State
from dtrain.link import Link, Peers
from dtrain.outer import Outer
from dtrain.reduce import Reduce


def diloco_keep(reduce: Reduce, outer: Outer) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)

        def init(b: Bucket) -> State:
            anchor = b.x.to(torch.float32).clone()
            state = {"anchor": anchor, "sent": torch.zeros_like(anchor), "delta": torch.zeros_like(anchor)}
            return state | outer.init(anchor) | path.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            state["sent"].copy_(b.x)
            payload.pseudo_gradients(b, state, state["delta"])
            yield from path.run(state["delta"], state["delta"], state, link)
            if link.left_out and not path.takes_back:
                state["sent"].copy_(state["anchor"])

        def land(b: Bucket, state: State) -> None:
            outer.land(b.x, state["sent"], state["anchor"], state["delta"], state)

        return Algorithm(init=init, send=send, land=land)

    return bind


def diloco_eager(reduce: Reduce, outer: Outer) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)
        share = peers.shares[peers.node] / sum(peers.shares)

        def init(b: Bucket) -> State:
            anchor = b.x.to(torch.float32).clone()
            names = ("own", "delta", "late", "lag") if outer.momentum else ("own", "delta", "late")
            zeros = {name: torch.zeros_like(anchor) for name in names}
            return {"anchor": anchor} | zeros | outer.init(anchor) | path.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            own = state["own"]
            payload.pseudo_gradients(b, state, own)
            if outer.momentum:
                state["lag"].mul_(outer.momentum).add_(state["late"])
            outer.update(state["anchor"], state["late"].add_(own, alpha=share), state)
            state["late"].zero_()  # a round that is dropped leaves nothing to be applied again
            b.x.copy_(state["anchor"])
            yield from path.run(own, state["delta"], state, link)

        def land(b: Bucket, state: State) -> None:
            torch.sub(state["delta"], state["own"], alpha=share, out=state["late"])

        def rest(b: Bucket, state: State) -> None:
            lag = state["lag"] if outer.momentum else state["late"]
            if bool(state["late"].any()) or bool(lag.any()):
                b.x.sub_(state["anchor"])
                outer.catch_up(state["anchor"], state["late"], lag, state)
                b.x.add_(state["anchor"])
                state["late"].zero_()
                lag.zero_()

        return Algorithm(init=init, send=send, land=land, rest=rest)

    return bind


def diloco_pure(reduce: Reduce, outer: Outer) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)

        def init(b: Bucket) -> State:
            anchor = b.x.to(torch.float32).clone()
            state = {"anchor": anchor, "begun": anchor.clone(), "delta": torch.zeros_like(anchor)}
            return state | {"before": torch.zeros((), dtype=torch.int64)} | outer.init(anchor) | path.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            begun, delta = state["begun"], state["delta"]
            late = bool(state["before"])
            if late:
                outer.update(state["anchor"], delta, state)
            torch.sub(begun, b.x, out=delta)
            if late:
                b.x.copy_(state["anchor"])
            begun.copy_(b.x)
            state["before"].zero_()
            yield from path.run(delta, delta, state, link)
            state["before"].fill_(1)  # a round that is dropped leaves this island's own delta alone, which none applies

        def rest(b: Bucket, state: State) -> None:
            if bool(state["before"]):
                outer.land(b.x, state["begun"], state["anchor"], state["delta"], state)
                state["begun"].copy_(state["anchor"])
                state["before"].zero_()  # what follows is a first round again

        return Algorithm(init=init, send=send, rest=rest)

    return bind


def diloco_blend(reduce: Reduce, outer: Outer, alpha: float) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        path = reduce(layout, peers)

        def init(b: Bucket) -> State:
            anchor = b.x.to(torch.float32).clone()
            return {"anchor": anchor, "delta": torch.zeros_like(anchor)} | outer.init(anchor) | path.init(b.x.device)

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            payload.pseudo_gradients(b, state, state["delta"])
            yield from path.run(state["delta"], state["delta"], state, link)

        def land(b: Bucket, state: State) -> None:
            outer.update(state["anchor"], state["delta"], state)
            b.x.mul_(alpha).add_(state["anchor"], alpha=1 - alpha)

        return Algorithm(init=init, send=send, land=land)

    return bind

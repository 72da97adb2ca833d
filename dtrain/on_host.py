"""How does a method's state lie in CPU memory, and none of it on the device that trains? It is bound to a mirror of its bucket.

The mirror takes x before the method reads it and gives it back after the method wrote to it. All the method's work on a round is
the CPU's then, by the CPU's kernels: payload, encoding, decoding and the outer step, which are seldom. Nothing but x passes
between the two, as plain copies on the main thread between two optimizer steps, so bits are those of the method on a CPU. The
mirror is not State: it is filled anew whenever it is used, and a checkpoint is the same with it and without. It stays where a
round's buffers do, and is made for each round where the link keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dtrain.algorithm import Algorithm, Method
from dtrain.bucket import Bucket, Layout
from dtrain.codec import State
from dtrain.link import Link, Peers
from dtrain.spans import moving, room

_HOST = torch.device("cpu")


def on_host(method: Method, *, moves: bool) -> Method:
    """``method`` with its State on the host, pinned where x lies on a GPU. ``moves``: whether to send changes the parameters."""

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        inner = method(layout, peers)
        assert inner.grad is None, "gradients are exchanged before each update, and stay where they are"
        assert inner.fused is None, "a fused pass is over parameters and state together"
        mirrors: list[Tensor] = []

        def new(b: Bucket) -> Tensor:
            return _pinned(torch.empty_like(b.x, device=_host_of(b.x)), b.x)

        def mirrored(b: Bucket) -> Bucket:
            """In the mirror that a round has left, if it has."""
            return replace(b, x=mirrors[0] if mirrors else new(b))

        def init(b: Bucket) -> State:
            x = torch.empty_like(b.x, device=_host_of(b.x))
            _copy(b.x, x)
            return {name: _pinned(value, b.x) for name, value in inner.init(replace(b, x=x)).items()}

        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            assert inner.send is not None
            if not link.keeps_nothing and not mirrors:
                mirrors.append(room(new(b)))
            host = mirrored(b)
            _copy(b.x, host.x)
            link.wires_on = host.x.device
            flight = inner.send(host, state, link)
            flies = next(flight, flight) is None
            if moves:
                _copy(host.x, b.x)
            if flies:
                yield
                yield from flight

        def through(of: Callable[[Bucket, State], None]) -> Callable[[Bucket, State], None]:
            def run(b: Bucket, state: State) -> None:
                host = mirrored(b)
                _copy(b.x, host.x)
                of(host, state)
                _copy(host.x, b.x)

            return run

        def merged(b: Bucket, state: State) -> None:
            assert inner.merged is not None
            host = mirrored(b)
            _copy(b.x, host.x)
            inner.merged(host, state)

        lands, rests = (None if of is None else through(of) for of in (inner.land, inner.rest))
        return Algorithm(init, send, lands, merged=None if inner.merged is None else merged, rest=rests)

    return bind


def _host_of(x: Tensor) -> torch.device:
    return x.device if x.is_meta else _HOST  # the plan's, which has no memory anywhere


def _pinned(host: Tensor, x: Tensor) -> Tensor:
    return host.pin_memory() if x.is_cuda else host


def _copy(x: Tensor, out: Tensor) -> None:
    """Done when it returns: the other side may be written again."""
    with moving("copy", x, out):
        out.copy_(x)

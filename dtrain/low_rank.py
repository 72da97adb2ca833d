"""By what path does a bucket go whose matrices are sent as products of two thin ones?

One step of power iteration a round, as in PowerSGD (Vogels et al. 2019, arXiv 1905.13727), with coded factors (DiLoCoX, arXiv
2506.21263). Of a matrix x_i (m x k) of island i, with e_i what it has not sent and Q (k x r) from the round before:
    M_i = x_i + e_i;   P = orth(mean_i C(M_i Q));   Q_i = C(M_i^T P);   Q = mean_i Q_i;
    out = P Q^T;   e_i <- M_i - P Q_i^T.
P is the same on all islands, so mean_i e_i = mean_i M_i - out to rounding, whatever C lost of either factor: nothing is lost,
only late. Both means are ``gather``'s: each island sends its wire to all others and decodes all, its own included, in node order.
What is no matrix rides in the first wire and has the same feedback: e <- x + e - C(x + e).

With ``adapts`` a matrix has as many columns as its results needed of late, R at most, those at first: DiLoCoX's mean of the last
c = WINDOW rounds' effective ranks, rounded up to a multiple of ADAPT_BY. A round's is how many directions hold ENOUGH of the
squared size of a whole of which r came: s_1 >= ... >= s_r, the singular values of Q, as P is orthonormal, and at most s_r for
each of the other min(m, k) - r. Were the whole what came, r columns would need ENOUGH r, whatever they leave behind, and R would
fall without end. Island 0 finds the ranks and tells the others in a wire of its own, so that all have the same, whatever their
machines make of Q. (``core.py``: the steps between rounds may follow.)

Each column of a factor has scales of its own: beside the first columns, the largest, the others would round to nothing.

All islands end with the same bits, also on unlike machines, and whatever precision a user sets for products of fp32:
what all reckon by themselves, P and P Q^T, is exact or of operations that IEEE 754 defines (``same_products.py``); what is an
island's own is sent."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.bucket import Layout, Span
from dtrain.codec import BoundCodec, Codec, State, plain
from dtrain.combine import mean
from dtrain.link import Link, Peers
from dtrain.reduce import BoundReduce, Reduce, Scratch, encoder, split
from dtrain.same_products import exact_product, orthonormal, product, subtract_product
from dtrain.spans import moving, span

RankOf = Callable[[Span], int]
"""Columns of the factors by which a parameter is sent; 0: as it is. A parameter that has some lies whole in its bucket."""


_TINY = 1e-30

WINDOW = 5
"""Rounds."""
ADAPT_BY = 8
"""Columns; also the fewest."""
ENOUGH = 0.95

_TELLS = 0
"""The island that says which ranks the next round has."""


class _Matrix(NamedTuple):
    """A parameter of a bucket, and where its factors lie among a wire's numbers: the columns of P and Q as rows."""

    name: str
    place: int
    """Among the bucket's parameters."""
    start: int
    shape: tuple[int, int]
    rank: int
    p_start: int
    q_start: int

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, x: Tensor) -> Tensor:  # (bucket) -> (m, k)
        return x[self.start : self.start + self.numel].view(self.shape)

    def p_of(self, values: Tensor) -> Tensor:  # (r, m)
        return values[self.p_start : self.p_start + self.rank * self.shape[0]].view(self.rank, -1)

    def q_of(self, values: Tensor) -> Tensor:  # (r, k)
        return values[self.q_start : self.q_start + self.rank * self.shape[1]].view(self.rank, -1)


class _Cut(NamedTuple):
    """What of a bucket goes in which wire."""

    matrices: tuple[_Matrix, ...]
    rest: tuple[tuple[Span, int], ...]
    """Parameters that go as they are, and where they begin among the first wire's numbers."""
    first: Layout
    """The rest, then every P."""
    second: Layout
    """Every Q."""

    def pairs(self, bucket: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest in both."""
        return ((bucket[s.start : s.stop], values[at : at + s.numel]) for s, at in self.rest)

    def passing(self, name: str, times: int) -> AbstractContextManager[None]:
        """``span`` of work that goes through all matrices so often; their factors are small beside them."""
        return span(name, 4 * times * sum(a.numel for a in self.matrices))


class _Laid(NamedTuple):
    """A bucket for some ranks."""

    cut: _Cut
    first: _Wire
    second: _Wire


def ranks_now(state: State) -> list[int]:
    """Of a bucket's matrices, in its next round; of a path that ``adapts``."""
    return [rank for rank in state["ranks"].tolist() if rank]


def low_rank(codec: Codec, rank_of: RankOf, *, feedback_decay: float | None, adapts: bool = False) -> Reduce:
    """``codec`` is without error feedback: what it loses of a factor is a part of what the product lacks. ``feedback_decay``:
    ``codec.ErrorFeedback``'s beta, by which e_i is multiplied before x_i comes to it; None: without feedback. With ``adapts``
    ``rank_of`` says the ranks at first."""

    def bind(layout: Layout, peers: Peers) -> BoundReduce:
        at_first = tuple(rank_of(s) for s in layout.spans)

        @lru_cache(maxsize=1)
        def laid(ranks: tuple[int, ...]) -> _Laid:
            cut = _cut(layout, ranks, codec.grain)
            # Rounding by chance draws other bits for the second factor, or its errors would go with those of the first.
            first, second = codec.bind(cut.first, peers.node), codec.bind(cut.second, peers.num_nodes + peers.node)
            return _Laid(cut, _Wire(first, peers), _Wire(second, peers))

        cut, first, second = laid(at_first)
        told = _Told([a.place for a in cut.matrices], peers) if adapts else None
        room, unsent = Scratch(max(cut.first.numel, cut.second.numel)), Scratch(layout.numel)

        def init(device: torch.device) -> State:
            state = {f"warm.{a.name}": _start(a, device) for a in cut.matrices}
            for name, wire in (("first", first), ("second", second)):
                state |= {f"{name}.{key}": value for key, value in wire.codec.init(device).items()}
            if feedback_decay is not None:
                state["residual"] = torch.zeros(layout.numel, device=device)
            if adapts:
                needed = torch.zeros(WINDOW, len(at_first), dtype=torch.int64)
                state |= {"ranks": torch.tensor(at_first), "needed": needed, "rounds": torch.tensor(0)}
            return state

        def run(x: Tensor, out: Tensor, state: State, link: Link) -> Iterator[None]:
            of = split(state)
            cut, first, second = laid(tuple(state["ranks"].tolist()) if adapts else at_first)
            values = room.on(x.device, link)[: cut.first.numel]
            kept = state["residual"] if feedback_decay is not None else unsent.on(x.device, link).zero_()
            with moving("encode", x, kept, kept):
                if feedback_decay not in (None, 1.0):
                    kept.mul_(feedback_decay)
                kept.add_(x)
            with cut.passing("encode", 1):
                for own, value in cut.pairs(kept, values):
                    value.copy_(own)
                for a in cut.matrices:
                    product(of["warm"][a.name][: a.rank], a.of(kept).T, a.p_of(values))
            first.post(values, of["first"], link)
            yield
            if feedback_decay is not None:
                first.own(values)
                for own, value in cut.pairs(kept, values):
                    own.sub_(value)
            first.mean(values, link)
            for combined, value in cut.pairs(out, values):
                combined.copy_(value)
            if not cut.matrices:
                return
            with cut.passing("encode", 1):
                bases = [orthonormal(a.p_of(values)) for a in cut.matrices]
                values = room.on(x.device, link)[: cut.second.numel]
                for a, p in zip(cut.matrices, bases, strict=True):
                    product(p, a.of(kept), a.q_of(values))
            second.post(values, of["second"], link)
            yield
            if feedback_decay is not None:
                second.own(values)
                with cut.passing("decode", 2):
                    for a, p in zip(cut.matrices, bases, strict=True):
                        subtract_product(p, a.q_of(values), a.of(kept))
            second.mean(values, link)
            with cut.passing("decode", 1):
                for a, p in zip(cut.matrices, bases, strict=True):
                    exact_product(p, a.q_of(values), a.of(out))
                    _scaled(a.q_of(values), of["warm"][a.name][: a.rank])
            if told is None:
                return
            if peers.node == _TELLS and not x.is_meta:
                _adapt(cut, at_first, values, state)
            told.post(state["ranks"], x.device, link)
            yield
            told.take(state["ranks"], link)

        return BoundReduce(init, run, phases=(3 if adapts else 2) if cut.matrices else 1)

    return bind


class _Wire:
    """One of a round's two."""

    def __init__(self, codec: BoundCodec, peers: Peers) -> None:
        self.codec = codec
        self._encode = encoder(codec)
        self._shares = peers.shares
        self._posted = torch.empty(0)

    def post(self, values: Tensor, state: State, link: Link) -> None:
        self._posted = self._encode(values, state, link)
        for peer in link.others():
            link.post(peer, self._posted)
            link.expect(peer, self.codec.wire_bytes, self.codec.check)

    def own(self, values: Tensor) -> None:
        """values <- what was posted, as all decode it."""
        values.zero_()
        self.codec.decode_add(self._posted, values, weight=1.0)

    def mean(self, values: Tensor, link: Link) -> None:
        """values <- the mean over islands of what they posted."""
        wires = [self._posted if j == link.node else link.received(j) for j in range(link.num_nodes)]
        mean(values, wires, self._shares, self.codec)
        self._posted = torch.empty(0)  # what is made once has others who keep it


class _Told:
    """The wire by which one island tells the others a few whole numbers, each below 2^24 and so itself in fp32."""

    def __init__(self, places: Sequence[int], peers: Peers) -> None:
        span = Span("ranks", (len(places),), 0, 0, len(places))
        self._places = list(places)
        self._codec = plain("identity").bind(Layout((span,)), peers.node)
        self._encode = encoder(self._codec)

    def post(self, numbers: Tensor, device: torch.device, link: Link) -> None:
        """Of ``numbers``, int64 on the CPU, those at the places."""
        if link.node != _TELLS:
            link.expect(_TELLS, self._codec.wire_bytes, self._codec.check)
            return
        wire = self._encode(numbers[self._places].to(device, torch.float32), {}, link)
        for peer in link.others():
            link.post(peer, wire)

    def take(self, numbers: Tensor, link: Link) -> None:
        if link.node != _TELLS and not (wire := link.received(_TELLS)).is_meta:
            heard = torch.zeros(len(self._places), device=wire.device)
            self._codec.decode_add(wire, heard, weight=1.0)
            numbers[self._places] = heard.cpu().long()


def _adapt(cut: _Cut, most: Sequence[int], values: Tensor, state: State) -> None:
    """Note what this round needed, and find the next one's ranks, of each parameter so many at most."""
    rounds, needed, ranks = state["rounds"], state["needed"], state["ranks"]
    for a in cut.matrices:
        needed[int(rounds) % WINDOW, a.place] = min(most[a.place], _needed(a.q_of(values), min(a.shape)))
    rounds += 1
    if int(rounds) >= WINDOW:
        for a in cut.matrices:
            mean = -(-int(needed[:, a.place].sum()) // (WINDOW * ADAPT_BY)) * ADAPT_BY
            ranks[a.place] = min(most[a.place], max(mean, ADAPT_BY))


def _needed(q: Tensor, directions: int) -> int:
    """The fewest of so many directions that hold ENOUGH of the squared size, where q (r, k) has the r largest and each other is
    as large as the least of these; r of zeros, and of what is not finite."""
    q = q.double().cpu()
    if not bool(q.isfinite().all()):
        return len(q)
    sizes = torch.linalg.eigvalsh(q @ q.T).flip(0).clamp_min(0)
    held = torch.cat([sizes, sizes[-1:].expand(directions - len(q))]).cumsum(0)
    return 1 + int((held < ENOUGH * held[-1]).sum()) if float(held[-1]) > 0 else len(q)


def _scaled(q: Tensor, out: Tensor) -> None:
    """out <- q, the largest number of each row 1: the space of the rows is what counts, and products of products vanish."""
    torch.div(q, q.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY), out=out)


def _start(a: _Matrix, device: torch.device) -> Tensor:
    """The first Q: the same on all islands, whatever their machines, as its numbers are whole multiples of 2^-23."""
    if device.type == "meta":
        return torch.empty(a.rank, a.shape[1], device=device)
    drawn = torch.rand(a.rank, a.shape[1], generator=torch.Generator().manual_seed(zlib.crc32(a.name.encode())))
    return (2 * drawn - 1).to(device)


def _cut(layout: Layout, ranks: Sequence[int], grain: int) -> _Cut:
    matrices: list[_Matrix] = []
    rest: list[tuple[Span, int]] = []
    first, second = _Row(layout), _Row(layout)
    for s, rank in zip(layout.spans, ranks, strict=True):
        if not rank:
            rest.append((s, first.add(s, 1, s.numel, grain)))
    for i, (s, rank) in enumerate(zip(layout.spans, ranks, strict=True)):
        if rank:
            m, k = s.shape
            assert s.numel == m * k, "make_buckets keeps it whole"
            p_start, q_start = first.add(s, rank, m, grain), second.add(s, rank, k, grain)
            matrices.append(_Matrix(s.name, i, s.start, (m, k), rank, p_start, q_start))
    return _Cut(tuple(matrices), tuple(rest), Layout(tuple(first.spans)), Layout(tuple(second.spans)))


class _Row:
    """Numbers of one wire, one parameter's behind the other's."""

    def __init__(self, bucket: Layout) -> None:
        self.spans: list[Span] = []
        self._base = bucket.spans[0].global_offset if bucket.spans else 0

    def add(self, of: Span, rows: int, length: int, grain: int) -> int:
        """Returns where they begin. A row's blocks are its own."""
        whole = (rows, length) == (1, of.numel)
        start = at = self.spans[-1].stop if self.spans else 0
        if length % grain == 0:  # no block crosses rows anyway
            rows, length = 1, rows * length
        for _ in range(rows):
            shape, offset = (of.shape, of.offset) if whole else ((length,), 0)
            self.spans.append(Span(of.name, shape, self._base + at, at, at + length, offset))
            at += length
        return start

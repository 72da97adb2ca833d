"""How do the ranks of an island that each hold a part of every parameter work as one? As FSDP2 leaves them, sharded or in copies,
or as ZeRO does, whose ranks hold parts of fp32 master weights, of some parameters none (``zero.py``).

Buckets are cut from the whole model, as on an island of one rank, and each is carried over the link by one of the ranks, its
owner: so wires do not depend on how an island is sharded, codec blocks and low-rank matrices lie whole, and islands of any shape
understand each other. While a bucket is at hand its owner has its elements, which the ranks that hold them gave it over the
island's own, fast links; afterwards they get the new ones back, and the owner keeps no copy. A rank never has more of the model
than that: its own buckets, 1 / ranks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain.bucket import Bucket, Flat, order_of
from dtrain.island.ranges import Held, Piece, first_holders, pieces
from dtrain.island.replicas import broadcast, highest, joined, sums
from dtrain.shards import local

_T = TypeVar("_T")


class _Route(NamedTuple):
    """Of one bucket."""

    gives: Sequence[Sequence[Piece]]
    """What each rank gives the owner."""
    gets: Sequence[Sequence[Piece]]
    """What each rank gets back: all that it holds."""


class Parts:
    """An island of several ranks over its default process group."""

    whole = False

    def __init__(self, device: torch.device) -> None:
        self.rank = self.replica = dist.get_rank()
        self.num_ranks = self.num_replicas = dist.get_world_size()
        self.prefix = f"shard{self.rank}."
        self._device = device
        self._flat = Flat((), (), (), (), ())
        self._held: list[list[Held]] = []
        self._routes: dict[int, _Route] = {}

    def hold(self, flat: Flat) -> Flat:
        """Tell each other who holds what. Of parameters that are other ranks' alone, as those of other stages are, this rank has
        the shapes, on the device "meta"."""
        self._flat = flat = self._of_island(flat)
        starts, at = dict[int, int](), 0
        for members in flat.order:
            for i in members:
                starts[i] = at
                at += flat.parameters[i].numel()
        firsts = [starts[i] + first for i, first in enumerate(flat.firsts)]
        self._held = self._tell([Held(first, first + x.numel()) for first, x in zip(firsts, flat.storages, strict=True)])
        return flat

    def _of_island(self, flat: Flat) -> Flat:
        """All ranks' parameters, in the order of their stages, where there are such, and of the ranks, each once."""
        own = {name: i for i, name in enumerate(flat.names)}
        stages = flat.stages or (0,) * len(flat.names)
        said = [
            (stage, name, p.shape, p.dtype, name in flat.embeddings)
            for stage, name, p in zip(stages, flat.names, flat.parameters, strict=True)
        ]
        ordered = sorted((each for told in self._tell(said) for each in told), key=lambda each: each[0])
        found = {name: (shape, dtype, looked_up) for _, name, shape, dtype, looked_up in ordered}
        if len(found) == len(own):
            return flat
        parameters = tuple(
            flat.parameters[own[name]] if name in own else nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            for name, (shape, dtype, _) in found.items()
        )
        nothing = torch.empty(0, device=self._device)
        storages = tuple(flat.storages[own[name]] if name in own else nothing for name in found)
        firsts = tuple(flat.firsts[own[name]] if name in own else 0 for name in found)
        embeddings = frozenset(name for name, (_, _, looked_up) in found.items() if looked_up)
        return replace(
            flat, names=tuple(found), parameters=parameters, storages=storages, order=order_of(parameters), embeddings=embeddings,
            firsts=firsts,
        )  # fmt: skip

    def _tell(self, own: list[_T]) -> list[list[_T]]:
        """What each rank has."""
        told: list[list[_T]] = [[] for _ in range(self.num_ranks)]
        dist.all_gather_object(told, own)
        return told

    def worst(self, code: int) -> int:
        return highest(code, self._device)

    def total(self, values: Sequence[float]) -> list[float]:
        return sums(values, self._device)

    @contextmanager
    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> Iterator[None]:
        values = self._flat.storages
        try:
            for wave in self._waves(buckets):
                self._gather(wave, lambda b: b.x, values)
            yield
            if changes:
                for wave in self._waves(buckets):
                    self._scatter(wave, lambda b: b.x, values)
                self._flat.changed()
        finally:
            for b in buckets:
                _let_go(b.x)

    def read_gradients(self, buckets: Sequence[Bucket]) -> None:
        """Fill the owners' ``g``; a missing gradient counts as zero."""
        gradients = [_gradient(p) for p in self._flat.parameters]
        for wave in self._waves(buckets):
            self._gather(wave, _g, gradients)

    def share_gradients(self, buckets: Sequence[Bucket]) -> None:
        """Put the owners' ``g`` into every ``grad``."""
        for p in self._flat.parameters:
            if p.grad is None and not p.is_meta:
                p.grad = torch.zeros_like(p)
        gradients = [_gradient(p) for p in self._flat.parameters]
        for wave in self._waves(buckets):
            self._scatter(wave, _g, gradients)
        for b in buckets:
            _let_go(_g(b))

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Of tensors that every rank holds whole."""
        broadcast([(x, 0) for x in tensors])

    def joined(self, values: Tensor) -> Tensor:
        """Of parts that several ranks hold the first's count."""
        first = self._held.index(self._held[self.rank]) == self.rank
        return joined(values if first else values[:0], self._device)

    def _waves(self, buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
        """One bucket of each owner at a time, so that what is on its way inside the island is no second copy of the model."""
        for dtype in dict.fromkeys(b.x.dtype for b in buckets):
            alike = [b for b in buckets if b.x.dtype == dtype]
            for wave in zip_longest(*([b for b in alike if b.owner == owner] for owner in range(self.num_ranks))):
                yield [b for b in wave if b is not None]

    def _route(self, b: Bucket) -> _Route:
        if b.index not in self._routes:
            self._routes[b.index] = _Route(first_holders(b.layout, self._held), [pieces(b.layout, held) for held in self._held])
        return self._routes[b.index]

    def _gather(self, wave: Sequence[Bucket], of: Callable[[Bucket], Tensor], values: Sequence[Tensor]) -> None:
        """Of at most one bucket an owner: the elements that this rank gives to each, and those that it is given for its own."""
        out, sizes = list[Tensor](), [0] * self.num_ranks
        for b in wave:
            mine = self._route(b).gives[self.rank]
            out += [values[piece.held].reshape(-1)[piece.inside].to(self._device, of(b).dtype) for piece in mine]
            sizes[b.owner] = sum(piece.here.stop - piece.here.start for piece in mine)
        # In the order of owners, which that of a wave is.
        own = next((b for b in wave if b.owner == self.rank), None)
        coming = [[] if own is None else self._route(own).gives[n] for n in range(self.num_ranks)]
        got = self._exchange(out, sizes, coming, of(wave[0]).dtype)
        if own is not None:
            _make_room(of(own), own.layout.numel)
            _place(of(own), coming, got)

    def _scatter(self, wave: Sequence[Bucket], of: Callable[[Bucket], Tensor], values: Sequence[Tensor]) -> None:
        own = next((b for b in wave if b.owner == self.rank), None)
        going = [[] if own is None else self._route(own).gets[n] for n in range(self.num_ranks)]
        out = [] if own is None else [of(own)[piece.here] for parts in going for piece in parts]
        coming: list[Sequence[Piece]] = [[] for _ in range(self.num_ranks)]
        for b in wave:
            coming[b.owner] = self._route(b).gets[self.rank]
        got = self._exchange(out, [_numel(parts) for parts in going], coming, of(wave[0]).dtype)
        at = 0
        for parts in coming:
            for piece in parts:
                numel = piece.here.stop - piece.here.start
                values[piece.held].view(-1)[piece.inside].copy_(got[at : at + numel])
                at += numel

    def _exchange(
        self, out: Sequence[Tensor], sizes: Sequence[int], coming: Sequence[Sequence[Piece]], dtype: torch.dtype
    ) -> Tensor:
        sent = torch.cat(list(out)) if out else torch.empty(0, dtype=dtype, device=self._device)
        counts = [_numel(parts) for parts in coming]
        got = torch.empty(sum(counts), dtype=dtype, device=self._device)
        dist.all_to_all_single(got, sent, counts, list(sizes))
        return got


def _numel(parts: Sequence[Piece]) -> int:
    return sum(piece.here.stop - piece.here.start for piece in parts)


def _place(x: Tensor, coming: Sequence[Sequence[Piece]], got: Tensor) -> None:
    at = 0
    for parts in coming:
        for piece in parts:
            numel = piece.here.stop - piece.here.start
            x[piece.here] = got[at : at + numel]
            at += numel


def _g(b: Bucket) -> Tensor:
    assert b.g is not None
    return b.g


def _gradient(p: nn.Parameter) -> Tensor:
    return local(p.grad) if p.grad is not None else torch.zeros_like(local(p.detach()))


def _make_room(x: Tensor, numel: int) -> None:
    x.data = torch.empty(numel, dtype=x.dtype, device=x.device)


def _let_go(x: Tensor) -> None:
    """The tensor stays, so that who has it finds it filled again; its memory does not."""
    x.data = torch.empty(0, dtype=x.dtype, device=x.device)

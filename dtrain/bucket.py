"""How do a model's parameters become flat buckets?

All parameters of one dtype are moved into one flat storage, in the model's order, and stay views of it. The storage
is cut into buckets in global coordinates, never by rank, so that wires do not depend on how an island is sharded.
Cuts inside a parameter fall on multiples of GRAIN elements from its start, so that no codec block is ever cut in two;
parameters that a path must see whole are never cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dtrain import chosen
from dtrain.bucket_bytes import largest_bytes
from dtrain.codec_name import MAX_BLOCK
from dtrain.lanes import rank_of_lane
from dtrain.shards import local, named_parameters

GRAIN = MAX_BLOCK
"""Elements; every codec's block divides it."""

EXTRA_NAMES = 3
"""Bucket numbers behind the last one that name what is exchanged beside the buckets."""

MAX_BUCKETS = 4096 - EXTRA_NAMES
"""A tag has 12 bits for the bucket."""


@dataclass(frozen=True, slots=True)
class Span:
    """One parameter's part of a bucket."""

    name: str
    shape: tuple[int, ...]
    global_offset: int
    start: int
    stop: int
    """start:stop are element positions within the bucket."""
    offset: int = 0
    """Where the part begins within its parameter, in elements."""
    embedding: bool = False
    """Whether a row is looked up by its number."""

    @property
    def numel(self) -> int:
        return self.stop - self.start


KeepsWhole = Callable[[Span], bool]
"""Whether a parameter must lie in one bucket, of which it may then be all."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What lies where in a bucket: spans in order, without gaps."""

    spans: tuple[Span, ...]

    @property
    def numel(self) -> int:
        return self.spans[-1].stop if self.spans else 0

    def part(self, start: int, stop: int) -> Layout:
        """The layout of elements start:stop, positions counted from start."""
        spans = []
        for i in range(bisect_right(self.spans, start, key=lambda s: s.stop), len(self.spans)):
            s = self.spans[i]
            if s.start >= stop:
                break
            a, b = max(s.start, start), min(s.stop, stop)
            if a < b:
                inside = a - s.start
                at = s.global_offset + inside
                spans.append(Span(s.name, s.shape, at, a - start, b - start, s.offset + inside, s.embedding))
        return Layout(tuple(spans))

    def runs(self, block: int) -> tuple[tuple[int, int], ...]:
        """(start, stop) of spans in a row that fill whole blocks, but for the last of them."""
        runs: list[tuple[int, int]] = []
        open_run = False
        for s in self.spans:
            if open_run:
                runs[-1] = (runs[-1][0], s.stop)
            else:
                runs.append((s.start, s.stop))
            open_run = s.numel % block == 0
        return tuple(runs)

    def cuts(self, num_parts: int, grain: int, keeps_whole: KeepsWhole | None = None) -> tuple[int, ...]:
        """num_parts + 1 positions that split the bucket evenly, on span starts or multiples of grain within a
        span that may be cut."""
        grains = [max(1, s.numel) if keeps_whole is not None and keeps_whole(s) else grain for s in self.spans]
        return cut_evenly([s.numel for s in self.spans], num_parts, grains)


def whole(name: str, x: Tensor) -> Layout:
    """The layout of a single flat tensor."""
    return Layout((Span(name, tuple(x.shape), 0, 0, x.numel()),))


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's, by the names that torch gives them."""


class Moments(Protocol):
    """What the optimizer keeps of a bucket's elements (``moments.py``)."""

    def read(self, name: str, out: Tensor) -> None:
        """Fill ``out`` (fp32, as long as the bucket) with one of MOMENTS."""
        ...

    def write(self, name: str, values: Tensor) -> None:
        """Put ``values`` (fp32, as long as the bucket) in its place."""
        ...

    def updates(self) -> Tensor:
        """(spans) int64: how often the optimizer has stepped each of the bucket's parameters."""
        ...

    def carry(self, name: str, sent: Tensor, mean: Tensor, since: Tensor) -> None:
        """Put ``mean`` in the place of ``sent`` (fp32, as long as the bucket), which the moment was when ``updates`` were
        ``since``: what the optimizer has added to it stays, and ``mean`` decays as ``sent`` has."""
        ...


@dataclass(frozen=True, slots=True)
class Bucket:
    """A contiguous piece of the model: ``x`` (a view of the flat parameters) and ``g`` (fp32 gradients, where a
    method sends them). Where ranks hold parts of the parameters both are empty but while they are at hand."""

    index: int
    fragment: int
    layout: Layout
    x: Tensor
    g: Tensor | None
    owner: int
    """The rank of the island that carries this bucket over the link."""
    moments: Moments | None = None
    """Where a method sends them."""
    lane: int = 0
    """Of the lanes that join the islands' ranks, the one that its wires take: it ends at the owner on every island."""


def cut_evenly(numels: Sequence[int], num_parts: int, grains: Sequence[int]) -> tuple[int, ...]:
    """Split sum(numels) into num_parts near-equal parts; cuts lie on multiples of an item's grain from its start, or on
    its start."""
    total = sum(numels)
    positions = [0]
    start = 0
    items = zip(numels, grains, strict=True)
    size, grain = next(items, (0, 1))
    for k in range(1, num_parts):
        ideal = total * k // num_parts
        while start + size <= ideal and start + size < total:
            start += size
            size, grain = next(items)
        inside = (ideal - start + grain // 2) // grain * grain
        positions.append(max(positions[-1], start + min(inside, size)))
    return (*positions, total)


@dataclass(frozen=True, slots=True)
class Flat:
    """The flat storages of the parameters that islands share, and these, which view them."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    storages: tuple[Tensor, ...]
    order: tuple[tuple[int, ...], ...]
    """Per storage, the positions of its parameters."""
    trained: tuple[nn.Parameter, ...]
    """All that require a gradient, in the model's order, each once."""
    embeddings: frozenset[str] = frozenset()
    """Names of those that are embeddings, heads that are tied to one too."""
    begins: tuple[int, ...] = ()
    """Per storage, the elements of the whole model that lie before it, where a rank holds some of its layers; empty: storages
    follow each other."""
    stages: tuple[int, ...] = ()
    """The number of the stage that each parameter is of, where ranks hold stages of the model."""
    in_parts: bool = False
    """Whether ranks hold parts of the parameters (``island/parts.py``): storages are this one's, and buckets no views of them."""
    firsts: tuple[int, ...] = ()
    """Each part's first element within its parameter."""
    changed: Callable[[], None] = lambda: None
    """Called on all ranks when parts have new values."""
    place: torch.device | None = None
    """Where buckets lie, if not where the storages are."""

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def device(self) -> torch.device:
        """Of the buckets."""
        return self.place or self.storages[0].device

    @property
    def apart(self) -> list[nn.Parameter]:
        """Trained parameters that stay the island's own."""
        inside = {id(p) for p in self.parameters}
        return [p for p in self.trained if id(p) not in inside]

    def check_in_place(self, model: nn.Module) -> None:
        """Raises ValueError where a parameter no longer is a view of its storage: it would train, and never be sent."""
        now = dict(named_parameters(model))
        if self.in_parts:
            self._check_parts(now)
            return
        for storage, members in zip(self.storages, self.order, strict=True):
            address = storage.data_ptr()
            for i in members:
                p = self.parameters[i]
                if now.get(self.names[i]) is not p or (p.numel() and p.data_ptr() != address):
                    raise ValueError(
                        f"parameter {self.names[i]} was replaced after dtrain.join, as model.to() and "
                        "load_state_dict(assign=True) do; move or load the model first, then join"
                    )
                address += p.numel() * p.element_size()

    def _check_parts(self, now: Mapping[str, nn.Parameter]) -> None:
        for name, p, part in zip(self.names, self.parameters, self.storages, strict=True):
            # One on the device "meta" is another rank's, or DeepSpeed's master weights'.
            if not p.is_meta and (now.get(name) is not p or local(p.detach()).data_ptr() != part.data_ptr()):
                raise ValueError(
                    f"parameter {name} was replaced after dtrain.join, or is gathered; shard, move or load the model first, "
                    "then join, and call model.reshard() after a forward pass without a backward one"
                )


class Part(NamedTuple):
    """What a rank holds of one parameter."""

    values: Tensor
    """In place; empty where it holds nothing."""
    first: int
    """Where they begin within the flat parameter, in elements."""


def embeddings_of(model: nn.Module) -> Set[int]:
    """The ids of its embeddings' weights."""
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}


def flatten(
    named: Iterable[tuple[str, nn.Parameter]], include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
    *, embeddings: Set[int] = frozenset(),
) -> Flat:  # fmt: skip
    """Move the parameters that ``chosen.shared`` names (tied ones once) into one flat storage per dtype and make them views of
    it; raises ValueError for ones that cannot be shared. ``embeddings``: ids."""
    names, parameters, trained = _shared(named, include, exclude)
    order, storages = order_of(parameters), []
    with torch.no_grad():
        for members in order:
            like = parameters[members[0]]
            flat = torch.empty(sum(parameters[i].numel() for i in members), dtype=like.dtype, device=like.device)
            offset = 0
            for i in members:
                p = parameters[i]
                view = flat[offset : offset + p.numel()].view(p.shape)
                view.copy_(p)
                p.data = view
                offset += p.numel()
            storages.append(flat)
    return Flat(names, parameters, tuple(storages), order, trained, _looked_up(names, parameters, embeddings))


def flat_parts(
    named: Iterable[tuple[str, nn.Parameter]], parts: Mapping[str, Part],
    include: Sequence[str] | None = None, exclude: Sequence[str] | None = None, *, embeddings: Set[int] = frozenset(),
) -> Flat:  # fmt: skip
    """``flatten`` where a rank holds a part of each parameter, which stays where it is."""
    names, parameters, trained = _shared(named, include, exclude)
    storages, firsts = zip(*(parts[name] for name in names), strict=True)
    looked_up, order = _looked_up(names, parameters, embeddings), order_of(parameters)
    return Flat(names, parameters, storages, order, trained, looked_up, in_parts=True, firsts=firsts)


def _looked_up(names: Sequence[str], parameters: Sequence[nn.Parameter], embeddings: Set[int]) -> frozenset[str]:
    return frozenset(name for name, p in zip(names, parameters, strict=True) if id(p) in embeddings)


def order_of(parameters: Sequence[nn.Parameter]) -> tuple[tuple[int, ...], ...]:
    """Positions by dtype, dtypes in the order in which they come."""
    kinds: dict[torch.dtype, list[int]] = {}
    for i, p in enumerate(parameters):
        kinds.setdefault(p.dtype, []).append(i)
    return tuple(map(tuple, kinds.values()))


_Shared = tuple[tuple[str, ...], tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]]
"""Names, the parameters that are shared, and all that are trained."""


def _shared(named: Iterable[tuple[str, nn.Parameter]], include: Sequence[str] | None, exclude: Sequence[str] | None) -> _Shared:
    names: list[str] = []
    parameters: list[nn.Parameter] = []
    seen: set[int] = set()
    for name, p in named:
        if p.requires_grad and id(p) not in seen:
            seen.add(id(p))
            names.append(name)
            parameters.append(p)
    if not parameters:
        raise ValueError("the model has no parameters that require a gradient; nothing to synchronise")
    trained, kept = tuple(parameters), chosen.shared(names, include, exclude)
    parameters = [p for name, p in zip(names, trained, strict=True) if name in kept]
    names = [name for name in names if name in kept]
    for name, p in zip(names, parameters, strict=True):
        if not p.dtype.is_floating_point:
            raise ValueError(f"parameter {name} has dtype {p.dtype}; only floating-point parameters can be synchronised")
    devices = {p.device for p in parameters}
    if len(devices) > 1:
        raise ValueError(
            f"the model's parameters lie on {', '.join(sorted(map(str, devices)))}; a rank synchronises one device: "
            "start one rank a device"
        )
    return tuple(names), tuple(parameters), trained


def make_buckets(
    flat: Flat, *, num_fragments: int, bucket_bytes: int | None, num_ranks: int, with_grad: bool,
    keeps_whole: KeepsWhole | None = None, num_lanes: int | None = None,
) -> list[Bucket]:  # fmt: skip
    """Cut the flat storages into fragments and those into buckets, and give neighbouring buckets to each lane, and neighbouring
    lanes to each rank. There are as many lanes as ranks, or, where islands have different numbers of ranks, as the most of them.

    The cut depends on the model alone (``largest_bytes``, unless bucket_bytes says otherwise), never on num_ranks. A bucket is
    larger than that where one parameter that is kept whole is."""
    largest = bucket_bytes or largest_bytes(flat.numel * 4)
    pieces: list[tuple[int, Layout, Tensor]] = []
    global_base = 0
    for kind, members in enumerate(flat.order):
        layout = _layout(flat, members, flat.begins[kind] if flat.begins else global_base)
        global_base += layout.numel
        fragments = layout.cuts(num_fragments, GRAIN, keeps_whole)
        for f in range(num_fragments):
            inside = layout.part(fragments[f], fragments[f + 1])
            cuts = inside.cuts(max(1, -(-inside.numel * 4 // largest)), GRAIN, keeps_whole)
            for a, b in pairwise(cuts):
                if a < b:
                    pieces.append((f, inside.part(a, b), _values(flat, kind, fragments[f] + a, fragments[f] + b)))
    if len(pieces) > MAX_BUCKETS:
        raise ValueError(
            f"bucket_bytes = {largest} cuts the model into {len(pieces)} buckets; at most {MAX_BUCKETS}: raise it"
        )
    lanes = _shared_out([p[1].numel for p in pieces], num_lanes or num_ranks)
    return [
        Bucket(
            i, fragment, layout, x, _gradient(flat, x) if with_grad else None,
            rank_of_lane(lanes[i], num_lanes or num_ranks, num_ranks), lane=lanes[i],
        )
        for i, (fragment, layout, x) in enumerate(pieces)
    ]  # fmt: skip


def _values(flat: Flat, kind: int, start: int, stop: int) -> Tensor:
    """A bucket's: a view of the parameters, or empty until it is at hand where these are in parts."""
    if not flat.in_parts:
        return flat.storages[kind][start:stop]
    return torch.empty(0, dtype=flat.parameters[flat.order[kind][0]].dtype, device=flat.device)


def _gradient(flat: Flat, x: Tensor) -> Tensor:
    return torch.zeros(0 if flat.in_parts else x.numel(), device=x.device)


def _layout(flat: Flat, members: Sequence[int], global_base: int) -> Layout:
    spans = []
    offset = 0
    for i in members:
        n = flat.parameters[i].numel()
        name, shape = flat.names[i], tuple(flat.parameters[i].shape)
        spans.append(Span(name, shape, global_base + offset, offset, offset + n, embedding=name in flat.embeddings))
        offset += n
    return Layout(tuple(spans))


def _shared_out(numels: Sequence[int], num_lanes: int) -> list[int]:
    """Lane of each bucket: neighbours together, near-equal elements a lane (by the bucket's middle)."""
    total = sum(numels)
    lanes = []
    done = 0
    for n in numels:
        lanes.append(min(num_lanes - 1, int((done + n / 2) * num_lanes / total)))
        done += n
    return lanes

"""Where does a step's time go, and what hides behind what? Arithmetic on intervals of a trace, without clock, file or torch.

Each instant of a step is counted once: it belongs to the innermost span of the step's thread or, where a GPU computes, to the
kernel that runs."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dtrain.intervals import Interval, difference, innermost, intersection, length, union, without_parts
from dtrain.spans import Mark, Span
from dtrain.transport.base import ROUND

LABELS = ("compute", "optimizer", "clip", "encode", "decode", "landing", "exposed link", "idle")
"""The disjoint shares of a step. Where two would claim an instant, the first has it: what runs behind compute costs nothing."""

_LABEL_OF = {
    "forward_backward": "compute",
    "data": "compute",
    "optimizer": "optimizer",
    "gossip_adam": "optimizer",
    "clip": "clip",
    "encode": "encode",
    "launch": "encode",  # the payload, and handing its wires to the transport
    "decode": "decode",
    "land": "landing",
    "gradients": "landing",  # all-reduce: between the bucket and the parameters
    "wait": "exposed link",
}
OURS = ("encode", "decode", "landing", "optimizer")
"""What the project promises to keep below 5 % of a step, together."""

_WHOLE = frozenset({"encode", "decode"})
"""Spans of which a part is not told apart: error feedback encodes, and decodes what it encoded, within one encode."""


# ---- what a rank has recorded


class Event(NamedTuple):
    """A complete event of torch.profiler."""

    name: str
    category: str
    """"cpu_op", "kernel", "cuda_runtime", ..."""
    lane: int
    """A thread, or a GPU's stream."""
    begun_ns: int
    ended_ns: int
    correlation: int = 0
    """Ties a kernel to the call that launched it."""


GPU = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


class Round(NamedTuple):
    """A round of one bucket, from its first wire posted to its last wire decoded."""

    kind: int
    number: int
    bucket: int
    begun_ns: int
    ended_ns: int
    sent_bytes: int
    received_bytes: int


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank has noted, all on the wall clock."""

    island: int
    rank: int
    main_thread: int
    plain: tuple[int, ...]
    """When each step began while only spans were noted, and when the last one ended."""
    traced: tuple[int, ...]
    """The same while torch.profiler ran, which makes a step slower."""
    spans: tuple[Span, ...] = ()
    marks: tuple[Mark, ...] = ()
    events: tuple[Event, ...] = ()
    bytes_a_call: Mapping[str, float] = field(default_factory=dict)
    """By the name of an operation or a kernel, where its operands' shapes tell."""

    @property
    def on_gpu(self) -> bool:
        return any(event.category in GPU for event in self.events)


@dataclass(slots=True)
class Part:
    """What one name did in a window: when, how often, and how many bytes at least."""

    name: str
    where: str
    """"step", the thread that trains; "link", any other; "gpu"."""
    busy: list[Interval]
    calls: int = 0
    moved_bytes: int = 0
    behind: dict[str, int] = field(default_factory=dict)
    """ns of it that ran while the step's thread (or a GPU's main stream) was busy with that."""

    @property
    def label(self) -> str:
        return _LABEL_OF.get(self.name, LABELS[-1])

    @property
    def busy_ns(self) -> int:
        return sum(ended - begun for begun, ended in self.busy)


def window(bounds: Sequence[int]) -> Interval:
    return (bounds[0], bounds[-1]) if bounds else (0, 0)


def clipped(intervals: Iterable[Interval], inside: Interval) -> list[Interval]:
    return intersection(intervals, [inside])


# ---- rounds of the link


def rounds(marks: Iterable[Mark]) -> list[Round]:
    """The rounds that came to their end, in the order of their beginning."""
    begun: dict[tuple[int, int, int], Round] = {}
    ended: list[Round] = []
    for mark in sorted(marks):
        key = (mark.kind, mark.round, mark.bucket)
        at = begun.setdefault(key, Round(*key, mark.at_ns, mark.at_ns, 0, 0))
        sent, received = at.sent_bytes + mark.sent_bytes, at.received_bytes + mark.received_bytes
        begun[key] = at._replace(ended_ns=mark.at_ns, sent_bytes=sent, received_bytes=received)
        if mark.done and mark.kind == ROUND:
            ended.append(begun.pop(key))
    return sorted(ended, key=lambda flown: flown.begun_ns)


@dataclass(frozen=True, slots=True)
class Flown:
    """The rounds that began in a window."""

    count: int
    longest_ns: int
    in_air_ns: int
    """Time of the window with at least one round in flight."""
    exposed_ns: int
    """Of it, while the step's thread waited (and no kernel ran)."""
    behind: dict[str, int]
    sent_bytes: int


def flown(rank: Rank, inside: Interval, of: Sequence[Part]) -> Flown:
    """What the rounds of the window hid behind. in_air = exposed + what is behind + what is behind nothing (idle)."""
    all_rounds = rounds(rank.marks)
    began = [r for r in all_rounds if inside[0] <= r.begun_ns < inside[1]]
    in_air = clipped([(r.begun_ns, r.ended_ns) for r in all_rounds], inside)
    doing = [part for part in of if part.where == ("gpu" if rank.on_gpu else "step") and part.name != "wait"]
    waited = union(i for part in of if part.name == "wait" and part.where == "step" for i in part.busy)
    exposed = difference(intersection(in_air, waited), (i for part in doing for i in part.busy))
    return Flown(
        count=len(began),
        longest_ns=max((r.ended_ns - r.begun_ns for r in began), default=0),
        in_air_ns=length(in_air),
        exposed_ns=length(exposed),
        behind=overlaps(in_air, doing),
        sent_bytes=sum(r.sent_bytes for r in began),
    )


# ---- parts of a step


def parts(rank: Rank, inside: Interval) -> list[Part]:
    """The spans of a window, by name and thread; where a GPU computes, the kernels that each span launched too."""
    found = _gpu_parts(rank, inside) if rank.on_gpu else []
    for where, threads in _threads(rank).items():
        of_name: dict[str, Part] = {}
        for spans in threads:
            kept = without_parts(spans, _WHOLE)
            for name in {s.name for s in kept}:
                of_name.setdefault(name, Part(name, where, []))
            for name, busy in innermost(kept).items():
                of_name[name].busy = union([*of_name[name].busy, *clipped(busy, inside)])
            _count(of_name, [s for s in kept if inside[0] <= s.begun_ns < inside[1]])
        found += [part for part in of_name.values() if part.calls or part.busy]
    step = [part for part in found if part.where == "step"]
    for part in found:
        if part.where == "link":
            part.behind = overlaps(part.busy, step)
    return found


def kernels(rank: Rank, inside: Interval, of: Sequence[Part]) -> list[Part]:
    """Each kernel of a GPU, else each operation of torch by the time that it spends in no other; ``of``: the window's parts."""
    wanted = GPU if rank.on_gpu else frozenset({"cpu_op"})
    main = _main_lane(rank.events) if rank.on_gpu else rank.main_thread
    step = [p for p in of if p.where == "step"]
    if rank.on_gpu:
        step = [Part("main stream", "gpu", clipped(_main_stream(rank.events), inside))]
    lanes: dict[int, list[Event]] = {}
    for event in rank.events:
        if event.category in wanted:
            lanes.setdefault(event.lane, []).append(event)
    found: dict[tuple[str, bool], Part] = {}
    for lane, events in lanes.items():
        aside = lane != main
        names = {e.name for e in events}
        of_lane = {name: Part(name, "link" if aside else "step", []) for name in names}
        for name, busy in innermost(events).items():
            of_lane[name].busy = clipped(busy, inside)
        for event in events:
            if inside[0] <= event.begun_ns < inside[1]:
                of_lane[event.name].calls += 1
        for name, part in of_lane.items():
            part.moved_bytes = round(part.calls * rank.bytes_a_call.get(name, 0))
            if aside:
                part.behind = overlaps(part.busy, step)
            merged = found.setdefault((name, aside), part)
            if merged is not part:
                _join(merged, part)
    return [part for part in found.values() if part.calls or part.busy]


def _join(into: Part, part: Part) -> None:
    """Of two threads or streams; their times add up, though they may be the same time."""
    into.moved_bytes += part.moved_bytes
    into.busy = [*into.busy, *part.busy]
    into.calls += part.calls
    for name, ns in part.behind.items():
        into.behind[name] = into.behind.get(name, 0) + ns


def overlaps(busy: Iterable[Interval], others: Iterable[Part]) -> dict[str, int]:
    """ns of ``busy`` during which each of the others ran."""
    mine = union(busy)
    shared = {other.name: length(intersection(mine, other.busy)) for other in others}
    return {name: ns for name, ns in shared.items() if ns}


def account(inside: Interval, of: Sequence[Part], *, on_gpu: bool) -> dict[str, int]:
    """ns by label. They are disjoint and sum to the window, by construction: the rest is idle or other."""
    here = [part for part in of if part.where == ("gpu" if on_gpu else "step") or (on_gpu and part.name == "wait")]
    left: list[Interval] = [inside]
    shares: dict[str, int] = dict.fromkeys(LABELS, 0)
    for label in LABELS[:-1]:
        claimed = union(i for part in here if part.label == label for i in part.busy)
        shares[label] = length(intersection(left, claimed))
        left = difference(left, claimed)
    shares[LABELS[-1]] = length(left)
    return shares


def ours(of: Sequence[Part], *, on_gpu: bool) -> tuple[int, int]:
    """ns of encode, decode, landing and optimizer together on all threads, and those that run behind the step."""
    mine = [part for part in of if part.label in OURS and (part.where == "gpu") == on_gpu]
    behind = (ns for part in mine for name, ns in part.behind.items() if name != "wait")
    return sum(part.busy_ns for part in mine), sum(behind)


def _threads(rank: Rank) -> dict[str, list[list[Span]]]:
    by_thread: dict[int, list[Span]] = {}
    for span in rank.spans:
        by_thread.setdefault(span.thread, []).append(span)
    return {
        "step": [by_thread.get(rank.main_thread, [])],
        "link": [spans for thread, spans in by_thread.items() if thread != rank.main_thread],
    }


def _count(of_name: Mapping[str, Part], spans: Iterable[Span]) -> None:
    """Calls and bytes; bytes stay unknown where one call did not know its own."""
    unknown: set[str] = set()
    for span in spans:
        part = of_name[span.name]
        part.calls += 1
        part.moved_bytes += span.moved_bytes
        if not span.moved_bytes:
            unknown.add(span.name)
    for name in unknown:
        of_name[name].moved_bytes = 0


def _gpu_parts(rank: Rank, inside: Interval) -> list[Part]:
    """Kernels under the name of the span that launched them; one that no span launched is "other". Calls and bytes are the
    span's."""
    launched = {e.correlation: e for e in rank.events if e.correlation and e.category not in GPU}
    at = _innermost_at(rank)
    kernels: dict[str, list[Event]] = {}
    for event in rank.events:
        if event.category in GPU and event.ended_ns > inside[0] and event.begun_ns < inside[1]:
            call = launched.get(event.correlation)
            kernels.setdefault(at(call.lane, call.begun_ns) if call is not None else "other", []).append(event)
    calls, moved = dict[str, int](), dict[str, int]()
    for part in parts(replace(rank, events=()), inside):
        calls[part.name] = calls.get(part.name, 0) + part.calls
        moved[part.name] = moved.get(part.name, 0) + part.moved_bytes
    main = clipped(_main_stream(rank.events), inside)
    found: list[Part] = []
    for name, events in kernels.items():
        part = Part(name, "gpu", clipped([(e.begun_ns, e.ended_ns) for e in events], inside))
        part.calls, part.moved_bytes = calls.get(name, len(events)), moved.get(name, 0)
        aside = [(e.begun_ns, e.ended_ns) for e in events if e.lane != _main_lane(rank.events)]
        part.behind = overlaps(clipped(aside, inside), [Part("main stream", "gpu", main)])
        found.append(part)
    return found


def _innermost_at(rank: Rank) -> Callable[[int, int], str]:
    """Which name was the innermost one on a thread at a time? "other" outside all. Autograd launches from a thread of its own
    while the step's is inside forward_backward: a thread without spans counts as the step's."""
    by_thread: dict[int, list[Span]] = {}
    for span in rank.spans:
        by_thread.setdefault(span.thread, []).append(span)
    pieces: dict[int, list[tuple[int, int, str]]] = {}
    for thread, spans in by_thread.items():
        names = innermost(without_parts(spans, _WHOLE))
        pieces[thread] = sorted((begun, ended, name) for name, busy in names.items() for begun, ended in busy)

    def at(thread: int, when_ns: int) -> str:
        of_thread = pieces.get(thread, pieces.get(rank.main_thread, []))
        k = bisect_right(of_thread, when_ns, key=lambda piece: piece[0]) - 1
        return of_thread[k][2] if k >= 0 and when_ns < of_thread[k][1] else "other"

    return at


def _main_lane(events: Iterable[Event]) -> int:
    """The stream on which most of the GPU's time goes by."""
    busy: dict[int, int] = {}
    for event in events:
        if event.category in GPU:
            busy[event.lane] = busy.get(event.lane, 0) + event.ended_ns - event.begun_ns
    return max(busy, key=lambda lane: busy[lane], default=0)


def _main_stream(events: Sequence[Event]) -> list[Interval]:
    lane = _main_lane(events)
    return union((e.begun_ns, e.ended_ns) for e in events if e.category in GPU and e.lane == lane)

"""Is each instant of a step counted once, and is what hides found? Traces made by hand, whose sums are known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from dtrain.intervals import Interval, difference, innermost, intersection, length, union, without_parts
from dtrain.spans import Mark, Span
from dtrain.trace import LABELS, Event, Part, Rank, account, flown, kernels, ours, parts, rounds
from dtrain.transport.base import MERGE, ROUND

MAIN, LINK = 10, 11


def rank_of(spans: Sequence[Span] = (), marks: Sequence[Mark] = (), events: Sequence[Event] = ()) -> Rank:
    return Rank(0, 0, MAIN, (0, 100), (0, 100), tuple(spans), tuple(marks), tuple(events))


def span(name: str, begun: int, ended: int, *, thread: int = MAIN, moved: int = 0) -> Span:
    return Span(name, thread, begun, ended, moved)


def flight(begun: int, ended: int, *, number: int = 0, bucket: int = 0, kind: int = ROUND) -> list[Mark]:
    """Posts 7 bytes, gets 5 half-way and posts 3, and is done."""
    half = (begun + ended) // 2
    at = (kind, number, bucket)
    return [Mark(begun, *at, 7, 0, False), Mark(half, *at, 3, 5, False), Mark(ended, *at, 0, 5, True)]


def by_name(found: Sequence[Part]) -> dict[tuple[str, str], Part]:
    return {(part.name, part.where): part for part in found}


def instants(intervals: Sequence[Interval]) -> set[int]:
    return {t for begun, ended in intervals for t in range(begun, ended)}


@pytest.mark.parametrize("seed", range(20))
def test_intervals_are_sets_of_instants(seed: int) -> None:
    draw = random.Random(seed)
    a, b = ([(t, t + draw.randrange(6)) for t in draw.choices(range(40), k=8)] for _ in range(2))
    for found, expected in (
        (union(a), instants(a)),
        (intersection(a, b), instants(a) & instants(b)),
        (difference(a, b), instants(a) - instants(b)),
    ):
        assert instants(found) == expected
        assert found == union(found), "sorted, disjoint, and none of them empty"
        assert length(found) == len(expected)


def test_the_innermost_span_has_the_time() -> None:
    spans = [span("a", 0, 100), span("b", 10, 40), span("c", 20, 30), span("b", 40, 50), span("d", 120, 130)]
    inner_b = [(10, 20), (30, 40), (40, 50)]
    assert innermost(spans) == {"a": [(0, 10), (50, 100)], "b": inner_b, "c": [(20, 30)], "d": [(120, 130)]}
    assert innermost([span("a", 0, 10), span("b", 5, 12)]) == {"a": [(0, 5)], "b": [(5, 10)]}, "clocks are read one by one"
    assert innermost([]) == {}


def test_a_part_of_a_whole_is_left_out_on_any_depth() -> None:
    spans = [span("encode", 0, 50), span("encode", 5, 20), span("decode", 20, 40), span("decode", 60, 70)]
    assert without_parts(spans, {"encode"}) == [spans[0], spans[3]]


STEP = [
    span("forward_backward", 0, 60),
    span("optimizer", 60, 90, moved=280),
    span("wait", 62, 72),
    span("land", 72, 77),
    span("clip", 77, 79),
    span("launch", 85, 89),
    span("encode", 86, 88, moved=30),
    span("decode", 87, 88, moved=40),
]


def test_a_step_is_cut_into_shares_that_sum_to_it() -> None:
    found = parts(rank_of(STEP), (0, 100))
    shares = account((0, 100), found, on_gpu=False)
    assert shares == dict(zip(LABELS, (60, 30 - 10 - 5 - 2 - 4, 2, 4, 0, 5, 10, 10), strict=True))
    named = by_name(found)
    assert ("decode", "step") not in named, "error feedback decodes within its encode"
    assert (named["encode", "step"].calls, named["encode", "step"].moved_bytes) == (1, 30)
    assert named["launch", "step"].moved_bytes == 0
    assert ours(found, on_gpu=False) == (9 + 4 + 5, 0), "optimizer, encode with its launch, landing"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("on_gpu", [False, True])
def test_shares_sum_to_the_window_whatever_the_trace(seed: int, on_gpu: bool) -> None:
    draw = random.Random(seed)
    names = ["forward_backward", "optimizer", "wait", "land", "encode", "decode", "launch", "unheard_of"]
    spans = [span(draw.choice(names), t, t + draw.randrange(9), thread=draw.choice([MAIN, LINK])) for t in range(0, 120, 5)]
    events = [Event("k", "kernel", draw.randrange(2), t, t + 9, correlation=t) for t in range(1, 120, 7)] if on_gpu else []
    events += [Event("launch", "cuda_runtime", MAIN, e.begun_ns - 1, e.begun_ns, e.correlation) for e in events]
    found = parts(rank_of(spans, events=events), (13, 104))
    shares = account((13, 104), found, on_gpu=on_gpu)
    assert sum(shares.values()) == 104 - 13
    assert min(shares.values()) >= 0


def test_what_the_links_thread_does_is_hidden_behind_the_step() -> None:
    decodes = [span("decode", 50, 70, thread=LINK, moved=100)]
    found = parts(rank_of(STEP + decodes), (0, 100))
    part = by_name(found)["decode", "link"]
    assert part.behind == {"forward_backward": 10, "optimizer": 2, "wait": 8}
    assert account((0, 100), found, on_gpu=False) == account((0, 100), parts(rank_of(STEP), (0, 100)), on_gpu=False)
    assert ours(found, on_gpu=False) == (18 + 20, 12), "a decode while the step waits hides behind nothing"


def test_a_window_cuts_what_reaches_over_its_edges() -> None:
    part = by_name(parts(rank_of(STEP), (50, 65)))["forward_backward", "step"]
    assert (part.busy, part.calls) == ([(50, 60)], 0)


def test_a_round_is_from_its_first_wire_to_its_last() -> None:
    marks = flight(10, 70) + flight(20, 30, bucket=1) + flight(5, 95, kind=MERGE) + flight(40, 80, number=1)[:2]
    found = rounds(marks)
    assert [(r.bucket, r.begun_ns, r.ended_ns) for r in found] == [(0, 10, 70), (1, 20, 30)], "no merge, none that still flies"
    assert {(r.sent_bytes, r.received_bytes) for r in found} == {(10, 10)}


def test_a_round_is_hidden_but_for_what_the_step_waits() -> None:
    rank = rank_of(STEP, flight(20, 70) + flight(30, 68, bucket=1))
    seen = flown(rank, (0, 100), parts(rank, (0, 100)))
    assert (seen.count, seen.longest_ns, seen.in_air_ns, seen.sent_bytes) == (2, 50, 50, 20)
    assert seen.exposed_ns == 8, "the wait from 62 to 72, as far as something flew"
    assert seen.behind == {"forward_backward": 40, "optimizer": 2}
    assert seen.in_air_ns == seen.exposed_ns + sum(seen.behind.values())


def on_gpu() -> Rank:
    """The host runs ahead of stream 7; the link's thread decodes on stream 9; in the end the host waits, and nothing runs."""
    spans = [span("forward_backward", 0, 10), span("optimizer", 10, 14, moved=90), span("wait", 14, 95)]
    spans.append(span("decode", 30, 34, thread=LINK, moved=60))
    events: list[Event] = []
    for number, (name, lane, called_by, called, begun, ended) in enumerate(
        [
            ("gemm", 7, MAIN, 2, 5, 45),
            ("gemm", 7, 77, 3, 45, 50),  # autograd's own thread, which has no spans
            ("adam", 7, MAIN, 11, 50, 60),
            ("dequantize", 9, LINK, 31, 40, 65),
        ],
        start=1,
    ):
        events.append(Event("cudaLaunchKernel", "cuda_runtime", called_by, called, called + 1, number))
        events.append(Event(name, "kernel", lane, begun, ended, number))
    events.append(Event("Memcpy DtoH", "gpu_memcpy", 7, 60, 62))  # nobody knows who launched it
    return rank_of(spans, flight(20, 90), events)


def test_kernels_count_where_a_gpu_computes_and_a_wait_only_where_none_runs() -> None:
    rank = on_gpu()
    assert rank.on_gpu
    found = parts(rank, (0, 100))
    named = by_name(found)
    assert named["forward_backward", "gpu"].busy == [(5, 50)]
    assert named["decode", "gpu"].behind == {"main stream": 22}
    assert (named["decode", "gpu"].moved_bytes, named["optimizer", "gpu"].moved_bytes) == (60, 90)
    shares = account((0, 100), found, on_gpu=True)
    # The link's stream is alone from 62 to 65, and shares 60 to 62 with a copy that no span launched.
    assert shares == dict(zip(LABELS, (45, 10, 0, 0, 5, 0, 30, 10), strict=True))
    assert ours(found, on_gpu=True) == (25 + 10, 22)
    assert flown(rank, (0, 100), found).exposed_ns == 25, "from the last kernel's end to the round's"


def test_kernels_are_told_by_stream() -> None:
    rank = on_gpu()
    named = by_name(kernels(rank, (0, 100), parts(rank, (0, 100))))
    assert (named["gemm", "step"].calls, named["gemm", "step"].busy_ns) == (2, 45)
    assert named["dequantize", "link"].behind == {"main stream": 22}
    assert ("cudaLaunchKernel", "step") not in named


def test_an_operation_has_the_time_that_it_spends_in_no_other() -> None:
    events = [
        Event("dtrain.forward_backward", "user_annotation", MAIN, 0, 60),
        Event("gloo:recv", "user_annotation", MAIN, 2, 30),  # begun on this thread, ended on another: nests in nothing
        Event("aten::linear", "cpu_op", MAIN, 5, 55),
        Event("aten::mm", "cpu_op", MAIN, 10, 50),
        Event("aten::mm", "cpu_op", LINK, 58, 64),
    ]
    rank = Rank(0, 0, MAIN, (), (0, 100), tuple(STEP), (), tuple(events), {"aten::mm": 80.0})
    named = by_name(kernels(rank, (0, 100), parts(rank, (0, 100))))
    assert set(named) == {("aten::linear", "step"), ("aten::mm", "step"), ("aten::mm", "link")}
    assert (named["aten::linear", "step"].busy_ns, named["aten::linear", "step"].moved_bytes) == (10, 0)
    assert (named["aten::mm", "step"].busy_ns, named["aten::mm", "step"].moved_bytes) == (40, 80)
    assert named["aten::mm", "link"].behind == {"forward_backward": 2, "optimizer": 2, "wait": 2}

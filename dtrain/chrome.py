"""How do the ranks of a profiled run become one picture? Read what each left, write one trace that chrome://tracing and Perfetto
draw.

A process is a rank. All clocks are the wall clock's, so what two ranks did at once stands one above the other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dtrain.metrics import read_json, write_whole
from dtrain.moved_bytes import moved_bytes
from dtrain.spans import Mark, Span
from dtrain.trace import GPU, Event, Rank, rounds

_STREAMS = 1 << 24
"""Lanes from here on are a GPU's streams; Linux gives threads numbers below 1 << 22, and Perfetto reads 32 bits."""
_ROUNDS = 1 << 25
_STEPS = 1 << 26
_KEPT_ARGUMENTS = ("External id", "correlation", "stream", "grid", "block")
_WIRES = ("gloo:", "nccl:")
"""torch's annotations of wires that fly while the thread which sent them goes on."""
_SHAPES = ("Input Dims", "Input type", "Input Strides")

Trace = dict[str, Any]


def read_rank(path: Path) -> tuple[Rank, Trace]:
    """One rank's file, and torch.profiler's own trace of the same steps."""
    content = read_json(path)
    trace, shapes = (read_json(path.with_name(name)) for name in content["traces"])
    rank = Rank(
        island=content["island"],
        rank=content["rank"],
        main_thread=content["main_thread"],
        plain=tuple(content["plain"]),
        traced=tuple(content["traced"]),
        spans=tuple(Span(*span) for span in content["spans"]),
        marks=tuple(Mark(*mark) for mark in content["marks"]),
        events=tuple(_events(trace)),
        bytes_a_call=bytes_a_call(shapes),
    )
    return rank, trace


def bytes_a_call(trace: Trace) -> dict[str, float]:
    """The mean by name, over a trace with shapes. A name is left out where one call of it did not tell; a kernel has the bytes of
    the operation that launched it and no other."""
    of_call: dict[int, int | None] = {}
    found: dict[str, list[int | None]] = {}
    for raw in trace["traceEvents"]:
        if raw.get("cat") == "cpu_op":
            arguments = raw["args"]
            known = moved_bytes(raw["name"], *(arguments[key] for key in _SHAPES)) if "Input Dims" in arguments else None
            found.setdefault(raw["name"], []).append(known)
            of_call[arguments.get("External id", 0)] = known
    launched = [raw for raw in trace["traceEvents"] if raw.get("cat") in GPU]
    kernels = Counter(raw["args"].get("External id", 0) for raw in launched)
    for raw in launched:
        call = raw["args"].get("External id", 0)
        found.setdefault(raw["name"], []).append(of_call.get(call) if kernels[call] == 1 else None)
    return {
        name: sum(k for k in known if k is not None) / len(known) for name, known in found.items() if None not in known
    }


def _events(trace: Trace) -> Iterator[Event]:
    base_ns, host = int(trace["baseTimeNanoseconds"]), _host(trace)
    for raw in trace["traceEvents"]:
        if raw.get("ph") != "X" or not isinstance(raw.get("pid"), int):
            continue
        arguments = raw.get("args", {})
        begun_ns = base_ns + round(raw["ts"] * 1000)
        yield Event(
            name=raw["name"],
            category=raw["cat"],
            lane=_lane(raw, host),
            begun_ns=begun_ns,
            ended_ns=begun_ns + round(raw["dur"] * 1000),
            correlation=arguments.get("correlation", 0),
        )


def _host(trace: Trace) -> int:
    """torch.profiler's pid of the rank itself; what a GPU does has the number of the device instead."""
    return next((raw["pid"] for raw in trace["traceEvents"] if raw.get("cat") == "cpu_op"), -1)


def _lane(raw: Trace, host: int) -> int:
    tid = int(raw["tid"])
    return tid if raw["pid"] == host else _STREAMS + tid


def write_merged(path: Path, ranks: Sequence[tuple[Rank, Trace]]) -> None:
    several = max(rank.rank for rank, _ in ranks) + 1
    base_ns = min(rank.plain[0] for rank, _ in ranks)
    events = [e for rank, trace in ranks for e in _drawn(rank, trace, rank.island * several + rank.rank, base_ns)]
    content = {"traceEvents": events, "displayTimeUnit": "ms", "baseTimeNanoseconds": base_ns}
    write_whole(path, json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), durable=False)


def _drawn(rank: Rank, trace: Trace, pid: int, base_ns: int) -> Iterator[Trace]:
    yield _named("process_name", pid, 0, name=f"island {rank.island} rank {rank.rank}")
    yield _named("process_sort_index", pid, 0, sort_index=pid)
    names = {_STEPS: "steps", rank.main_thread: "the step's thread"}
    for bounds, of in ((rank.plain, "spans alone"), (rank.traced, "under torch.profiler")):
        for k in range(len(bounds) - 1):
            yield _bar(f"step {k}, {of}", pid, _STEPS, bounds[k], bounds[k + 1], base_ns)
    for flown in rounds(rank.marks):
        lane = _ROUNDS + flown.bucket
        names[lane] = f"link, bucket {flown.bucket}"
        sizes = {"sent_bytes": flown.sent_bytes, "received_bytes": flown.received_bytes}
        yield _bar(f"round {flown.number}", pid, lane, flown.begun_ns, flown.ended_ns, base_ns, sizes)
    for span in rank.spans:
        names.setdefault(span.thread, "the link's thread")
        if span.begun_ns < rank.traced[0]:  # later ones are in torch.profiler's trace, where operations nest in them
            yield _bar(span.name, pid, span.thread, span.begun_ns, span.ended_ns, base_ns)
    host = _host(trace)
    shift_us = (int(trace["baseTimeNanoseconds"]) - base_ns) / 1000
    for raw in trace["traceEvents"]:
        if raw.get("ph") == "M" or not isinstance(raw.get("pid"), int) or not str(raw.get("tid", "")).isdigit():
            continue
        event = {key: raw[key] for key in ("ph", "cat", "name", "dur", "bp") if key in raw}
        lane = _lane(raw, host)
        event |= {"pid": pid, "tid": lane, "ts": round(raw["ts"] + shift_us, 3)}
        if "id" in raw:
            event["id"] = f"{pid}.{raw['id']}"  # arrows of two ranks may have one number
        if kept := {key: raw["args"][key] for key in _KEPT_ARGUMENTS if key in raw.get("args", {})}:
            event["args"] = kept
        names.setdefault(lane, f"stream {lane - _STREAMS}" if lane >= _STREAMS else f"thread {lane}")
        if raw.get("cat") == "user_annotation" and raw["name"].startswith(_WIRES):
            yield from _overlapping(event, f"{pid}.{raw['args'].get('External id')}")
        else:
            yield event
    order = sorted(names, key=lambda lane: (lane != _STEPS, lane != rank.main_thread, lane < _ROUNDS, lane))
    for k, lane in enumerate(order):
        yield _named("thread_name", pid, lane, name=names[lane])
        yield _named("thread_sort_index", pid, lane, sort_index=k)


def _overlapping(event: Trace, number: str) -> Iterator[Trace]:
    """A bar that need not nest in others: what begins on one thread and ends on another."""
    rest = {"cat": "wire", "name": event["name"], "pid": event["pid"], "tid": event["tid"], "id": number}
    yield {"ph": "b", "ts": event["ts"], **rest}
    yield {"ph": "e", "ts": round(event["ts"] + event["dur"], 3), **rest}


def _named(what: str, pid: int, lane: int, **arguments: object) -> Trace:
    return {"ph": "M", "name": what, "pid": pid, "tid": lane, "args": arguments}


def _bar(
    name: str, pid: int, lane: int, begun_ns: int, ended_ns: int, base_ns: int, arguments: dict[str, int] | None = None
) -> Trace:
    at = {"ts": (begun_ns - base_ns) / 1000, "dur": (ended_ns - begun_ns) / 1000}
    return {"ph": "X", "cat": "dtrain", "name": name, "pid": pid, "tid": lane, **at, "args": arguments or {}}

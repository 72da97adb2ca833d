"""How is the state of a run told to Prometheus? In its text format 0.0.4, one family of samples after the other.

https://prometheus.io/docs/instrumenting/exposition_formats: counters end in _total, units are base units and stand in the name;
what is not known has no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from dtrain.launch.status import IslandState, State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Number = float | int | bool | None


class _OfIsland(NamedTuple):
    """One sample an island."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    value: Callable[[IslandState], Number]


_OF_ISLANDS = (
    _OfIsland("dtrain_step", "gauge", "Optimizer steps that an island has made.", lambda i: i.view.step),
    _OfIsland("dtrain_loss_nats", "gauge", "Training loss of its newest step, in nats a token.", lambda i: i.view.loss),
    _OfIsland("dtrain_eval_loss_nats", "gauge", "Newest loss of its own model on the held-out text.", lambda i: i.eval_loss),
    _OfIsland("dtrain_tokens_total", "counter", "Tokens that it has trained on.", lambda i: i.tokens),
    _OfIsland("dtrain_tokens_per_second", "gauge", "Tokens a second of its newest step.", lambda i: i.view.tokens_per_s),
    _OfIsland("dtrain_wire_sent_bytes_total", "counter", "Bytes sent to other islands.", lambda i: i.view.wire_bytes_sent),
    _OfIsland("dtrain_wire_received_bytes_total", "counter", "Bytes from other islands.", lambda i: i.wire_bytes_received),
    _OfIsland("dtrain_wire_sent_bytes_per_second", "gauge", "Bytes a second sent lately.", lambda i: i.view.wire_bytes_per_s),
    _OfIsland("dtrain_link_wait_seconds_total", "counter", "Seconds that training waited for the link.", lambda i: i.view.wait_s),
    _OfIsland("dtrain_waiting", "gauge", "1 while it waits for other islands.", lambda i: bool(i.view.waiting_for)),
    _OfIsland(
        "dtrain_waiting_seconds", "gauge", "How long it has waited now.", lambda i: i.view.waited_s if i.view.waiting_for else 0.0
    ),
    _OfIsland("dtrain_lost", "gauge", "1 where the launcher has lost it.", lambda i: i.lost),
    _OfIsland("dtrain_restarts_total", "counter", "How often it was started again.", lambda i: i.restarts),
)


def text(state: State) -> str:
    """All families, each with its HELP and TYPE."""
    steps = max((island.view.steps for island in state.islands), default=None)
    info = {"run": state.name, "recipe": state.recipe}
    merged = state.merged[-1][1] if state.merged else None
    lines = [
        *_family("dtrain_run_info", "gauge", "Which run this is; always 1.", [(info, 1)]),
        *_family("dtrain_running", "gauge", "1 while the run goes on.", [({}, state.phase == "running")]),
        *_family("dtrain_islands", "gauge", "Islands of the run.", [({}, len(state.islands))]),
        *_family("dtrain_steps", "gauge", "Optimizer steps that an island is to make.", [({}, steps)]),
        *_family("dtrain_committed_step", "gauge", "Step of the newest whole checkpoint.", [({}, state.committed_step)]),
        *_family("dtrain_epoch", "gauge", "How often all islands went back to a checkpoint.", [({}, state.epoch)]),
        *_family("dtrain_merged_loss_nats", "gauge", "Newest loss of the merged model on the held-out text.", [({}, merged)]),
    ]
    for name, kind, said, value in _OF_ISLANDS:
        lines += _family(name, kind, said, [({"island": str(island.view.island)}, value(island)) for island in state.seen])
    links = [({"island": str(at.sender), "to": str(at.receiver)}, state.bytes_per_s(at)) for at in state.links or ()]
    lines += _family("dtrain_link_bytes_per_second", "gauge", "What an island sends, spread over its topology's links.", links)
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, kind: str, said: str, samples: Iterable[tuple[Mapping[str, str], Number]]) -> list[str]:
    known = [(labels, value) for labels, value in samples if value is not None]
    if not known:
        return []
    return [f"# HELP {name} {said}", f"# TYPE {name} {kind}", *(f"{name}{_labels(at)} {_number(value)}" for at, value in known)]


def _labels(labels: Mapping[str, str]) -> str:
    written = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())
    return f"{{{written}}}" if written else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float | int | bool) -> str:
    return repr(float(value)) if isinstance(value, float) else str(int(value))

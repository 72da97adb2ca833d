"""When do rounds start and land? A method that only writes down what happens to it, under the real engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

import dtrain
from dtrain.algorithm import Algorithm, Method
from dtrain.assemble import Plan, assemble
from dtrain.bucket import GRAIN, Bucket, Layout
from dtrain.codec import State
from dtrain.connect import connect_local
from dtrain.link import Link, Peers
from dtrain.recipes import Recipe


class Event(NamedTuple):
    what: str
    """send, land or update."""
    step: int
    """Optimizer steps done when it happens."""
    fragment: int = -1


def recorder(events: list[Event], steps_done: list[int]) -> Method:
    def bind(layout: Layout, peers: Peers) -> Algorithm:
        def send(b: Bucket, state: State, link: Link) -> Iterator[None]:
            events.append(Event("send", steps_done[0], b.fragment))
            yield

        def land(b: Bucket, state: State) -> None:
            events.append(Event("land", steps_done[0], b.fragment))

        return Algorithm(init=lambda b: {}, send=send, land=land)

    return bind


def recorded(monkeypatch: pytest.MonkeyPatch, *, steps: int, every: int, fragments: int, delay: int | str) -> list[Event]:
    events: list[Event] = []
    done = [0]

    def with_recorder(recipe: Recipe, seed: int, num_islands: int) -> Plan:
        return dataclasses.replace(assemble(recipe, seed, num_islands), methods=(recorder(events, done),))

    monkeypatch.setattr("dtrain.assemble.assemble", with_recorder)
    model = nn.ParameterList(nn.Parameter(torch.zeros(GRAIN)) for _ in range(fragments))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def updated(*_: object) -> None:
        done[0] += 1
        events.append(Event("update", done[0]))

    optimizer.register_step_post_hook(updated)  # before join's, so behind the update and before the rounds that it starts
    with dtrain.join(
        model,
        optimizer,
        recipe="diloco",
        every=every,
        fragments=fragments,
        delay="round" if delay == "round" else int(delay),
        bucket_bytes=4 * GRAIN,
        link=connect_local(1)[0],
    ) as sync:
        assert [b.fragment for b in sync.buckets] == list(range(fragments))
        for _ in range(steps):
            optimizer.step()
    return events


def expected(*, steps: int, every: int, fragments: int, delay: int) -> list[Event]:
    """Fragment p starts after steps p H / P, H + p H / P, ...; with delay d > 0 it lands before the update of step start + d."""
    starts = {f: [t for t in range(1, steps + 1) if t % every == f * every // fragments] for f in range(fragments)}
    out = []
    for t in range(1, steps + 1):
        if delay > 0:
            out += [Event("land", t - 1, f) for f in range(fragments) if t - delay in starts[f]]
        out.append(Event("update", t))
        begun = [f for f in range(fragments) if t in starts[f]]
        out += [Event("send", t, f) for f in begun]
        if delay == 0:
            out += [Event("land", t, f) for f in begun]
    drained = sorted((t, f) for f in range(fragments) for t in starts[f] if delay > 0 and t + delay > steps)
    return out + [Event("land", steps, f) for _, f in drained]


CASES = [
    (every, fragments, delay)
    for every, fragments in ((1, 1), (5, 1), (12, 4), (7, 3), (4, 4))
    for delay in (0, 1, 3, "round")
    if delay == "round" or delay <= every
]


@pytest.mark.parametrize(("every", "fragments", "delay"), CASES)
def test_rounds_start_and_land_when_they_should(
    monkeypatch: pytest.MonkeyPatch, every: int, fragments: int, delay: int | str
) -> None:
    steps = 3 * every + 2
    late = every if delay == "round" else int(delay)
    events = recorded(monkeypatch, steps=steps, every=every, fragments=fragments, delay=delay)
    assert events == expected(steps=steps, every=every, fragments=fragments, delay=late)


@pytest.mark.parametrize(("every", "fragments", "delay"), CASES)
def test_a_fragment_lands_before_it_sends_again(
    monkeypatch: pytest.MonkeyPatch, every: int, fragments: int, delay: int | str
) -> None:
    events = recorded(monkeypatch, steps=3 * every + 2, every=every, fragments=fragments, delay=delay)
    for f in range(fragments):
        own = [e.what for e in events if e.fragment == f]
        assert own == ["send", "land"] * (len(own) // 2)
        assert own  # a test without rounds would say nothing


def peak_in_flight(events: list[Event]) -> int:
    flying = peak = 0
    for e in events:
        flying += {"send": 1, "land": -1, "update": 0}[e.what]
        peak = max(peak, flying)
    return peak


@pytest.mark.parametrize(("delay", "peak"), [(0, 1), (1, 1), (3, 1), (4, 2), (6, 2), (9, 3), ("round", 4)])
def test_staggered_fragments_share_the_link_in_time(monkeypatch: pytest.MonkeyPatch, delay: int | str, peak: int) -> None:
    """Fragments start 12 / 4 = 3 steps apart, each flies for ``delay`` steps: ceil(delay / 3) fly at once, where one fragment of
    the whole model would put all of it on the link at one step."""
    assert peak_in_flight(recorded(monkeypatch, steps=40, every=12, fragments=4, delay=delay)) == peak

"""Does an outer loop whose state lies on the host train to the same bits, and does nothing of it lie on the device?

A GPU is not needed for the second: the bucket lies on torch's "meta" device, whose tensors no operation mixes with the CPU's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain import on_host
from dtrain.assemble import assemble, cut
from dtrain.bucket import Bucket, flatten
from dtrain.connect import Connection
from dtrain.core import Core, Flight
from dtrain.link import Link, Peers
from dtrain.moments import Unmade
from dtrain.plan.sent import model_flat
from dtrain.recipes import resolve
from dtrain.topology import Round
from dtrain.traffic import Traffic
from dtrain.transport.base import ROUND
from tests.islands import run_islands
from tests.unit.test_plan_memory import held_bytes, reached

ISLANDS, STEPS, LR = 4, 13, 0.125
LOOPS: dict[str, dict[str, Any]] = {
    "in time": {"recipe": "diloco", "every": 3},
    "copied": {"recipe": "fedavg", "every": 3, "delay": 1},
    "late, coded": {"recipe": "delayed_diloco", "every": 4, "delay": 2, "codec": "int4:32:stochastic"},
    "blended": {"recipe": "streaming_diloco", "every": 4, "fragments": 2, "delay": 1},
    "eager": {"recipe": "eager_diloco", "every": 3},
    "pure": {"recipe": "diloco", "every": 4, "delay": "round", "landing": "pure", "outer_lr": 0.2, "reduce": "gather"},
    "low rank": {"recipe": "dilocox", "every": 3, "rank": "adaptive:3"},
    "few": {"recipe": "sparseloco", "every": 3, "codec": "topk:8/64:2"},
    "radial": {"recipe": "decoupled_diloco", "every": 3, "delay": 1, "quorum": "100%"},
    "pairs": {"recipe": "noloco", "every": 3, "delay": 1, "codec": "int8:64"},
    "moments": {"recipe": "desloc", "every": 3, "moments": "1:2"},
    "moments, late": {"recipe": "desloc", "every": 3, "delay": 2, "moments": "1:2"},
}
"""Every landing, and every method that has such state."""


class Model(nn.Module):
    """loss = |A x - c|^2 / 2 of a matrix x, and as much of a vector."""

    def __init__(self, node: int) -> None:
        super().__init__()
        own, both = torch.Generator().manual_seed(node), torch.Generator().manual_seed(99)
        self.matrix = nn.Parameter(torch.rand(12, 40, generator=both))
        self.vector = nn.Parameter(torch.rand(130, generator=both))
        self._c, self._d = torch.rand(12, 40, generator=own), torch.rand(130, generator=own)

    def forward(self) -> Tensor:
        pairs = ((self.matrix, self._c), (self.vector, self._d))
        return sum((0.5 * (x - c.to(x)).square().sum() for x, c in pairs), torch.zeros(()))


def trained(axes: dict[str, Any], dtype: torch.dtype, state: str) -> list[dict[str, Tensor]]:
    """Of each island, x after each step and after the drain, and what a checkpoint would hold in the midst of it."""

    def island(connection: Connection) -> dict[str, Tensor]:
        model = Model(connection.node).to(dtype)
        moments = axes["recipe"] == "desloc"
        kind = torch.optim.AdamW if moments else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(model, optimizer, **axes, bucket_bytes=1024, outer_state=state, link=connection) as sync:
            for _ in range(STEPS):
                optimizer.zero_grad()
                model().backward()
                optimizer.step()
                seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            saved = {k: v.clone() for k, v in sync.state_dict().items() if k.startswith("bucket")}
            sync.merge()
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return {"x": torch.stack(seen), **saved}

    return run_islands(ISLANDS, island)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in LOOPS), ("late, coded", torch.bfloat16), ("eager", torch.bfloat16)]
)
def test_bits_are_those_of_state_beside_the_parameters(name: str, dtype: torch.dtype) -> None:
    for here, there in zip(*(trained(LOOPS[name], dtype, state) for state in ("device", "host")), strict=True):
        assert here.keys() == there.keys(), "a run may go on either way"
        assert all(torch.equal(here[key], there[key]) for key in here)


def put(x: Tensor, out: Tensor) -> None:
    """What comes from the device is 1, and what goes there is nowhere."""
    if x.is_meta:
        out.fill_(1.0)


@torch.no_grad()
def fly(core: Core, flight: Flight, bucket: Bucket) -> None:
    """By hand; what is sent is what all others send."""
    while True:
        flight.advance()
        if flight.done:
            break
        sent = [wire for _, wire in flight.link.outbox]
        assert flight.link.wires_on == torch.device("cpu")
        assert {wire.device.type for wire in sent} == {"cpu"}
        flight.link.inbox = {peer: torch.zeros(n, dtype=torch.uint8) for peer, n in flight.link.expected.items()}
    lane = next(lane for lane in core.lanes if lane.bucket is bucket)
    if lane.algorithm.land is not None:
        lane.algorithm.land(bucket, lane.state)
    if lane.algorithm.merged is not None:
        lane.algorithm.merged(bucket, lane.state)
    lane.flight, lane.land_step = None, -1


@pytest.mark.parametrize("name", LOOPS)
def test_nothing_but_the_parameters_lies_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "_host_of", lambda x: torch.device("cpu"))
    monkeypatch.setattr(on_host, "_copy", put)
    axes = {k: v for k, v in LOOPS[name].items() if k != "recipe"}
    plan = assemble(resolve(LOOPS[name]["recipe"], {**axes, "outer_state": "host"}, ISLANDS), 0, ISLANDS)
    flat = model_flat({"matrix": (12, 40), "vector": (130,)}, torch.device("meta"))
    cuts = cut(plan.recipe, flat, num_ranks=1, with_grad=False)
    buckets = [replace(b, moments=Unmade(len(b.layout.spans))) if plan.recipe.moments else b for b in cuts]
    core = Core(plan, buckets, Peers(0, ISLANDS))
    for lane in core.lanes:
        for _ in range(3):
            fly(core, core.start(lane, 0), lane.bucket)
        held = reached([lane.algorithm, lane.state])
        assert len(held) >= len(lane.state) + 1, "the mirror too"
        assert {t.device.type for t in held} == {"cpu"}


@pytest.mark.parametrize("name", LOOPS)
def test_of_a_link_that_keeps_nothing_no_mirror_stays(name: str) -> None:
    axes = {k: v for k, v in LOOPS[name].items() if k != "recipe"}
    plan = assemble(resolve(LOOPS[name]["recipe"], {**axes, "outer_state": "host"}, ISLANDS), 0, ISLANDS)
    flat = flatten([("matrix", nn.Parameter(torch.zeros(12, 40))), ("vector", nn.Parameter(torch.zeros(130)))])
    cuts = cut(plan.recipe, flat, num_ranks=1, with_grad=False)
    buckets = [replace(b, moments=Unmade(len(b.layout.spans))) if plan.recipe.moments else b for b in cuts]
    beside = []
    for keeps_nothing in (False, True):
        core = Core(plan, buckets, Peers(0, ISLANDS))
        core.keeps_nothing = keeps_nothing
        for lane in core.lanes:
            fly(core, core.start(lane, 0), lane.bucket)
        held = reached([part for lane in core.lanes for part in (lane.algorithm, lane.state)])
        state = {x for lane in core.lanes for x in lane.state.values()}
        beside.append(held_bytes(held - state))
    assert beside[0] - beside[1] >= sum(b.x.numel() * b.x.element_size() for b in buckets)


def test_wires_lie_where_their_flight_wants_them() -> None:
    """The first flight of each island on the device, which is "meta", and the second on the host."""

    def island(connection: Connection) -> list[str]:
        traffic, seen = Traffic(connection.transport, torch.device("meta")), []
        peer = 1 - connection.node
        for index, place in enumerate((None, torch.device("cpu"))):
            link = Link(connection.node, 2, Round(0.5, (peer,), ((peer, 0.5),)), index, wires_on=place)

            def send(link: Link = link) -> Iterator[None]:
                link.post(peer, torch.full((8,), 7, dtype=torch.uint8))
                link.expect(peer, 8)
                yield
                seen.append(link.received(peer).device.type)

            flight = Flight(send(), link, kind=ROUND, index=index, bucket=0, step=1)
            traffic.launch([flight])
            assert traffic.wait([flight], 10.0)
            assert flight.error is None, flight.error
        together.wait()
        traffic.close(drain_s=1.0)
        return seen

    together = threading.Barrier(2)
    assert run_islands(2, island) == [["meta", "cpu"]] * 2

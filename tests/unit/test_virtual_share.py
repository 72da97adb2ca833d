"""Is a simulation shared where that pays, and so that few wires leave a share?"""

from __future__ import annotations

import pytest

from dtrain import virtual_share
from dtrain.config import parse_job
from dtrain.topology import mixing
from dtrain.virtual_share import owners_of, split


def shares(*changes: str) -> int:
    """Of 1,000 islands of 10,000 parameters, 1,000 steps of 0.1 s."""
    said = ["islands.count=1000", "sim.problem=consensus", "sim.step_s=0.1", "train.steps=1000", "sync.recipe=dpsgd", *changes]
    job = parse_job({}, said)
    owners = owners_of(job, job.sim.numel)
    assert len(owners) == job.islands.count
    sizes = [owners.count(share) for share in range(max(owners) + 1)]
    assert max(sizes) - min(sizes) <= 1
    return len(sizes)


def test_a_run_is_shared_by_cores_where_it_is_longer_than_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_share, "cores", lambda: 2)
    assert shares() == 2
    assert shares("train.steps=10") == 1, "1.3 s"
    assert shares("islands.count=2", "train.steps=4000") == 1, "a window of a quarter of a millisecond"
    assert shares("islands.threads=2") == 1, "whose kernels have both cores"
    assert shares("train.steps=10", "sim.processes=3") == 3, "as it is told"
    assert shares("sim.step_noise=0.1") == 1, "a window is one event"
    assert shares("sim.step_noise=0.1", "link.rtt=20ms") == 2
    assert shares("sim.jitter=1ms", "link.rtt=0.2ms") == 1, "a thousandth of 1,000 islands are in one window"
    monkeypatch.setattr(virtual_share, "cores", lambda: 8)
    assert shares() == 8


def leaving(topology: str, graph: str | None, num_islands: int, num_shares: int, rounds: int) -> int:
    rows = mixing(topology, graph, 0).rows
    owners = split(rows, num_islands, num_shares)
    assert set(owners) == set(range(num_shares))
    return sum(
        owners[node] != owners[peer]
        for index in range(rounds)
        for node in range(num_islands)
        for peer in rows(index, node, num_islands).sends
    )


def test_few_wires_leave_a_share() -> None:
    """On a ring, those at the ends of blocks; of hops 1, 2, ..., 64, those of hop 1, as islands two apart share."""
    assert leaving("ring", None, 100, 2, 1) == 4
    assert leaving("ring", None, 100, 3, 1) == 6
    assert leaving("one_peer_exponential", None, 100, 2, 7) == 100

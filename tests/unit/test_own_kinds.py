"""Does a method that needs a matrix that stays, or meetings of two, take one's own topology where its rounds are of that kind?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.assemble import assemble
from dtrain.bucket import whole
from dtrain.connect import Connection
from dtrain.events.graph_constants import rates_of_rounds
from dtrain.link import Peers
from dtrain.own_topology import LOOK, Kind, mixing_of
from dtrain.recipes import resolve
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import LR, problem

MINE = '''
import random
from dtrain.topology import Round

LATE = 70


def ring(index, node, num_nodes):
    left, right = sorted(((node - 1) % num_nodes, (node + 1) % num_nodes))
    return Round(1 / 3, (left, right), ((left, 1 / 3), (right, 1 / 3)))


def walk(index, node, num_nodes):
    return Round(0.5, ((node + 1) % num_nodes,), (((node - 1) % num_nodes, 0.5),))


def pairs(index, node, num_nodes):
    """A matching that is drawn for each round."""
    order = list(range(num_nodes))
    random.Random(index).shuffle(order)
    peer = order[order.index(node) ^ 1]
    return Round(0.5, (peer,), ((peer, 0.5),))


def alone_later(index, node, num_nodes):
    return ring(index, node, num_nodes) if index < LATE else Round(1.0, (), ())


def less_later(index, node, num_nodes):
    half, (peer,), _ = pairs(index, node, num_nodes)
    return Round(half, (peer,), ((peer, half),)) if index < LATE else Round(0.75, (peer,), ((peer, 0.25),))
'''


@pytest.fixture(autouse=True)
def in_a_folder_with_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)


@pytest.mark.parametrize("recipe", ["choco", "beer", "chebyshev"])
def test_a_static_ring_of_ones_own_is_the_projects(recipe: str) -> None:
    """Their weights are the same numbers in the same order, so the parameters are the same bits."""

    def island(connection: Connection, topology: str) -> Tensor:
        model = problem(4).model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe=recipe, topology=topology, link=connection):
            for _ in range(9):
                sgd_step(model, optimizer)
        return model.flat()

    theirs, own = (run_islands(4, lambda connection, name=name: island(connection, name)) for name in ("ring", "mine.py:ring"))
    assert all(bool((x == y).all()) for x, y in zip(theirs, own, strict=True))


def test_matchings_of_ones_own_are_met_as_often_as_in_the_rounds_that_were_looked_at() -> None:
    own = mixing_of("mine.py:pairs", None, 0, None, "pairs")
    pairs, rates = rates_of_rounds(own, 4, every=2)
    met = [{(min(a, p), max(a, p)) for a in range(4) for p in own.rows(i, a, 4).sends} for i in range(LOOK)]
    counted = {pair: sum(pair in each for each in met) / LOOK for pair in sorted(set().union(*met))}
    assert len(counted) == 6
    assert [tuple(pair) for pair in pairs.tolist()] == list(counted)
    assert rates.tolist() == pytest.approx([share / 2 for share in counted.values()], rel=1e-12)


@pytest.mark.parametrize("schedule", ["every", "ready"])
def test_a2cid2_takes_them(schedule: str) -> None:
    plan = assemble(resolve("a2cid2", {"topology": "mine.py:pairs", "schedule": schedule}, 4), 0, 4)
    plan.methods[0](whole("x", torch.zeros(50)), Peers(1, 4))
    assert (plan.graph is None) == (schedule == "every")


@pytest.mark.parametrize(
    ("recipe", "rows", "message"),
    [
        ("choco", "pairs", "round 1, of 64 that were looked at, is another than round 0; use another topology, or"),
        ("chebyshev", "walk", "round 0, of 64 that were looked at, lets island 0 hear island 3 with another weight"),
        ("a2cid2", "ring", "round 0, of 64 that were looked at, is no meeting of two, of weight 1/2, for island 0"),
        ("a2cid2", "walk", "round 0, of 64 that were looked at, is no meeting of two, of weight 1/2, for island 0"),
        ("push_sum", "walk", 'use topology = "directed" with sync.graph, a file of arcs, or sync.recipe = "dpsgd"'),
    ],
)
def test_what_is_of_another_kind_is_refused_with_what_was_seen(recipe: str, rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        resolve(recipe, {"topology": f"mine.py:{rows}"}, 4)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "kind", "misfit"),
    [("alone_later", "same", "is another than round 0"), ("less_later", "pairs", "is no meeting of two, of weight 1/2")],
)
def test_a_later_round_of_another_kind_is_refused_where_it_begins(rows: str, kind: Kind, misfit: str) -> None:
    mixed = mixing_of(f"mine.py:{rows}", None, 0, None, kind)
    mixed.rows(69, 1, 4)
    with pytest.raises(ValueError, match=f"round 70 {misfit}.*, as none of the first 64 did; let it be like them"):
        mixed.rows(70, 1, 4)
    mixing_of(f"mine.py:{rows}", None, 0, None).rows(70, 1, 4)

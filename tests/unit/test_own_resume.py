"""Does a resume see another talk between islands that no name says? That of an own topology, a server, or the seed that draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.assemble import assemble
from dtrain.bucket import flatten, make_buckets
from dtrain.core import Core
from dtrain.link import Peers
from dtrain.recipes import resolve

PAIRS = """
from dtrain.topology import Round


def rows(index, node, num_nodes):
    peer = ((node + index) % num_nodes ^ 1) - index
    return Round(0.5, (peer % num_nodes,), ((peer % num_nodes, 0.5),))
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PAIRS)
    Path("said_otherwise.py").write_text(PAIRS + "\n# the same rows\n")
    Path("edited.py").write_text(PAIRS.replace("node + index", "node + index // 9").replace("- index", "- index // 9"))


def core(topology: str = "ring", server: str | None = None, seed: int = 0, graph: str | None = None) -> Core:
    recipe = resolve("dpsgd", {"topology": topology, "server": server, "graph": graph}, 4)
    flat = flatten([("x", nn.Parameter(torch.zeros(6)))])
    plan = assemble(recipe, seed, 4)
    buckets = make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=False)
    return Core(plan, buckets, Peers(0, 4))


def test_what_a_name_says_has_no_number() -> None:
    for topology in ("ring", "random_pairs", "star"):
        assert core(topology, seed=3).plan.edges == 0
    assert core("graph", graph="star").plan.edges != 0


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ({"topology": "mine.py:rows"}, {"topology": "edited.py:rows"}),
        ({"topology": "mine.py:rows"}, {"topology": "mine.py:rows", "server": "sampled:2:5"}),
        ({"server": "sampled:2:5"}, {"server": "sampled:2:6"}),
        ({"server": "sampled:2:5"}, {"server": "sampled:2:5", "seed": 1}),
    ],
)
def test_another_is_refused_and_the_same_is_not(saved: dict[str, Any], resumed: dict[str, Any]) -> None:
    state = core(**saved).state_dict()
    core(**saved).load_state_dict(state)
    with pytest.raises(ValueError, match="the saved state is of another graph, server or topology of your own"):
        core(**resumed).load_state_dict(state)
    core(**resumed).load_state_dict({key: value for key, value in state.items() if key != "edges"})  # as old states are


def test_the_same_rows_in_another_file_are_the_same() -> None:
    core("said_otherwise.py:rows").load_state_dict(core("mine.py:rows").state_dict())

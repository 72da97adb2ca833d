"""Is a simulation whose islands are shared out, each share on a clock of its own, the one on one clock, bit for bit?

Shares are threads here, over the sockets that they have between processes."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.algorithm import Algorithm
from dtrain.assemble import Plan, assemble
from dtrain.errors import NonFinite, PeerLost
from dtrain.recipes import resolve, with_steps
from dtrain.virtual import Account, Simulation
from dtrain.virtual_link import LinkModel, VirtualLink, Way
from dtrain.virtual_problem import Quadratic, drawn_quadratic
from dtrain.virtual_sockets import Line, carry
from dtrain.virtual_windows import Failure, windows

NUMEL, STEPS, LR, ISLANDS = 150, 9, 0.125, 6
SHAPES = [("left", (70,)), ("right", (NUMEL - 70,))]

RECIPES: Mapping[str, tuple[str, dict[str, object]]] = {
    "at once": ("dpsgd", {"delay": 0}),
    "a step late": ("dpsgd", {}),
    "two peers": ("dpsgd", {"topology": "ring", "codec": "int8:32"}),
    "two peers at once": ("dpsgd", {"topology": "ring", "delay": 0}),
    "random pairs": ("dpsgd", {"topology": "random_pairs", "every": 2, "delay": 2}),
    "compressed differences": ("choco", {}),
    "to all": ("diloco", {"every": 3, "delay": 2, "reduce": "gather"}),
    "two phases": ("delayed_diloco", {"every": 4, "delay": 3, "fragments": 2, "reduce": "all_to_all"}),
    "gradients averaged": ("allreduce", {}),
    "gradients tracked": ("gradient_tracking", {}),
    "both compressed": ("beer", {}),
    "four phases": ("chebyshev", {"every": 4, "delay": 2}),
    "one way": ("push_sum", {"graph": "cycle"}),
    "a server's mean for all": ("semi_s2a", {}),
}
SAME = dict.fromkeys(range(ISLANDS), 0.125)
UNLIKE = {0: 0.125, 1: 0.25, 2: 0.0, 3: 0.125, 4: 0.5, 5: 0.25}
LINKS: Mapping[str, tuple[LinkModel, Mapping[int, float]]] = {
    "no time": (LinkModel(), SAME),
    # Times are multiples of 2^-10 s, and many events of unlike islands meet: 1,024 bytes take an eighth of a second.
    "a rate": (LinkModel(Way(65_536.0, 0.0)), UNLIKE),
    "a rate and a way": (LinkModel(Way(65_536.0, 0.25)), UNLIKE),
    "noise": (LinkModel(Way(20_000.0, 0.1), jitter_s=0.3, loss=0.2, between={(0, 1): Way(5_000.0, 1.0), (2, 5): Way(None, 0.02)}), UNLIKE),
    "noise without a way": (LinkModel(Way(20_000.0, 0.0), jitter_s=0.3, loss=0.2), SAME),
}
SPLITS = ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], [0, 1, 2, 2, 1, 0], [1, 0, 0, 0, 0, 0])


def made(plan: Plan, model: LinkModel, compute_s: Mapping[int, float], nodes: Sequence[int]) -> tuple[Simulation, VirtualLink]:
    problem, link = drawn_quadratic(ISLANDS, NUMEL, 3), VirtualLink(model, ISLANDS, 1)
    simulation = Simulation(
        plan, ISLANDS, SHAPES, problem, lr=LR, link=link, compute_s=compute_s.__getitem__, nodes=nodes
    )  # fmt: skip
    return simulation, link


def planned(recipe: str, axes: Mapping[str, object]) -> Plan:
    return assemble(with_steps(resolve(recipe, {"bucket_bytes": 256, **axes}, ISLANDS), STEPS), 5, ISLANDS)


def shared(parts: Sequence[Simulation], owners: Sequence[int], model: LinkModel) -> list[Failure | None]:
    ends: dict[tuple[int, int], Line] = {}
    for a, b in combinations(range(len(parts)), 2):
        one, other = socket.socketpair()
        ends[a, b], ends[b, a] = Line(b, one), Line(a, other)

    def live(own: int) -> Failure | None:
        lines = [ends[own, other] for other in range(len(parts)) if other != own]
        return carry(windows(parts[own], STEPS, owners, own, model.least_s), lines, own, parts[own])

    with ThreadPoolExecutor(len(parts)) as threads:
        found = [threads.submit(live, own) for own in range(len(parts))]
        ended = [one.result(timeout=60) for one in found]
    for line in ends.values():
        line.close()
    return ended


Told = tuple[list[Tensor], list[Account], list[float]]


@pytest.mark.parametrize("case", RECIPES)
def test_shares_are_the_whole_bit_for_bit(case: str) -> None:
    """Parameters, accounts, and what was sent again; whatever the link, whoever is slow, and whoever is where."""
    for turn, (model, compute_s) in enumerate(LINKS.values()):
        whole, link = made(planned(*RECIPES[case]), model, compute_s, range(ISLANDS))
        virtual_s = whole.run(STEPS)
        owners = SPLITS[(turn + list(RECIPES).index(case)) % len(SPLITS)]
        own = [[node for node in range(ISLANDS) if owners[node] == share] for share in range(max(owners) + 1)]
        parts = [made(planned(*RECIPES[case]), model, compute_s, nodes) for nodes in own]
        assert shared([part for part, _ in parts], owners, model) == [None] * len(parts)
        for nodes, (part, of_part) in zip(own, parts, strict=True):
            assert part.stuck() is None
            for node, x, account in zip(nodes, part.parameters, part.accounts, strict=True):
                assert torch.equal(x, whole.parameters[node]), f"island {node}"
                assert account == whole.accounts[node], f"island {node}"
                assert of_part.resent_bytes[node] == link.resent_bytes[node]
        assert max(account.ended_s for part, _ in parts for account in part.accounts) == virtual_s

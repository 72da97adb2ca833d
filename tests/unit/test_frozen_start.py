"""How much is exchanged at the start for frozen parameters? Digests of all at once, and of the values those that differ."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from dtrain import buffers
from dtrain.connect import Connection
from dtrain.engine import join
from dtrain.exact import Exact
from tests.islands import run_islands

GROUPS, WIDTH = 8, 20
PROMISES, DIGEST = 4 * 8, 32
DIFFER = {1: (2,), 2: (2, 5)}
"""Of islands, the frozen parameters that are not island 0's."""


def model_of(island: int) -> nn.Module:
    layers = [nn.Linear(WIDTH, 1, bias=False).requires_grad_(False) for _ in range(GROUPS)]
    model = nn.Sequential(*layers, nn.Linear(3, 3, bias=False))
    for k, p in enumerate(model.parameters()):
        nn.init.constant_(p, -k - island if k in DIFFER.get(island, ()) else k)
    return model


def test_only_frozen_parameters_that_differ_are_exchanged_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MAX_BUCKET_BYTES", 4 * WIDTH)  # a parameter a group
    waits, run = Counter[int](), Exact._run

    def counted(self: Exact, *arguments: object) -> None:
        waits[self._connection.node] += 1
        run(self, *arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Exact, "_run", counted)

    def island(connection: Connection) -> tuple[list[float], int]:
        model = model_of(connection.node)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with join(model, optimizer, recipe="fedavg", every=2, link=connection) as sync:
            found = [float(v) for p in model.parameters() for v in p.detach().unique()]
            sent = sync.stats().wire_bytes_start
            begun[connection.node] = waits[connection.node]
        return found, sent

    begun: dict[int, int] = {}
    results = run_islands(3, island)
    assert [values for values, _ in results] == [list(map(float, range(GROUPS + 1)))] * 3
    assert begun == {0: 2 + 2, 1: 2 + 1, 2: 2 + 2}, "promises, all digests, then what differs; what is trained goes by waves"
    told = 2 * (PROMISES + DIGEST + GROUPS * DIGEST)
    assert [sent for _, sent in results] == [told + 3 * 4 * WIDTH, told + 1, told + 2], "and that it came"

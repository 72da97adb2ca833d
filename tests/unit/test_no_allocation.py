"""Does a round allocate anything once the first has been? Neither torch, numpy nor the traffic thread may, beyond a few bytes."""

from __future__ import annotations

import os
import threading
import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dtrain
from dtrain.connect import Connection
from dtrain.engine import Sync
from dtrain.optim import AccumAdamW
from dtrain.traffic import Traffic
from tests.islands import run_islands

SMALL = 4096
"""Bytes: scalars, counters and norms are below; the smallest buffer of the model here, its int4 wire, is 32 KiB."""
WIDTH, WARM_UP, STEPS = 256, 6, 12


class NewStorages(TorchDispatchMode):
    """Notes each operation whose result lies in memory that none of its operands has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _memory(x) not in held and x.untyped_storage().nbytes() > SMALL:
                self.found.append(f"{func}: {x.untyped_storage().nbytes()} bytes on {threading.current_thread().name}")
        return out


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


pytestmark = pytest.mark.skipif(
    os.environ.get("DTRAIN_KERNELS") == "reference", reason="the specification is written in expressions, which allocate"
)

CASES = {
    "delayed_diloco": ({"every": 2, "delay": 1}, False),
    "diloco": ({"every": 2}, False),
    "dpsgd": ({"codec": "int8:64"}, True),
    "choco": ({"codec": "int4:64"}, True),
    "dpsgd, another optimizer": ({"codec": "bf16"}, False),
    "allreduce": ({}, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_round_allocates_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    axes, fused = CASES[case]
    watches = threading.Event()
    found: list[str] = []
    for owner, name in ((Sync, "before_update"), (Sync, "after_update"), (Sync, "_fused_step"), (Traffic, "_advance")):
        inner = getattr(owner, name)

        def watched(self: Any, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            if not watches.is_set():
                return inner(self, *args, **kwargs)
            with NewStorages() as mode:
                out = inner(self, *args, **kwargs)
            found.extend(mode.found)
            return out

        monkeypatch.setattr(owner, name, watched)

    barrier = threading.Barrier(2)

    def island(connection: Connection) -> int:
        torch.manual_seed(0)
        model = nn.Linear(WIDTH, WIDTH)
        optimizer = (AccumAdamW if fused else torch.optim.SGD)(model.parameters(), lr=0.01)
        inputs = torch.ones(1, WIDTH)
        peak = 0
        clip = 1.0 if fused else None
        with dtrain.join(model, optimizer, recipe=case.partition(",")[0], clip=clip, link=connection, **axes) as sync:
            for step in range(WARM_UP + STEPS):
                if step == WARM_UP:
                    sync.settle()
                    barrier.wait(timeout=30)
                    if connection.node == 0:
                        tracemalloc.start()  # numpy's memory too
                        watches.set()
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
            sync.settle()
            barrier.wait(timeout=30)
            if connection.node == 0:
                watches.clear()
                peak = max((s.size for s in tracemalloc.take_snapshot().statistics("traceback")), default=0)
                tracemalloc.stop()
        return peak

    peaks = run_islands(2, island)
    # The pools grow by a buffer whenever more wires than ever before are under way at once, a matter of threads' luck: at most
    # one for each of a round's two phases and both islands. What a round needs each time would be there STEPS times.
    grown = [entry for entry in found if entry.startswith("aten.empty")]
    assert [entry for entry in found if entry not in grown] == []
    assert len(grown) <= 4, grown
    assert max(peaks) <= 16 * SMALL, "numpy or Python"


def test_the_count_sees_an_allocation() -> None:
    x = torch.zeros(2 * SMALL)
    with NewStorages() as mode:
        x.add_(1.0)
        x[: SMALL // 2].mul_(2.0)
        assert not mode.found
        x.add(x)
    assert len(mode.found) == 1

"""What becomes of an island that receives a damaged wire? It ends with an error that names sender and fault, itself untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dtrain
import dtrain.engine
from dtrain.connect import Connection
from dtrain.errors import WireError
from dtrain.optim import AccumAdamW
from dtrain.transport.base import ROUND, Inbox, Tag
from tests.islands import run_islands

DAMAGED_ROUND = 2
CASES = {
    "delayed_diloco": {"every": 2, "delay": 1},
    "fedavg": {"every": 2, "delay": 1, "codec": "bf16"},
    "dpsgd": {"codec": "int8:64"},
    "choco": {},
}


def damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of island 1's first wire of that round, on its way to island 0."""
    deliver = Inbox.deliver

    def flipped(self: Inbox, peer: int, tag: Tag, wire: Tensor) -> None:
        if (tag.kind, tag.round, tag.phase, peer) == (ROUND, DAMAGED_ROUND, 0, 1):
            wire = wire.clone()
            wire[-1] ^= 16
        deliver(self, peer, tag, wire)

    monkeypatch.setattr(Inbox, "deliver", flipped)


def values(model: nn.Module, sync: dtrain.engine.Sync) -> list[Tensor]:
    state = [v for lane in sync.core.lanes for k, v in sorted(lane.state.items())]
    return [x.detach().clone() for x in (*model.parameters(), *state)]


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_flipped_bit_ends_the_run_before_it_is_decoded(recipe: str, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(monkeypatch)

    def island(connection: Connection) -> str:
        torch.manual_seed(0)
        model = nn.Linear(40, 30)
        optimizer = (AccumAdamW if fused else torch.optim.AdamW)(model.parameters(), lr=0.1)
        inputs = torch.randn(2, 40, generator=torch.Generator().manual_seed(connection.node))
        before: list[Tensor] = []
        sync = dtrain.join(model, optimizer, recipe=recipe, link=connection, **CASES[recipe])
        try:
            with sync:
                for _ in range(12):
                    optimizer.zero_grad()
                    model(inputs).square().mean().backward()
                    before = values(model, sync)
                    optimizer.step()
        except WireError as e:
            assert all(map(torch.equal, before, values(model, sync)))
            return f"island {connection.node}, step {sync.step}: {e}"
        except RuntimeError as e:  # the other island is left alone
            return str(e)
        return "nothing"

    said = run_islands(2, island, timeout_s=30)[0]
    every = CASES[recipe].get("every", 1)
    assert said == (
        f"island 0, step {every * (DAMAGED_ROUND + 1)}: island 1 sent, for bucket 0, a wire whose checksum does not fit its "
        "bytes: they changed on the way"
    )

"""Is the state of another recipe refused, whichever of the two keeps more?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dtrain
from dtrain.connect import connect_local
from dtrain.engine import Sync

LATE: dict[str, Any] = {"recipe": "delayed_diloco", "every": 4, "delay": 2}
KEPT: dict[str, Any] = {"recipe": "diloco", "every": 4, "delay": 2}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "residuals": (LATE, {**LATE, "error_feedback": False}, "residual"),
    "momentum": (LATE, {**LATE, "outer": "sgd"}, "momentum"),
    "moments": ({"recipe": "desloc", "every": 4, "moments": "1:1"}, {"recipe": "fedavg", "every": 4}, "exp_avg"),
    "what was sent": (KEPT, {**KEPT, "landing": "blend"}, "sent"),
}


def trained(said: dict[str, Any], steps: int) -> Sync:
    torch.manual_seed(1)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    sync = dtrain.join(model, optimizer, link=connect_local(1)[0], **said)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().sum().backward()
        optimizer.step()
    return sync


def without_waiting(sync: Sync) -> dict[str, torch.Tensor]:
    """Its state, but for the time that it has waited, which goes on."""
    return {key: value.clone() for key, value in sync.state_dict().items() if not key.endswith(".wait_s")}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("more_first", [True, False])
def test_a_state_that_would_be_left_behind_or_is_missing_is_named(name: str, more_first: bool) -> None:
    more, less, what = PAIRS[name]
    was, now = (more, less) if more_first else (less, more)
    with trained(was, 5) as sync:
        saved = without_waiting(sync)
    with trained(was, 0) as again:
        again.load_state_dict(saved)
    with trained(now, 1) as other:
        before = without_waiting(other)
        said = rf"^the saved state is of another recipe, model or number of ranks: \S*{what}\S* has shape "
        with pytest.raises(ValueError, match=said + (r"\(.*\) there and none here" if more_first else "none there and")):
            other.load_state_dict(saved)
        assert all(torch.equal(value, before[key]) for key, value in without_waiting(other).items()), "nothing is changed"

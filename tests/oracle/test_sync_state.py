"""Is a run that was saved with a round in flight and loaded elsewhere the same run to the bit? And does saving alter nothing?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.connect import Connection
from dtrain.engine import Sync
from tests.islands import run_islands

ISLANDS = 2
EVERY, SAVE_AT, MORE = 10, 12, 20
"""Saved two steps after a round has started: with a delay it is in flight."""


@dataclass(frozen=True, slots=True)
class Case:
    recipe: str
    delay: int | Literal["round"]
    landing: Literal["keep", "eager", "pure", "blend"] | None = None
    every: int = EVERY
    codec: str | None = None
    fragments: int | None = None
    rank: int | None = None
    outer_lr: float | None = None

    def join(self, model: nn.Module, opt: torch.optim.Optimizer, link: Connection) -> Sync:
        return dtrain.join(
            model,
            opt,
            recipe=self.recipe,
            every=self.every,
            delay=self.delay,
            landing=self.landing,
            codec=self.codec,
            error_feedback=True if self.codec else None,
            fragments=self.fragments,
            rank=self.rank,
            outer_lr=self.outer_lr,
            clip=1.0,
            link=link,
        )


DELAYS: tuple[int | Literal["round"], ...] = (0, 5, "round")
CASES = [
    *(Case("diloco", delay, "keep") for delay in DELAYS),
    *(Case("diloco", delay, "keep", codec="int4:64") for delay in DELAYS),
    *(Case("diloco", delay, "eager", codec="int4:64") for delay in DELAYS[1:]),
    *(Case("diloco", delay, "keep", codec="int8:64", fragments=3) for delay in DELAYS),
    *(Case("diloco", delay, "pure", codec="int4:64", outer_lr=0.2) for delay in DELAYS[1:]),
    Case("diloco", 3, "blend", codec="e3m0:64", fragments=2),
    *(Case("dpsgd", delay) for delay in DELAYS),
    *(Case("choco", delay) for delay in DELAYS),
    *(Case(recipe, 1, every=1) for recipe in ("dpsgd", "choco")),
    Case("allreduce", 0, every=1),
    Case("dilocox", 5, codec="int4:64:stochastic", rank=2),
]

Saved = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]
"""Model, sync, inner optimizer."""


def _start() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Drawn without torch's own generator, which the islands' threads share."""
    model = nn.Sequential(nn.Linear(6, 70), nn.Tanh(), nn.Linear(70, 3))
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4, generator=draw)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def _step(model: nn.Module, opt: torch.optim.Optimizer, island: int, step: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(900 * island + step))
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
    opt.step()


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tensors.items()}


def _optimizer_copy(opt: torch.optim.Optimizer) -> dict[str, Any]:
    state = opt.state_dict()
    return state | {"state": {i: _copies(values) for i, values in state["state"].items()}}


def _run(case: Case, *, save_at: int, save: bool) -> list[tuple[dict[str, Tensor], Saved | None]]:
    """The whole run on every island; with ``save`` also what it saved after ``save_at`` steps, MORE before the end."""

    def island(link: Connection) -> tuple[dict[str, Tensor], Saved | None]:
        model, opt = _start()
        saved: Saved | None = None
        with case.join(model, opt, link) as sync:
            for step in range(save_at + MORE):
                _step(model, opt, link.node, step)
                if save and step + 1 == save_at:
                    state = _copies(sync.state_dict())
                    saved = _copies(model.state_dict()), state, _optimizer_copy(opt)
        return _copies(model.state_dict()), saved

    return run_islands(ISLANDS, island)


def _resume(case: Case, saved: list[Saved], *, forget: str = "") -> list[dict[str, Tensor]]:
    """A new run from what was saved; ``forget`` names a part of the sync state that is lost on the way."""

    def island(link: Connection) -> dict[str, Tensor]:
        weights, state, optimizer = saved[link.node]
        model, opt = _start()
        with case.join(model, opt, link) as sync:
            model.load_state_dict(weights)
            opt.load_state_dict(optimizer)
            fresh = sync.state_dict()
            sync.load_state_dict({k: fresh[k] if forget and forget in k else v for k, v in state.items()})
            for step in range(sync.step, sync.step + MORE):
                _step(model, opt, link.node, step)
        return _copies(model.state_dict())

    return run_islands(ISLANDS, island)


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _name(case: Case) -> str:
    words = (case.recipe, case.landing, case.codec, f"every{case.every}", f"delay_{case.delay}")
    return "-".join(word for word in words if word) + (f"-fragments{case.fragments}" if case.fragments else "")


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_a_resumed_run_is_the_undisturbed_run(case: Case) -> None:
    undisturbed = [final for final, _ in _run(case, save_at=SAVE_AT, save=False)]
    saving = _run(case, save_at=SAVE_AT, save=True)
    assert all(map(_equal, [final for final, _ in saving], undisturbed)), "saving altered the run"
    saved = [s for _, s in saving if s is not None]
    resumed = _resume(case, saved)
    assert all(map(_equal, resumed, undisturbed))


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_the_keys_are_there_from_the_first_step(case: Case) -> None:
    def island(link: Connection) -> tuple[set[str], set[str]]:
        model, opt = _start()
        with case.join(model, opt, link) as sync:
            first = set(sync.state_dict())
            for step in range(SAVE_AT):
                _step(model, opt, link.node, step)
            return first, set(sync.state_dict())

    for first, later in run_islands(ISLANDS, island):
        assert first == later


@pytest.mark.parametrize("recipe", ["dpsgd", "diloco"])
def test_a_round_in_flight_lands_on_its_step_whatever_comes_after(recipe: str) -> None:
    """Begun after step 10 it lands before the update of step 15, also where rounds now begin after steps 16 and 24."""
    saved = [s for _, s in _run(Case(recipe, 5), save_at=SAVE_AT, save=True) if s is not None]

    def island(link: Connection) -> list[int]:
        model, opt = _start()
        with Case(recipe, 5, every=8).join(model, opt, link) as sync:
            sync.load_state_dict(saved[link.node][1])
            lands = []
            for step in range(sync.step, 25):
                _step(model, opt, link.node, step)
                lands.append(sync.core.lanes[0].land_step)
            return lands

    assert run_islands(ISLANDS, island) == [[15] * 2 + [-1] + [21] * 5 + [-1] * 3 + [29] * 2] * ISLANDS


IN_FLIGHT, LANDED = SAVE_AT + EVERY, SAVE_AT + EVERY - 4
"""After the first landing, or anchors would still be the first weights: with the second round in flight, and before it starts."""


@pytest.mark.parametrize(
    ("case", "save_at", "part"),
    [
        (Case("diloco", 5, "keep"), IN_FLIGHT, ".anchor"),
        (Case("diloco", 5, "keep"), IN_FLIGHT, ".momentum"),
        (Case("diloco", 5, "keep"), IN_FLIGHT, ".sent"),
        (Case("diloco", 5, "keep"), IN_FLIGHT, ".delta"),
        (Case("diloco", 5, "keep"), IN_FLIGHT, ".land_step"),
        (Case("diloco", 5, "keep", codec="int4:64"), IN_FLIGHT, ".residual"),
        (Case("diloco", 5, "eager"), IN_FLIGHT, ".own"),
        (Case("diloco", 5, "eager"), LANDED, ".late"),
        (Case("dilocox", 5, codec="int4:64:stochastic", rank=2), IN_FLIGHT, ".residual"),
        (Case("dilocox", 5, codec="int4:64:stochastic", rank=2), IN_FLIGHT, ".warm"),
        (Case("dilocox", 5, codec="int4:64:stochastic", rank=2), IN_FLIGHT, ".first.draws"),
        (Case("dilocox", 5, codec="int4:64:stochastic", rank=2), IN_FLIGHT, ".second.draws"),
        (Case("diloco", 5, "pure", outer_lr=0.2), IN_FLIGHT, ".anchor"),
        (Case("diloco", 5, "pure", outer_lr=0.2), IN_FLIGHT, ".begun"),
        (Case("diloco", 5, "pure", outer_lr=0.2), IN_FLIGHT, ".delta"),
        (Case("diloco", 5, "pure", outer_lr=0.2), SAVE_AT, ".before"),
        (Case("diloco", 5, "blend"), IN_FLIGHT, ".anchor"),
        (Case("diloco", 5, "blend"), IN_FLIGHT, ".delta"),
        (Case("dpsgd", 5), IN_FLIGHT, ".own"),
        (Case("dpsgd", 5), IN_FLIGHT, ".in0"),
        (Case("dpsgd", 5), IN_FLIGHT, ".weights"),
        (Case("choco", 5), IN_FLIGHT, ".xhat"),
        (Case("choco", 5), IN_FLIGHT, ".s"),
    ],
    ids=lambda value: _name(value) if isinstance(value, Case) else str(value),
)
def test_each_part_of_the_state_is_needed(case: Case, save_at: int, part: str) -> None:
    """The comparison above sees it when a part is lost, so it says something about every part."""
    whole = _run(case, save_at=save_at, save=True)
    saved = [s for _, s in whole if s is not None]
    assert any(part in key for key in saved[0][1])
    resumed = _resume(case, saved, forget=part)
    assert not all(map(_equal, resumed, [final for final, _ in whole]))

"""Does the planner know what a recipe holds between two steps? Beside islands that train, whose tensors are counted.

What counts: State, buffers that are made once and stay, the buckets' gradients. What does not: the model, the optimizer, and the
wires under way, of which there are none between two steps that have settled."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from dtrain.connect import Connection
from dtrain.engine import Sync, join
from dtrain.methods import RULES
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.optim import SAM, AccumAdamW, muon_adamw
from dtrain.plan.accelerators import Work
from dtrain.plan.memory import memory
from dtrain.plan.sent import sent
from dtrain.recipes import RECIPES, Recipe, resolve, with_steps
from tests.islands import run_islands

ISLANDS, STEPS = 4, 8
TRAINED = [name for name, row in RECIPES.items() if RULES[row.algorithm].simulated is None]
CONFIG = GPTConfig(vocab=64, layers=2, width=64, heads=2, context=32)


def gpt() -> GPT:
    """106,000 parameters: beside them headers and counters are less than 1 %."""
    model = GPT(CONFIG)
    model.init_weights(1)
    return model


def short(row: Recipe) -> dict[str, object]:
    """Rounds of every sort within STEPS."""
    late = min(row.delay_steps, 1) if row.fragments == 1 else 0
    often: dict[str, object] = {} if row.every <= 4 else {"every": 4, "delay": late}
    return often if row.moments is None else {**often, "moments": "1:2"}


def stays(sync: Sync) -> set[Tensor]:
    """All tensors that what a lane is made of leads to, and the gradients of all buckets."""
    found, seen = [b.g for b in sync.buckets if b.g is not None], set[int]()
    inside = [*(lane.algorithm for lane in sync.core.lanes), *(lane.state for lane in sync.core.lanes)]
    while inside:
        one = inside.pop()
        if id(one) in seen or isinstance(one, types.ModuleType | type | nn.Module):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, types.FunctionType):  # not its globals
            inside += [*(one.__closure__ or ()), *(one.__defaults__ or ())]
        else:
            inside += gc.get_referents(one)
    return set(found)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Of their memory, each piece once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def optimizers(model: nn.Module, row: Recipe) -> list[torch.optim.Optimizer]:
    """AccumAdamW, with which a method that has a fused pass takes it, where the recipe wants no other."""
    if row.optimizer == "muon":
        return muon_adamw(model, lr=1e-3, weight_decay=0.0)
    if RULES[row.algorithm].signs:
        return [torch.optim.SGD(model.parameters(), lr=1e-3)]
    return [AccumAdamW(model.parameters(), lr=1e-3, every=row.moments_every or 1)]


def counted(name: str, axes: dict[str, object]) -> list[int]:
    """Of each island, after rounds of every fragment, at rest."""
    row = resolve(name, axes, ISLANDS)

    def island(connection: Connection) -> int:
        model = gpt()
        inner = optimizers(model, row)
        joined = inner if row.sam_rho is None else SAM(inner, rho=row.sam_rho)
        steps = STEPS if row.schedule.startswith("budget") else None
        with join(model, joined, recipe=name, **axes, total_steps=steps, link=connection) as sync:  # pyright: ignore[reportArgumentType]
            for _ in range(STEPS):
                for p in model.parameters():
                    p.grad = 0.1 * p.detach() + connection.node
                for optimizer in inner:
                    optimizer.step()
            sync.settle()
            return held_bytes(stays(sync))

    return run_islands(ISLANDS, island)


def planned(name: str, axes: dict[str, object]) -> int:
    """As ``dtrain plan`` says it of a rank."""
    shapes = {key: tuple(p.shape) for key, p in gpt().named_parameters()}
    row = with_steps(resolve(name, axes, ISLANDS), STEPS)
    work = Work(tokens=0, parameters=0, multiplied=0, layers=0, width=0, context=0)
    return memory(
        sent(row, shapes, ISLANDS), work, vocab=0, number_bytes=4, moments=False, accumulates=False, sam=False, num_ranks=1,
        micro_batches=1,
    ).kept  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_recipe_keeps_is_what_its_islands_hold(name: str) -> None:
    axes = short(RECIPES[name])
    most = max(counted(name, axes))
    assert planned(name, axes) == pytest.approx(most, rel=0.01)

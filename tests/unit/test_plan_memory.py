"""Does the planner know what a recipe holds between two steps? Beside islands that train, whose tensors are counted.

What counts: State, buffers that are made once and stay, the buckets' gradients. What does not: the model, the optimizer, and the
wires under way, of which there are none between two steps that have settled."""

from __future__ import annotations

import gc
import json
import types
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain import units
from dtrain.config import parse_job
from dtrain.connect import Connection
from dtrain.engine import Sync, join
from dtrain.launch.plan_shards import shards_of
from dtrain.launch.plan_table import _memory
from dtrain.methods import RULES
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.optim import SAM, AccumAdamW, muon_adamw
from dtrain.plan.accelerators import Work
from dtrain.plan.candidates import candidates
from dtrain.plan.company import everyone
from dtrain.plan.memory import WHOLE, Memory, Shards, memory
from dtrain.plan.model import Island
from dtrain.plan.plans import Planner, as_json
from dtrain.plan.sent import Sent, sent
from dtrain.plan.verdict import verdict
from dtrain.recipes import RECIPES, Recipe, resolve, with_steps
from tests.islands import run_islands
from tests.unit.test_plan import NUMEL, WORK, setting

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
    """What lanes hold, and the gradients of all buckets."""
    held = [part for lane in sync.core.lanes for part in (lane.algorithm, lane.state)]
    return reached(held) | {b.g for b in sync.buckets if b.g is not None}


def reached(roots: Iterable[object]) -> set[Tensor]:
    """All tensors that these lead to."""
    found, seen, inside = set[Tensor](), set[int](), list(roots)
    while inside:
        one = inside.pop()
        if id(one) in seen or isinstance(one, types.ModuleType | type | nn.Module):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.add(one)
        elif isinstance(one, types.FunctionType):  # not its globals
            inside += [*(one.__closure__ or ()), *(one.__defaults__ or ())]
        else:
            inside += gc.get_referents(one)
    return found


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


def planned(name: str, axes: dict[str, object]) -> Memory:
    """As ``dtrain plan`` says it of a rank."""
    shapes = {key: tuple(p.shape) for key, p in gpt().named_parameters()}
    row = with_steps(resolve(name, axes, ISLANDS), STEPS)
    work = Work(tokens=0, parameters=0, multiplied=0, layers=0, width=0, context=0)
    return memory(
        sent(row, shapes, ISLANDS), work, vocab=0, number_bytes=4, moments=False, accumulates=False, sam=False, num_ranks=1,
        micro_batches=1, on_host=row.outer_state == "host",
    )  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_recipe_keeps_is_what_its_islands_hold(name: str) -> None:
    axes = short(RECIPES[name])
    assert planned(name, axes).kept == pytest.approx(max(counted(name, axes)), rel=0.01)


@pytest.mark.parametrize("name", ["diloco", "dilocox", "noloco", "desloc"])
def test_on_the_host_it_is_as_much_and_a_mirror_of_the_parameters(name: str) -> None:
    axes = short(RECIPES[name])
    there, here = planned(name, {**axes, "outer_state": "host"}), planned(name, axes)
    mirror = 4 * sum(p.numel() for p in gpt().parameters())
    assert (there.kept, there.wires, there.host) == (0, 0, here.kept + here.wires + mirror)
    most = max(counted(name, {**axes, "outer_state": "host"}))
    assert there.host - here.wires == pytest.approx(most, rel=0.01)


def test_the_plan_says_what_lies_on_the_host_apart_and_reckons_with_its_speed() -> None:
    """An outer loop's row, of a GPU that moves 1 TB/s."""
    fast = replace(setting(1e8), island=lambda codec: Island(0.03, 0.0, 1e12), gpu="h100")
    beside, away, plain = (
        Planner(fast).row(resolve(name, axes, 2), 2)
        for name, axes in (("diloco", {"every": 4}), ("diloco", {"every": 4, "outer_state": "host"}), ("allreduce", {}))
    )
    mirror = 4 * NUMEL
    assert away.memory == Memory(beside.memory.model, 0, 0, beside.memory.activations, host=beside.memory.sync + mirror)
    assert as_json(away)["memory_bytes"] == asdict(away.memory)
    total, host = (units.show_bytes(n).replace(" ", "") for n in (away.memory.total, away.memory.host))
    assert (_memory(plain), _memory(away)) == (units.show_bytes(plain.memory.total).replace(" ", ""), f"{total}+{host}")
    assert away.time.step_s > beside.time.step_s
    small = Planner(replace(fast, gpu_bytes=beside.memory.model + 1))
    said = "sync.outer_state=host, which keeps it in the host's memory"
    assert [said in verdict(small, [row], 3000).why for row in (beside, away, plain)] == [True, False, False]


def test_a_job_with_its_state_on_the_host_is_planned_with_that_of_all_outer_loops() -> None:
    looked_at = candidates(resolve("diloco", {"outer_state": "host"}, 4), 4)
    assert {r.outer_state for r in looked_at if r.algorithm in ("diloco", "noloco", "desloc")} == {"host"}
    assert {r.outer_state for r in looked_at if r.algorithm == "dpsgd"} == {"device"}


def test_shards_share_weights_gradients_moments_and_what_the_recipe_keeps() -> None:
    """FSDP over 4 ranks. Blocks that are gathered count among the activations, buckets that are at hand among the wires."""
    counts = Sent((), 0.0, state_bytes=4096, wire_bytes=1024, company=everyone(2, 1), room_bytes=0, gradient_bytes=512)
    whole, shared = (
        memory(
            counts, WORK, vocab=256, number_bytes=4, moments=True, accumulates=False, sam=False, num_ranks=4, micro_batches=1,
            shards=Shards(ranks, ranks, ranks),
        )
        for ranks in (1, 4)
    )  # fmt: skip
    assert shared.model == WORK.parameters * 16 // 4 == whole.model // 4
    assert (shared.kept, whole.kept) == (1024 + 128, 1024 + 512)
    assert shared.wires == whole.wires + WORK.parameters
    few = replace(counts, room_bytes=2048, at_hand=1 / 16, under_way=1 / 4)  # a round that is waited for
    waited = memory(
        few, WORK, vocab=256, number_bytes=4, moments=True, accumulates=False, sam=False, num_ranks=4, micro_batches=1,
        shards=Shards(4, 4, 4),
    )  # fmt: skip
    assert (waited.kept, waited.wires) == (shared.kept, (256 + 512) // 4 + WORK.parameters // 16)
    averaged = memory(
        replace(few, averaged=1 / 2), WORK, vocab=256, number_bytes=4, moments=True, accumulates=False, sam=False, num_ranks=4,
        micro_batches=1, shards=Shards(4, 4, 4),
    )  # fmt: skip
    assert averaged == replace(waited, wires=4.5 * WORK.parameters // 2), "a merge needs more than those rounds do"
    assert shared.activations - whole.activations == 4 * (48 * WORK.width**2 + 4 * 256 * WORK.width)


@pytest.mark.parametrize(
    ("said", "on_device", "on_host"),
    [
        ({"stage": 1}, 4 + 4 + 12 / 4, 0),  # weights, gradients; of masters and moments a quarter
        ({"stage": 2}, 4 + 4 / 4 + 12 / 4, 0),
        ({"stage": 3}, (4 + 4 + 8) / 4, 0),  # weights are their own masters
        ({"stage": 1, "bf16": True}, 2 + 2 + 12 / 4, 0),
        ({"stage": 3, "bf16": True}, (2 + 2 + 12) / 4, 0),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 4 + 4 / 4, 12 / 4),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, 4 + 4 / 4 + 12 / 4, 0),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}, 4 / 4, 4 / 4 + 12 / 4),
    ],
)
def test_a_stage_of_zero_counts_what_it_shards(
    tmp_path: Path, said: dict[str, object], on_device: float, on_host: float
) -> None:
    """Bytes of a parameter, of 4 ranks."""
    zero = {key: value for key, value in said.items() if key != "bf16"}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": zero, "bf16": {"enabled": "bf16" in said}}), encoding="utf-8")
    job = parse_job({}, ["islands.engine=deepspeed", "islands.ranks=4", f'islands.deepspeed="{file}"'])
    counts = Sent((), 0.0, state_bytes=4096, wire_bytes=1024, company=everyone(2, 1), room_bytes=0, gradient_bytes=0)
    held = memory(
        counts, WORK, vocab=256, number_bytes=4, moments=True, accumulates=False, sam=False, num_ranks=4, micro_batches=1,
        shards=shards_of(job),
    )  # fmt: skip
    assert (held.model, held.host) == (on_device * NUMEL, on_host * NUMEL)
    assert (held.kept, held.wires) == (1024, 256 + NUMEL), "of the recipe's state a quarter, of buckets while they are at hand"


def test_ranks_that_share_a_stage_gather_all_of_it() -> None:
    """A mesh of two stages x two shards: weights and gradients of a stage lie whole on each rank until the last micro-batch, and
    of what is at hand each owns a quarter of the whole model, twice as much as a stage."""
    counts = Sent((), 0.0, state_bytes=4096, wire_bytes=1024, company=everyone(2, 1), room_bytes=0, gradient_bytes=512)
    whole, shared = (
        memory(
            counts, WORK, vocab=256, number_bytes=2, moments=True, accumulates=False, sam=False, num_ranks=4, micro_batches=1,
            shards=shards, model_parameters=2 * WORK.parameters,
        )
        for shards in (WHOLE, Shards(2, 2, 2))
    )  # fmt: skip
    assert shared.model == WORK.parameters * 16 // 2 == whole.model // 2
    assert shared.activations - whole.activations == (2 + 4) * WORK.parameters
    assert shared.wires == whole.wires + 4 * 2 * WORK.parameters // 4


def test_of_a_layer_that_is_computed_again_only_the_input_is_kept() -> None:
    counts = Sent((), 0.0, state_bytes=0, wire_bytes=0, company=everyone(2, 1), room_bytes=0, gradient_bytes=0)
    kept, again = (
        memory(
            counts, replace(WORK, layers=10), vocab=256, number_bytes=2, moments=True, accumulates=False, sam=False, num_ranks=1,
            micro_batches=1, recomputes=recomputes,
        )
        for recomputes in (False, True)
    )  # fmt: skip
    layer = WORK.tokens * WORK.width * 2
    assert kept.activations - again.activations == (17 * 10 - 10 - 17) * layer

"""Is an island whose ranks are the stages of a pipeline the same island as one of one rank, in its bits and in its reports?"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain import checkpoint, metrics
from dtrain.build import build_recipe
from dtrain.config import Job
from dtrain.island.stages import StagesOfRank
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.models.gpt_stage import GPTStage
from dtrain.plan.sent import sent, together
from tests.dist import staged
from tests.dist.harness import Result, run_islands, show, values
from tests.unit.by_hand import same, train, weights_of, write_texts

pytestmark = pytest.mark.timeout(300)
ISLANDS, RESUMED_AT = 2, 5
_ROUNDS = ("sync.every=3", "sync.delay=2", "sync.bucket_bytes=4096")
CHANGES: dict[str, tuple[str, ...]] = {
    "delayed": ('sync.recipe="delayed_diloco"', *_ROUNDS, "train.eval_every=4", "train.checkpoint_every=5", "train.clip=0.3"),
    "stochastic": ('sync.recipe="dpsgd"', 'sync.codec="int4:64:stochastic"', "train.moments_every=2", "train.clip=0"),
    "fused": ('sync.recipe="dpsgd"', 'sync.codec="int8:64"', "train.accumulate=4", "train.clip=0.3"),
    "gradients": ('sync.recipe="allreduce"', 'train.precision="bf16"'),
    "interleaved": (
        'sync.recipe="delayed_diloco"', 'sync.codec="int4:64:stochastic"', *_ROUNDS, "train.checkpoint_every=5", "train.clip=0.3",
        "model.layers=5", "train.accumulate=4", "islands.stages_per_rank=2", "train.eval_every=4",
    ),
}  # fmt: skip
"""At step 5, where "delayed" is resumed, its second fragment's round flies. Clips are below every norm. "interleaved" has four
stages, the first of two blocks."""
RESUMED = ("delayed", "interleaved")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("stages") / "texts")


@pytest.fixture(scope="module")
def run(source: Path) -> Path:
    return source.parent / "run"


@pytest.fixture(scope="module")
def ranks(source: Path, run: Path) -> list[Result]:
    scenarios = {
        name: functools.partial(
            staged.trained, source=str(source), name=name, changes=list(changes),
            resume_step=RESUMED_AT if name in RESUMED else 0,
        )
        for name, changes in CHANGES.items()
    }  # fmt: skip
    results = run_islands(scenarios, ISLANDS, 2, run=run, timeout_s=250)
    assert [r.status for r in results] == [0] * 4, show(results)
    return results


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same jobs with one rank an island."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    runs = {}
    for name, changes in CHANGES.items():
        job = staged.staged_job(str(source), *changes)
        runs[name] = train(_of_one_rank(job), folder / name)
    torch.set_num_threads(num_threads)
    return runs


def _of_one_rank(job: Job) -> Job:
    return job.model_copy(update={"islands": job.islands.model_copy(update={"ranks": 1, "engine": "ddp"})})


@pytest.mark.parametrize("name", CHANGES)
def test_stages_train_to_the_bits_of_one_rank(ranks: list[Result], run: Path, alone: dict[str, Path], name: str) -> None:
    for island in range(ISLANDS):
        assert same(weights_of(run / name, island), weights_of(alone[name], island)), island
    merged = (checkpoint.load_weights(of / name_of) for of in (run / name, alone[name]) for name_of in ["model.safetensors"])
    assert same(*merged)
    losses = [
        {(x["island"], x["step"]): (x["loss"], x.get("eval_loss")) for x in metrics.newest(metrics.read(of / "metrics.jsonl"))}
        for of in (run / name, alone[name])
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8 * ISLANDS


@pytest.mark.parametrize("name", CHANGES)
def test_what_stages_report_is_what_one_rank_reports(ranks: list[Result], alone: dict[str, Path], name: str) -> None:
    for result, (stats,) in zip(ranks, (v["stats"] for v in values(ranks, name)), strict=True):
        one = metrics.read_json(alone[name] / "logs" / f"island{result.island}" / "part.json")
        assert stats["consensus_distance"] == pytest.approx(one["consensus_distance"], rel=1e-12)
        for key in ("parameters", "tokens", "eval_loss", "eval_loss_island", "corpus_hash"):
            assert stats[key] == one[key], key
        assert stats["ranks"] == 2


def test_the_plan_counts_what_stages_send(ranks: list[Result], source: Path) -> None:
    """Rounds start after steps 3 and 6."""
    for name in RESUMED:
        job = staged.staged_job(str(source), *CHANGES[name])
        whole, *stages = ({n: tuple(p.shape) for n, p in part.named_parameters()} for part in _parts(job))
        found = together([sent(build_recipe(job), of, ISLANDS, model=whole) for of in stages])
        assert [v["stats"][0]["wire_bytes_sent"] for v in values(ranks, name)] == [round(2 * found.mean_round_bytes)] * 4, name


def _parts(job: Job) -> list[nn.Module]:
    """The model, and of it what each of two ranks has."""
    m, each = job.model, job.islands.stages_per_rank
    model = GPT(GPTConfig(layers=m.layers, width=m.width, heads=m.heads, context=m.context))
    ranks = [range(rank, 2 * each, 2) for rank in range(2)]
    return [model, *(StagesOfRank({n: GPTStage(model, n, 2 * each) for n in numbers}) for numbers in ranks)]


def test_a_run_resumed_with_a_round_in_flight_ends_with_the_same_bits(ranks: list[Result]) -> None:
    for name in RESUMED:
        assert [v["same"] for v in values(ranks, name)] == [True] * 4, name


@pytest.mark.slow
def test_of_three_stages_the_one_in_the_middle_has_neither_tokens_nor_targets(source: Path, tmp_path: Path) -> None:
    """One island, three micro-batches, and a gradient that is clipped to the norm of all three parts."""
    changes = [
        "islands.count=1", "islands.ranks=3", "train.accumulate=3", "train.batch=6", "train.eval_every=2", "train.clip=0.3",
    ]
    scenario = functools.partial(staged.trained, source=str(source), name="three", changes=changes)
    results = run_islands({"three": scenario}, 1, 3, run=tmp_path, timeout_s=250)
    assert [r.status for r in results] == [0] * 3, show(results)
    one = train(_of_one_rank(staged.staged_job(str(source), *changes)), tmp_path / "one")
    assert same(weights_of(tmp_path / "three", 0), weights_of(one, 0))
    evals = [[x.get("eval_loss") for x in metrics.read(of / "metrics.jsonl")] for of in (tmp_path / "three", one)]
    assert evals[0] == evals[1]

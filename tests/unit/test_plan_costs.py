"""What does ``dtrain plan`` assume, and say, where it measures nothing?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dtrain import virtual_job
from dtrain.config import load_job
from dtrain.launch.doctor_torch import size_of
from dtrain.launch.plan_job import Said, setting_of
from dtrain.plan import accelerators
from dtrain.plan.accelerators import ACCELERATORS, Work
from dtrain.plan.memory import Shards, memory
from dtrain.plan.plans import Planner, Setting
from dtrain.plan.unequal import unequal_lines
from dtrain.recipes import resolve
from dtrain.wire import HEADER_BYTES
from tests.dist.adapted import WIDTH
from tests.unit.small_run import write_job_file

SAID = Said(step_s=0.03, bits_per_s=1e10, rtt_s=0.04)
WORK = Work(tokens=512, parameters=1_000_000, multiplied=900_000, layers=2, width=64, context=128)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    return Path("job.toml")


def setting(job: Path, said: Said, *overrides: str) -> tuple[Setting, str]:
    found, notes = setting_of(job, overrides, load_job(job, list(overrides)), said, Console())
    return found, "\n".join(notes)


def test_wires_cost_what_is_assumed_of_them(job: Path) -> None:
    """Two phases of 63 wires a bucket, of 0.2 ms and 1 ms each: 126 ms at least, on a link of 10 Gbit/s."""
    found, notes = setting(job, replace(SAID, jitter_s=0.0))
    assert "carrying takes CPU time: 0.2 ms a round of a bucket, 1 ms a wire, 0.5 ms a megabyte, assumed" in notes
    row = Planner(found).row(resolve("allreduce", {}, 64), 64)
    assert row.time.link_s >= 2 * (0.2e-3 + 63 * 1e-3) + 0.04
    assert "standard deviation" not in notes
    assert "its standard deviation is 0.6 ms, assumed as 2% of it" in setting(job, SAID)[1]


def test_a_gpu_reckons_in_the_jobs_precision(job: Path) -> None:
    gpu = Said(gpu="h100", bits_per_s=1e10, rtt_s=0.04)
    for precision, tera, number_bytes in (("fp32", 67, 4), ("bf16", 989, 2)):
        found, notes = setting(job, gpu, f"train.precision={precision}")
        assert f"h100 at 40% of {tera} TFLOP/s in {precision}" in notes
        assert found.number_bytes == number_bytes
        assert found.island("identity").step_s == pytest.approx(
            accelerators.step_s(found.work, ACCELERATORS["h100"], 0.4 * tera * 1e12)
        )
    with pytest.raises(ValueError, match=r'--gpu b200: its rate in train.precision = "fp32" is not known; set'):
        setting(job, replace(gpu, gpu="b200"))


def test_what_ranks_exchange_inside_an_island_takes_time(job: Path) -> None:
    """An all-reduce of 4 MB over four ranks is 6 MB each way, of which two thirds of the FLOPs' time hide a part."""
    gpu = ACCELERATORS["h100"]
    alone, four = accelerators.step_s(WORK, gpu, 1e15), accelerators.step_s(WORK, gpu, 1e15, 4, 1e9)
    assert four - alone == pytest.approx(6e-3 - 2 / 3 * WORK.flop / 1e15)
    assert accelerators.step_s(WORK, gpu, 1e9, 4, 1e9) == accelerators.step_s(WORK, gpu, 1e9), "all of it is hidden"
    ranks = "islands.ranks=2"
    assert "exchange" not in setting(job, SAID)[1]
    assert "ranks exchange 16 GB/s: what has landed, assumed" in setting(job, SAID, ranks)[1]
    assert "ranks exchange 315 GB/s: what has landed, 70% of what h100 has" in setting(job, replace(SAID, gpu="h100"), ranks)[1]
    found, notes = setting(job, replace(SAID, intra_bits_per_s=8e9), ranks)
    assert "ranks exchange 1 GB/s: what has landed, as was said" in notes
    assert (found.island("identity").num_ranks, found.island("identity").intra_bytes_per_s) == (2, 1e9)


def test_stages_send_what_is_their_own_and_wait_for_each_other(job: Path) -> None:
    """Two stages of three blocks and four micro-batches: each is busy four fifths of a step, and the first has two blocks."""
    gpu = Said(gpu="h100", bits_per_s=1e10, rtt_s=0.04)
    stages = ("islands.ranks=2", "islands.engine=pipeline", "train.accumulate=4", "sync.bucket_bytes=100000000")
    whole, _ = setting(job, gpu, "sync.bucket_bytes=100000000")
    cut, notes = setting(job, gpu, *stages)
    assert "an island's ranks are 2 stages, busy 80% of a step" in notes
    assert "what has landed" not in notes
    recipe = resolve("diloco", {"codec": "identity", "reduce": "gather", "bucket_bytes": 100_000_000}, 2)
    one, two = (Planner(s).row(recipe, 2) for s in (whole, cut))
    assert two.sent.mean_round_bytes == one.sent.mean_round_bytes + HEADER_BYTES, "a bucket more"
    assert [(f.rank, f.values_bytes) for f in two.sent.period[0].rounds] == [(0, 0), (1, 0)]
    assert cut.parameters == whole.work.parameters
    flop = whole.work.tokens * (6 * 2 * 12 * 64**2 + 12 * 2 * 64 * 128)
    parameters = 256 * 64 + 2 * 12 * 64**2
    passes_s = 28 * parameters / (3.35e12 * accelerators.MEMORY_SHARE)
    assert cut.island("identity").step_s == pytest.approx(flop / (0.4 * 67e12 * 4 / 5) + passes_s)
    assert two.memory.model == 16 * parameters


def test_stages_that_lie_apart_are_busier_and_hold_more_micro_batches(job: Path) -> None:
    """Two ranks with two of four stages each and four micro-batches: idle for half of a stage's time, 4 / (4 + 1 / 2). The first
    rank begins two micro-batches of its first stage, and two of its second, before the first backward pass, and one more."""
    stages = ("islands.ranks=2", "islands.engine=pipeline", "islands.stages_per_rank=2", "train.accumulate=4", "model.layers=4")
    cut, notes = setting(job, SAID, *stages)
    assert "an island's ranks are 4 stages, 2 a rank, busy 89% of a step" in notes
    assert [[name for name in part if "qkv" in name or "blocks" not in name] for part in cut.stages] == [
        ["embedding.weight", "blocks.0.qkv.weight", "blocks.2.qkv.weight"],
        ["blocks.1.qkv.weight", "blocks.3.qkv.weight", "head.weight"],
    ]
    assert (cut.in_flight, cut.micro_batches) == (3, 4), "five of stages that are half of a rank's"
    row = Planner(cut).row(resolve("diloco", {"codec": "identity", "reduce": "gather", "bucket_bytes": 100_000_000}, 2), 2)
    assert [f.rank for f in row.sent.period[0].rounds] == [0, 0, 1, 1], "a bucket a stage"


@pytest.mark.parametrize(
    ("stages", "held"),
    [
        (("islands.ranks=2", "islands.stages_per_rank=2", "train.accumulate=4", "train.batch=4"), 3),
        (("islands.ranks=4", "train.accumulate=7", "train.batch=7"), 4),
        (("islands.ranks=4", "train.accumulate=8", "train.batch=8"), 4),
    ],
)
def test_a_stage_holds_as_many_micro_batches_as_are_in_flight(job: Path, stages: tuple[str, ...], held: int) -> None:
    """Of one sequence each, whatever their number; fp32."""
    cut, _ = setting(job, SAID, "islands.engine=pipeline", "model.layers=4", *stages)
    row, w = Planner(cut).row(resolve("allreduce", {}, 2), 2), cut.work
    assert row.memory.activations == held * w.context * (17 * 4 * w.layers * w.width + 8 * cut.vocab)

def test_a_mesh_of_stages_and_shards_sends_the_buckets_of_the_whole_model(job: Path) -> None:
    gpu = Said(gpu="h100", bits_per_s=1e10, rtt_s=0.04)
    same = ("model.layers=4", "train.accumulate=2", "islands.ranks=4")
    mesh, notes = setting(job, gpu, *same, "islands.engine=fsdp+pipeline", "islands.shards=2")
    fsdp, _ = setting(job, gpu, *same, "islands.engine=fsdp", "train.batch=8")
    assert "an island's ranks are 2 stages, each shared by 2 ranks, busy 67% of a step" in notes
    assert "ranks exchange 315 GB/s" in notes
    recipe = resolve("diloco", {"codec": "identity"}, 2)
    one, other = (Planner(s).row(recipe, 2) for s in (mesh, fsdp))
    assert one.sent == other.sent
    stage = 256 * 64 + 2 * 12 * 64**2
    assert (mesh.work.tokens, mesh.work.parameters, mesh.parameters) == (4 * 128 // 2, stage, fsdp.work.parameters)
    assert one.memory.model == 16 * stage // 2


SIM = (
    "islands.count=4", "sim.step_s=0.03", "sim.step_noise=0.1",
    "sim.stragglers=1", "sim.straggler_factor=3", "sim.links=0-1:1mbit/80ms",
)  # fmt: skip


def test_islands_and_links_are_as_unequal_as_the_jobs_sim_says(job: Path) -> None:
    """Of [sim] the slow island is the one that dtrain sim slows, and lognormal steps have the deviation of theirs."""
    found, notes = setting(job, Said(bits_per_s=1e10, rtt_s=0.0), *SIM)
    factors = found.factors(4)
    assert factors is not None
    assert sorted(factors) == [1.0, 1.0, 1.0, 3.0]
    island = found.island("identity")
    assert island.step_s == 0.03
    assert island.jitter_s == pytest.approx(0.03 * (math.exp(0.01) - 1) ** 0.5)
    assert found.link.between == {(0, 1): (1e6, 0.08)}
    assert "as [sim] says, of the islands 1 are slow and compute 3 times longer and between some islands" in notes
    assert "its standard deviation is 3 ms, as sim.step_noise says" in notes
    assert virtual_job.slow_islands(load_job(job, list(SIM)), 4) == {factors.index(3.0)}
    planner = Planner(found)
    rows = [planner.row(resolve(name, {}, 4), 4) for name in ("allreduce", "dpsgd")]
    assert rows[0].time.unequal_s > 0.0449, "three of four wait for the slow island: 60 ms more a step"
    (line,) = unequal_lines(rows, rows[1], found)
    assert line.startswith("slow islands and links: allreduce takes ")
    equal = setting(job, Said(bits_per_s=1e10, rtt_s=0.0), *SIM[:3])[0]
    assert unequal_lines(rows, rows[1], equal) == []


def test_of_frozen_parameters_a_plan_counts_the_weights_alone(job: Path) -> None:
    """Frozen are an embedding, a block, and the trunk of two; trained are two adapters and the head. A round of fedavg, between
    two islands: half of the model out, and the mean of the other half."""
    trained, frozen = 2 * 2 * 4 * WIDTH + 256 * WIDTH, 256 * WIDTH + 3 * (WIDTH**2 + WIDTH) + 2 * 4 * WIDTH
    found, _ = setting(job, SAID, 'model.factory="tests.dist.adapted:Adapted"')
    axes: dict[str, object] = {"codec": "identity", "reduce": "all_to_all"}
    row = Planner(found).row(resolve("fedavg", axes, 2), 2)
    assert row.sent.mean_round_bytes == 4 * trained + 2 * HEADER_BYTES
    assert row.memory.model == 16 * trained + 4 * frozen
    assert (found.work.parameters, found.work.trained) == (trained + frozen, trained)
    job_of = load_job(job, ['model.factory="tests.dist.adapted:Adapted"'])
    size = size_of(job_of, resolve("fedavg", axes, 2), 256)
    assert (size.parameters, size.frozen) == (trained + frozen, frozen)
    assert size.checkpoint_bytes - size.state_bytes == 4 * (3 * trained + frozen)
    gpu = ACCELERATORS["h100"]
    all_of_it = replace(found.work, frozen=0)
    passes_s = [accelerators.step_s(work, gpu, 1e15) - work.flop / 1e15 for work in (found.work, all_of_it)]
    assert passes_s[0] / passes_s[1] == pytest.approx(trained / (trained + frozen))
    shared, averaging = (
        memory(
            replace(row.sent, at_hand=1.0, averaged=averaged), found.work, vocab=256, number_bytes=4, moments=True,
            accumulates=False, sam=False, num_ranks=4, micro_batches=1, shards=Shards(4, 4, 4),
        )
        for averaged in (0.0, 1.0)
    )  # fmt: skip
    assert shared.model == 4 * (trained + frozen) // 4 + 4 * trained // 4 + 8 * trained // 4
    assert shared.wires == (row.sent.wire_bytes + row.sent.room_bytes) // 4 + trained
    assert averaging.wires == int(4.5 * trained)

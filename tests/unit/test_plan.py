"""Does ``dtrain plan`` reckon, recommend and write what it says, and refuse the rest in one line?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.config import Job, load_job
from dtrain.connect import LinkSettings
from dtrain.launch import plan_job
from dtrain.launch.cli import run_command
from dtrain.launch.plan_job import Said, setting_of
from dtrain.launch.plan_rows import other_sizes
from dtrain.plan import accelerators, plans
from dtrain.plan.accelerators import ACCELERATORS, Work
from dtrain.plan.candidates import candidates
from dtrain.plan.company import LinkSpeed, everyone
from dtrain.plan.memory import memory
from dtrain.plan.model import Island
from dtrain.plan.order import NEAR_BEST, loss_order, recommend
from dtrain.plan.plans import Planner, Row, Setting, factors
from dtrain.plan.probe import memory_bytes_per_s, probe_link
from dtrain.plan.sent import Sent, sent, together
from dtrain.recipes import RECIPES, Recipe, of_section, resolve
from tests.unit.small_run import refused, write_job_file

SHAPES = {"embedding.weight": (256, 64), "w": (512, 64)}
NUMEL = 256 * 64 + 512 * 64
WORK = Work(tokens=512, parameters=NUMEL, multiplied=512 * 64, layers=2, width=64, context=128)
SAID = ("plan", "job.toml", "--step-time", "30ms", "--link", "100mbit", "--rtt", "40ms")


def setting(bits_per_s: float | None, rtt_s: float = 0.0, jitter_s: float = 0.0) -> Setting:
    link = LinkSpeed(bits_per_s, rtt_s, bits_per_s, rtt_s)
    return Setting(SHAPES, WORK, 256, 512, 1, 1, None, 4, 1, 0, link, lambda codec: Island(0.03, jitter_s, 1e10))


LEFT_OUT = {"dadao", "single_merge", "muloco"}
"""Only simulated; with rounds at uneven distances; for jobs that train with Muon."""

PLANNER = Planner(setting(None))
"""What recipes send is counted once, for links of any speed."""


def planned(where: Setting, num_islands: int) -> list[Row]:
    PLANNER.setting = where
    return [PLANNER.row(r, num_islands) for r in candidates(resolve(None, {}, num_islands), num_islands)]


def test_an_h_that_adapts_is_reckoned_as_at_first() -> None:
    rank: dict[str, object] = {"rank": "adaptive:32"}
    adapts, fixed = (resolve("dilocox", rank | {"every": every}, 2) for every in ("adaptive:50", 50))
    planner = Planner(setting(1e6))
    rows = [planner.row(r, 2) for r in (adapts, fixed)]
    assert [(r.time.step_s, r.bytes_per_step) for r in rows] == [(rows[0].time.step_s, rows[0].bytes_per_step)] * 2
    assert plans.said(adapts) == "dilocox, int4:64, every 50 steps or fewer, 50 steps late"
    assert "with the rank and the 50 steps of its first rounds" in plans.adapting(adapts)
    assert candidates(adapts, 2)[0] == adapts


def test_stages_that_are_alike_are_counted_once_each() -> None:
    parts: list[dict[str, tuple[int, ...]]] = [
        {"embedding.weight": (256, 64), "blocks.0.up.weight": (256, 64)},
        *({f"blocks.{k}.up.weight": (256, 64)} for k in (1, 2)),
        {"blocks.3.up.weight": (256, 32)},
    ]
    for recipe in (resolve("dilocox", {"rank": 8}, 2), resolve("allreduce", {}, 2)):
        staged = replace(setting(1e6), stages=parts, num_ranks=4, island=lambda codec: Island(0.03, 0.0, 1e10, num_ranks=4))
        row = Planner(staged).row(recipe, 2)
        each = [sent(recipe, part, 2) for part in parts]
        assert row.sent == together(each)
        assert {f.rank for f in (*row.sent.period[0].gradients, *row.sent.period[0].rounds)} == {0, 1, 2, 3}


def test_a_gpus_step_by_hand() -> None:
    """512 tokens x (6 x 32,768 + 12 x 2 x 64 x 128) = 201.3 MFLOP at 40 % of 312 TFLOP/s; 28 bytes a parameter at 70 % of 2,039
    GB/s."""
    found = accelerators.step_s(WORK, ACCELERATORS["a100"], 0.4 * 312e12)
    assert found == pytest.approx(512 * (196_608 + 196_608) / (0.4 * 312e12) + 28 * 49_152 / (0.7 * 2.039e12), rel=1e-9)
    assert accelerators.accelerator("RTX-4090") is ACCELERATORS["rtx4090"]


def test_memory_by_hand() -> None:
    """16 bytes a parameter, 4 for an accumulator, 4 for SAM's copy; state, buffers and wires over two ranks, which both have all
    gradients; of two micro-batches one."""
    sent = Sent((), 0.0, state_bytes=700, wire_bytes=200, company=everyone(2, 1), room_bytes=300, gradient_bytes=50)
    found = memory(sent, WORK, vocab=256, number_bytes=4, moments=True, accumulates=True, sam=True, num_ranks=2, micro_batches=2)
    assert (found.model, found.kept, found.wires, found.activations) == (24 * NUMEL, 550, 100, 256 * (2 * 64 * 17 * 4 + 256 * 8))
    assert found.total == found.model + found.sync + found.activations


def test_without_a_slow_link_gradients_are_averaged_and_over_a_slow_one_they_are_not() -> None:
    fast, slow = planned(setting(None), 4), planned(setting(1e6, 0.04), 4)
    assert recommend(fast).recipe.name == "allreduce"
    assert recommend(fast).recipe.codec == "identity"
    chosen = recommend(slow)
    assert chosen.recipe.payload == "pseudo_gradients"
    best = max(row.tokens_per_s for row in slow if row.recipe.payload != "none")
    near = [row for row in slow if row.recipe.payload != "none" and row.tokens_per_s >= (1 - NEAR_BEST) * best]
    assert chosen in near
    assert all(loss_order(chosen) <= loss_order(row) for row in near)


def test_in_between_gossip_is_recommended_where_an_outer_loop_has_no_time() -> None:
    """At 100 Mbit/s a step of 30 ms hides 0.37 MB: a peer's 0.2 MB of fp32 fly free, all-reduce's are waited for."""
    PLANNER.setting = setting(1e8, 0.005)
    chosen = recommend([PLANNER.row(r, 4) for r in candidates(resolve("dpsgd", {}, 4), 4, steps=200)]).recipe
    assert (chosen.payload, chosen.codec, chosen.every) == ("parameters", "identity", 1)


def test_every_recipe_is_a_candidate_and_each_once() -> None:
    for num_islands in (2, 3, 8):
        found = candidates(resolve(None, {}, num_islands), num_islands)
        assert {r.name for r in found} == set(RECIPES) - LEFT_OUT
        told = {(r.name, r.topology, r.graph, r.server, r.codec, r.every, r.delay_steps, r.error_feedback) for r in found}
        assert len(told) == len(found)
    assert any(r.topology == "alternating_exp_ring:2" for r in candidates(resolve(None, {}, 8), 8, per_host=2))
    assert not any(r.topology == "hypercube" for r in candidates(resolve(None, {}, 6), 6))


def test_a_refusal_that_is_not_about_the_number_of_islands_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = resolve(None, {}, 4)

    def broken(*_: object) -> Recipe:
        raise ValueError("a row that does not fit itself")

    monkeypatch.setattr("dtrain.plan.candidates.resolve", broken)
    with pytest.raises(ValueError, match="does not fit itself"):
        candidates(asked, 4)


def test_what_has_no_even_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match=r'sync\.schedule = "budget:20%".* plan with sync\.schedule=every'):
        candidates(resolve("single_merge", {}, 4), 4)
    with pytest.raises(ValueError, match=r'sync\.schedule = "ready": its rounds come when two are ready.* plan with sync\.sch'):
        candidates(resolve("a2cid2", {"schedule": "ready"}, 4), 4)
    with pytest.raises(ValueError, match=r'"dadao" .*only simulated'):
        candidates(resolve("dadao", {}, 4), 4)


def test_sam_goes_forward_and_backward_twice() -> None:
    """On a link of no limit the step is the compute: 2 x 30 ms, and what rounds move."""
    PLANNER.setting = setting(None)
    plain, sam = (PLANNER.row(resolve(name, {"every": 4, "delay": 4}, 4), 4).time for name in ("multi_gossip", "dfedsam"))
    assert sam.step_s == pytest.approx(0.06 + sam.work_s, rel=1e-9)
    assert plain.step_s == pytest.approx(0.03 + plain.work_s, rel=1e-9)


def test_a_jobs_own_sam_is_everyones() -> None:
    """A row of SAM is no slower in a job that trains by SAM, and no row of a job that says 0."""
    PLANNER.setting = replace(setting(None), sam_rho=0.05)
    plain, sam = (PLANNER.row(resolve(name, {"every": 4, "delay": 4}, 4), 4) for name in ("multi_gossip", "dfedsam"))
    for row in (plain, sam):
        assert row.time.step_s == pytest.approx(0.06 + row.time.work_s, rel=1e-9)
        assert row.memory.model == 20 * NUMEL
    PLANNER.setting = replace(setting(None), sam_rho=0.0)
    assert PLANNER.row(resolve("multi_gossip", {}, 4), 4).memory.model == 16 * NUMEL
    assert not any(r.sam_rho for r in candidates(resolve(None, {}, 4), 4, sam_rho=0.0))


def test_sam_is_no_part_of_the_step_that_is_measured(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is doubled afterwards, for rows that train with it."""
    seen: list[float | None] = []

    def look(ran: Job, *_: object, **__: object) -> None:
        seen.append(ran.train.sam_rho)
        raise ValueError("enough")

    monkeypatch.setattr(plan_job, "run_local", look)
    with pytest.raises(ValueError, match="enough"):
        plan_job.measure_steps(job, ["train.sam_rho=0.05"], Console())
    assert seen == [0.0]


def test_what_was_not_measured_is_said(job: Path) -> None:
    """4 GB/s, or 70 % of the 3,350 of an H100."""
    said = Said(step_s=0.03, bits_per_s=1e8, rtt_s=0.04)
    assumed, line = setting_of(job, [], load_job(job), said, Console())
    assert assumed.island("identity").memory_bytes_per_s == 4e9
    assert "encoding and landing move 4 GB/s, assumed" in line[0]
    of_gpu, line = setting_of(job, [], load_job(job, ["train.sam_rho=0.1"]), replace(said, gpu="h100"), Console())
    assert (of_gpu.island("identity").step_s, of_gpu.sam_rho) == (0.03, 0.1)
    assert of_gpu.island("identity").memory_bytes_per_s == pytest.approx(0.7 * 3.35e12)
    assert "as was said without SAM, which doubles it" in line[0]
    assert "encoding and landing move 2345 GB/s, 70% of the memory's of h100" in line[0]


def test_islands_that_were_not_measured_are_said() -> None:
    assert "8, 64 islands are taken to step as fast as the 2 " in other_sizes([2, 8, 64], 2, measured=True)[0]
    assert other_sizes([2], 2, measured=True) == other_sizes([2, 8], 2, measured=False) == []


def test_an_own_codec_is_planned_with(job: Path) -> None:
    """Two bytes a number, and 20 or so of header a bucket: it ranks by what its wire is long."""
    Path("mine.py").write_text(MINE, encoding="utf-8")
    PLANNER.setting = setting(None)
    own, bf16, fp32 = (
        PLANNER.row(resolve("delayed_diloco", {"codec": c, "error_feedback": False}, 2), 2)
        for c in ("mine.py:half", "bf16", "identity")
    )
    assert own.sent.mean_round_bytes == pytest.approx(bf16.sent.mean_round_bytes, rel=0.01)
    assert loss_order(fp32) < loss_order(own)
    assert -loss_order(own)[4] == pytest.approx(16, rel=1e-4)
    assert factors(PLANNER, own)[-2].startswith("delayed_diloco, compression: ")
    assert memory_bytes_per_s("mine.py:half") > 0
    assert memory_bytes_per_s("int4:64:stochastic") > 0


MINE = """
from dtrain.recipes import Recipe
row = Recipe("mine", "s", "p", "dpsgd", "parameters", 1, "neighbours", "ring", combine="gossip", delay=1)
class Half:
    def wire_bytes(self, numel): return 2 * numel
    def encode(self, x, out): out.copy_(x.bfloat16().view(out.dtype))
    def decode(self, wire, out): out.copy_(wire.clone().view(out.bfloat16().dtype))
half = Half()
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    write_job_file()
    return Path("job.toml")


def test_the_command_prints_ranks_and_writes(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job.write_text(job.read_text(encoding="utf-8").replace("steps = 20", "steps = 2000"), encoding="utf-8")
    before = load_job(job)
    assert run_command([*SAID, "--json", "rows.json", "--write"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    table = out.partition("\n* take this")[0].splitlines()
    assert {line.split()[1] for line in table if line[:2] in ("* ", "= ", "- ")} == set(RECIPES) - LEFT_OUT
    for words in ("* take this, = the job's", ", overlap: ", "2 islands: take ", "a step takes 30 ms, as was said"):
        assert words in out
    assert f"not looked at: {', '.join(name for name in RECIPES if name in LEFT_OUT)}: only simulated, of rounds at" in out
    assert "\neach row is the variant of its recipe that does best here; --all prints all\n" in out
    assert " low_rank:32 " in out, "dilocox's"
    (plan,) = json.loads(Path("rows.json").read_text(encoding="utf-8"))["plans"]
    speeds = [row["tokens_per_s"] for row in plan["rows"]]
    assert speeds == sorted(speeds, reverse=True)
    assert plan["rows"][0]["name"] == "local"
    assert speeds[0] == pytest.approx(2 * 4 * 128 / 0.03)
    after = load_job(job)
    written = of_section(after.sync.model_dump(exclude_none=True), 2)
    assert (written.name, written.codec, written.every) == tuple(plan["recommended"][k] for k in ("name", "codec", "every"))
    assert after.model_copy(update={"sync": before.sync}) == before, "nothing else has changed"


def test_several_sizes_are_planned_at_once(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = ["--islands", "4,8", "--near", "10gbit", "--per-host", "2"]
    assert run_command(["plan", "job.toml", "--gpu", "h100", "--link", "1gbit", "--rtt", "0ms", *hosts]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(" islands")] == ["4 islands", "8 islands"]
    assert "not measured: h100 at 40% of 67 TFLOP/s in fp32" in out
    assert "8 islands: take " in out


def test_the_link_is_measured_as_it_is_shaped() -> None:
    """To 8 Mbit/s and 20 ms: 0.3 s of bits cannot be there before 0.3 s and half of a round trip, nor a reply before a whole one;
    the rate is found less half of the round trip that was found. How much later they are the machine decides."""
    found = probe_link(LinkSettings(bits_per_s=8e6, rtt_s=0.02))
    assert found.far_bits_per_s is not None
    assert 0.3 * 8e6 / found.far_bits_per_s + found.rtt_s / 2 >= 0.3 + 0.01 - 1e-9
    assert found.rtt_s >= 0.02


@pytest.mark.slow
def test_steps_and_link_are_measured_where_nobody_says_them(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.layers=1", "model.width=16", "model.heads=2", "model.context=16"]
    assert run_command(["plan", "job.toml", *small, "link.rate=8mbit", "link.rtt=20ms", "--json", "rows.json"]) == 0
    notes = json.loads(Path("rows.json").read_text(encoding="utf-8"))["from"]
    assert "islands at once on this machine" in notes[0]
    assert notes[1].startswith("carrying takes CPU time: ")
    assert "measured between two islands on this machine, with the job's link settings" in notes[2]
    assert not Path("runs").exists(), "the steps were run in a folder that is gone"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("plan", "job.toml", "--gpu", "h1000"), "--gpu h1000 is not known; use one of h100, "),
        (("plan", "job.toml", "--gpu", "h1000", "--step-time", "1s"), "--gpu h1000 is not known; use one of h100, "),
        (("plan", "job.toml", "--mfu", "0.3"), "--mfu 0.3 is for a step that is reckoned: it needs --gpu"),
        ((*SAID, "--gpu", "h100", "--mfu", "0.3"), "--mfu 0.3 is for a step that is reckoned"),
        (("plan", "job.toml", "--per-host", "2"), "--per-host 2: say the rate between islands of one host with --near"),
        (("plan", "job.toml", "--json", "."), "--json . is a folder; name a file, as plan.json"),
        (("plan", "job.toml", "sim.problem=quadratic"), "sim.problem = 'quadratic' has no effect with dtrain run"),
        ((*SAID, "sim.step_s=1", "sim.loss=0.1"), "sim.loss = 0.1 has no effect with dtrain run, profile and plan"),
        ((*SAID, "sync.recipe=dfedsam", "train.sam_rho=0"), "train.sam_rho = 0 takes SAM from"),
        (("plan", "job.toml", "--link", "fast"), "'fast' is not a rate"),
        (("plan", "job.toml", "--link", "none"), "--link none: name a rate"),
        (("plan", "job.toml", "--step-time", "0ms"), "--step-time 0: a step takes some time"),
        (("plan", "job.toml", "--near", "1gbit"), "--near is the rate between islands of one host: say how many"),
        (("plan", "job.toml", "--islands", "2,many"), "--islands 2,many: write numbers from 2 to 1000"),
        (("plan", "job.toml", "--islands", "2,4", "--write"), "--write with --islands 2,4: a job has one number of islands"),
        (("plan", "job.toml", "--islands", "4", "--write"), "--write for 4 islands: job.toml is a job of 2"),
        ((*SAID, "islands.count=4", "--write"), "--write for 4 islands: job.toml is a job of 2"),
        (("plan", "job.toml", "--json", "no/where.json"), "--json no/where.json: there is no folder"),
        ((*SAID, "sync.recipe=choco", "sync.topology=hypercube", "--islands", "3"), "a hypercube has 2, 4, 8 ... islands"),
        (("plan", "no.toml"), "no job file at no.toml"),
        ((*SAID, "train.steps=100", "model.layers=2", "--write"), "--write with model.layers=2 train.steps=100: "),
        ((*SAID, "--near", "1gbit", "--per-host", "3"), "--per-host 3 of 2 islands: all are on one host"),
        ((*SAID, "--near", "1gbit", "--per-host", "4", "--islands", "8,4"), "--per-host 4 of 4 islands: all are on one host"),
        ((*SAID, "islands.count=1"), "islands.count = 1: a plan is for 2 to 1000 islands"),
        ((*SAID, "--islands", "1"), "--islands 1: write numbers from 2 to 1000"),
        ((*SAID, "--json", "/proc/x.json"), "--json /proc/x.json: no file can be made in /proc"),
        (("plan", "job.toml", "--link", "1gbit", "--step-time", "1s"), "--link 1gbit: the round trip is not known"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: tuple[str, ...], said: str, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *words)

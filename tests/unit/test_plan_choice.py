"""Does ``dtrain plan`` recommend only what fits, helps, and has rounds enough, and say what its order rests on?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from rich.console import Console

from dtrain import comparison
from dtrain.bucket import Bucket
from dtrain.config import Job, load_job
from dtrain.launch import plan_room
from dtrain.launch.checks import resolved
from dtrain.launch.cli import run_command
from dtrain.launch.plan_job import Said, setting_of
from dtrain.launch.plan_rows import Planned
from dtrain.launch.plan_table import COLUMNS, foot, table_lines
from dtrain.plan import sent
from dtrain.plan.candidates import candidates
from dtrain.plan.ends import ends
from dtrain.plan.model import Island
from dtrain.plan.order import FEWEST_ROUNDS, MEASURED, ORDER, loss_order, measured, rank
from dtrain.plan.plans import Planner, Row, Setting, time_text
from dtrain.plan.verdict import Verdict, alone_tokens_per_s, verdict
from dtrain.recipes import Recipe, of_section, resolve
from tests.unit.small_run import refused, write_job_file
from tests.unit.test_plan import SAID, SHAPES, WORK, setting

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
FEW = ("allreduce", "dpsgd", "delayed_diloco", "local")


def rows_of(where: Setting, recipes: Sequence[Recipe], num_islands: int = 2) -> tuple[Planner, list[Row]]:
    planner = Planner(where)
    return planner, [planner.row(r, num_islands) for r in recipes]


def judged(where: Setting, steps: int = 3000, names: Sequence[str] = FEW) -> Verdict:
    planner, rows = rows_of(where, [resolve(name, {}, 2) for name in names])
    return verdict(planner, rows, steps)


def test_what_does_not_fit_is_not_recommended() -> None:
    """All-reduce holds the least of the three that talk, so a GPU of so much has room for it alone."""
    free = judged(setting(1e8))
    _, rows = rows_of(setting(1e8), [resolve(name, {}, 2) for name in FEW])
    need = {row.recipe.name: row.memory.total for row in rows}
    assert need["allreduce"] < min(need["dpsgd"], need["delayed_diloco"])
    assert free.best.recipe.name == "delayed_diloco"
    tight = judged(replace(setting(1e8), gpu="h100", gpu_bytes=need["allreduce"]))
    assert (tight.taken, tight.best.recipe.name) == (True, "allreduce")


def test_where_nothing_fits_it_says_what_is_too_large_and_what_helps() -> None:
    """A batch of four sequences of 128: with all but a byte of the activations in two, four micro-batches of one fit."""
    _, (row,) = rows_of(setting(1e8), [resolve("dpsgd", {}, 2)])
    held, m = row.memory.model + row.memory.sync, row.memory
    for room, said in (
        (m.total - 1, "train.accumulate=2 fits; a train.batch 2 times smaller, or 2 times the ranks"),
        (held + m.activations / 2 - 1, "train.accumulate=4 fits; a train.batch 4 times smaller, or 4 times the ranks"),
        (held + 1, "A single sequence's activations are too large: a shorter model.context"),
        (m.model + 1, "Only the recipe's state is shared among the ranks"),
        (m.model - 1, "Each rank holds the whole model, whatever their number and the batch"),
    ):
        found = judged(replace(setting(1e8), gpu="h100", gpu_bytes=room), names=["dpsgd", "local"])
        assert not found.taken
        assert said in found.why
        assert f"activations {m.activations / 1e6:.3g} MB" in found.why
    of_two, room = Island(0.03, 0.02, 1e10, num_ranks=2), m.model - 1
    tight = replace(setting(1e8), gpu="h100", gpu_bytes=room, num_ranks=2, stages=(SHAPES, SHAPES), island=lambda codec: of_two)
    assert "Each rank holds a stage of the model: more of them, islands.ranks" in judged(tight, names=["dpsgd", "local"]).why


def test_talking_that_costs_more_than_it_brings_is_not_recommended() -> None:
    """512 tokens in 30 ms, alone; over 1 kbit/s a round of 28 steps flies for minutes."""
    slow, fast = judged(setting(1e3, 0.02)), judged(setting(1e8, 0.02))
    assert alone_tokens_per_s(setting(1e3)) == pytest.approx(512 / 0.03)
    assert alone_tokens_per_s(replace(setting(1e3), sam_rho=0.1)) == pytest.approx(512 / 0.06)
    assert not slow.taken
    assert slow.best.tokens_per_s < 512 / 0.03
    assert "2 islands: take none: the best that talks is delayed_diloco" in slow.why
    assert "one island alone makes 17,067: run one island, or get a faster link" in slow.why
    assert fast.taken


def test_an_outer_loop_needs_rounds() -> None:
    def loops(steps: int) -> set[tuple[str, int]]:
        asked = resolve("dpsgd", {}, 4)
        return {(r.name, r.every) for r in candidates(asked, 4, steps=steps) if r.payload == "pseudo_gradients"}

    assert loops(280 - 1) == set()
    assert loops(280) == {("delayed_diloco", 28)}
    assert {every for _, every in loops(4480)} == {28, 112, 448, 50, 200, 100, 400, 125, 30, 120}
    asked = resolve("diloco", {"every": 100}, 2)
    others = [resolve("dpsgd", {"codec": "int8:64"}, 2), resolve("allreduce", {}, 2)]
    planner, rows = rows_of(setting(1e7), [asked, *others])
    assert verdict(planner, rows, 100 * FEWEST_ROUNDS).best.recipe == asked
    assert verdict(planner, rows, 100 * FEWEST_ROUNDS - 1).best.recipe.name == "dpsgd", "the job's own is held to it too"


def test_gossip_steps_that_move_nothing_are_not_taken() -> None:
    """Rings of two and three average exactly in one round; a ring of four does not."""
    cases = [(2, "ring", 1), (3, "ring", 1), (4, "ring", 4)]
    for n, topology, steps in cases:
        found = [r for r in candidates(resolve(None, {}, n), n) if r.name == "multi_gossip" and r.topology == topology]
        assert found
        assert {r.gossip_steps for r in found} == {steps}, (n, topology)


def test_buckets_that_are_alike_send_as_each_of_them_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole grains, and parameters that end within one, over parts that are cut for four islands."""
    shapes = {**{f"layer{k}": (4096, 24) for k in range(6)}, "norm": (130,), "odd": (37, 1100), "last": (5000, 9)}
    recipes = [
        resolve(name, {"bucket_bytes": 2**17} | axes, 4)
        for name, axes in (
            *(("allreduce", {}), ("dpsgd", {}), ("delayed_diloco", {"fragments": 2})),
            ("choco", {"codec": "topk", "gamma": 0.02}),
        )
    ]
    found = [sent.sent(r, shapes, 4, per_host=2) for r in recipes]
    kinds = set[object]()

    def apart(bucket: Bucket, recipe: Recipe) -> object:
        kinds.add(kind_of(bucket, recipe))
        return bucket.index

    kind_of = sent._kind_of
    monkeypatch.setattr(sent, "_kind_of", apart)
    assert [sent.sent(r, shapes, 4, per_host=2) for r in recipes] == found
    assert len(kinds) < len(found[0].period[0].gradients), "some were alike"


def test_equal_ones_are_told_apart_by_bytes() -> None:
    _, (row,) = rows_of(setting(None), [resolve("dpsgd", {}, 2)])
    heavy = replace(row, sent=replace(row.sent, mean_round_bytes=2 * row.sent.mean_round_bytes))
    assert rank([heavy, row]) == [row, heavy]


def test_the_order_rests_on_what_is_in_the_files_of_measurements() -> None:
    quality = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    rows = comparison.read_rows(RESULTS / "recipes.jsonl")
    for name, found in MEASURED.items():
        if found.source == "quality.json":
            percent = mean(quality["behind_allreduce_percent"]) if name == quality["recipe"] else None
        else:
            ours = [row for row in rows if (row.entry, row.budget) == (found.entry, found.budget)]
            jobs = {row.job for row in ours}
            base = [row for row in rows if (row.entry, row.budget) == ("allreduce", found.budget) and row.job in jobs]
            beside = comparison.behind(ours, base)
            percent = beside.percent if beside is not None else None
            assert {row.islands for row in ours} == {found.islands}
        assert percent == pytest.approx(found.percent, abs=0.05), f"{name}: plan/order.py says another number than {found.source}"
        whose = " as decent_adam" if name == "dpsgd" else ""
        assert f"{name}{whose} {found.percent:g} % behind with {found.islands} islands" in ORDER


def test_what_was_measured_goes_before_what_was_not() -> None:
    def row(name: str, **axes: object) -> Row:
        return rows_of(setting(1e7), [resolve(name, axes, 4)], 4)[1][0]

    plain, known, finer = row("allreduce"), row("delayed_diloco"), row("delayed_diloco", codec="bf16", error_feedback=False)
    longer, unknown, coarse = row("delayed_diloco", every=112), row("choco"), row("dpsgd", codec="int4:64")
    assert [measured(r.recipe) is not None for r in (plain, known, finer, longer, unknown, coarse)] == [
        False, True, True, False, False, False
    ]  # fmt: skip
    right = [plain, known, finer, unknown, longer, coarse]
    shuffled = [right[k] for k in (3, 5, 1, 4, 0, 2)]
    assert sorted(shuffled, key=loss_order) == right


def test_the_merge_at_the_end_is_what_all_reduce_sends_of_gradients() -> None:
    """Its path is the same but for headers; 6.4 billion parameters, 8 islands, 1 Gbit/s: 2 x 25.6 GB x 7 / 8 = 44.8 GB, in
    358.4 s and an rtt."""
    _, (row,) = rows_of(setting(1e6), [resolve("allreduce", {}, 4)], 4)
    assert ends(setting(1e6), 4).merge_bytes == pytest.approx(row.sent.mean_round_bytes, rel=0.01)
    large = replace(setting(1e9, 0.02), work=replace(WORK, parameters=6_400_000_000))
    assert ends(large, 8).merge_bytes == pytest.approx(44.8e9)
    assert ends(large, 8).merge_s == pytest.approx(358.4 + 0.02)
    assert ends(large, 8).start_s == pytest.approx(0.02)
    # Two islands a host: 6 of 7 peers are far, and what goes to the other is on a link of its own, here ten times slower.
    paired = replace(large, per_host=2)
    assert ends(paired, 8).merge_s == pytest.approx(358.4 * 6 / 7 + 0.02)
    assert ends(replace(paired, link=replace(paired.link, near_bits_per_s=1e8)), 8).merge_s == pytest.approx(512.0 + 0.02)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.03005, "30.1 ms"), (0.9999, "1 s"), (27.42, "27.4 s"), (27420.0, "27,420 s"), (999.6, "1,000 s")]
)
def test_times_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def plan_of(rows: list[Row], where: Setting) -> Planned:
    return Planned(2, rows[0], rank(rows), Verdict(rows[1], True, ""), where, ends(where, 2), 100, [])


def test_a_table_fits_80_columns_and_a_pipe_gets_all() -> None:
    where = replace(setting(1e5, 0.02), gpu="h100", gpu_bytes=0.0)
    recipes = [
        resolve(name, axes, 4)
        for name, axes in (("gradient_tracking", {}), ("allreduce", {}), ("dpsgd", {"codec": "int4:64"}), ("local", {}))
    ]
    plan = plan_of(rows_of(where, recipes, 4)[1], where)
    wide, narrow = table_lines(plan, None, show_all=True), table_lines(plan, 80, show_all=True)
    assert tuple(wide[0].split()) == COLUMNS
    assert max(map(len, narrow)) <= 80
    gone = [name for name in ("lambda2", "memory", "sent/step", "topology") if name not in narrow[0].split()]
    assert gone[0] == "lambda2"
    assert narrow[0].split() == [name for name in COLUMNS if name not in gone]
    assert f"{', '.join(gone)}: in a wider terminal, or a pipe" in narrow
    assert len({len(line) for line in wide[:5]}) == 1, "numbers end where their header ends"
    for lines in (wide, narrow):
        marks = {line.split()[1]: line.split()[0] for line in lines[1:5]}
        assert marks == {"gradient_tracking": "=!", "allreduce": "*!", "dpsgd": "!", "local": "!"}
        assert "* take this, = the job's, ! too large for the GPU" in lines
    assert not any("each row is the variant" in line for line in foot([plan], show_all=True))
    assert "deepsqueeze" in foot([plan], show_all=True)[-1]
    assert "muloco is, with" in foot([plan], show_all=True)[-1]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    return Path("job.toml")


def test_each_row_of_the_json_is_a_job(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = ("train.steps=5000", "sync.every=7", "sync.delay=3", "sync.fragments=2", "sync.outer_lr=0.5")
    assert run_command([*SAID, *long, "--json", "rows.json"]) == 0, capsys.readouterr().err
    (plan,) = json.loads(Path("rows.json").read_text(encoding="utf-8"))["plans"]
    base = load_job(job, ["train.steps=5000"])
    seen = set[tuple[object, ...]]()
    for row in plan["rows"]:
        again = resolved(Job.model_validate(base.model_dump() | {"sync": row["sync"]}))
        recipe = of_section(again.sync.model_dump(exclude_none=True), 2)
        for key in ("name", "topology", "graph", "server", "codec", "error_feedback", "every", "reduce", "gossip_steps", "gamma"):
            assert getattr(recipe, key) == row[key]
        assert recipe.delay_steps == row["delay_steps"]
        seen.add(tuple(sorted(row["sync"].items())))
    assert len(seen) == len(plan["rows"])
    assert any(row["sync"].get("outer_lr") == 0.5 for row in plan["rows"])


def test_where_none_is_taken_none_is_written(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = job.read_bytes()
    words = ["plan", "job.toml", "--step-time", "30ms", "--link", "1kbit", "--rtt", "20ms", "--write", "--json", "rows.json"]
    assert run_command(words) == 2
    out, err = capsys.readouterr()
    assert "take none" in out
    assert err.splitlines()[-1].startswith("dtrain: --write: nothing is written, as no recipe should be taken")
    assert job.read_bytes() == before
    (plan,) = json.loads(Path("rows.json").read_text(encoding="utf-8"))["plans"]
    assert plan["recommended"] is None
    assert "take none" in plan["why"]


def test_a_model_that_this_machine_cannot_hold_is_not_started(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two islands of two ranks, 16 bytes a parameter: 4 x 16 x P bytes, and one less than that are there."""
    words = ("plan", "job.toml", "islands.ranks=2")
    parameters = setting_of(job, [], load_job(job), Said(step_s=1.0, bits_per_s=1e8, rtt_s=0.0), Console())[0].work.parameters
    monkeypatch.setattr(plan_room, "free_bytes", lambda: 64 * parameters - 1)
    said = refused(capsys, *words)
    assert said.startswith(f"a step cannot be measured here: 4 ranks of {parameters:,} parameters hold ")
    assert "--step-time, or reckon it with --gpu" in said
    monkeypatch.setattr(plan_room, "free_bytes", lambda: 64 * parameters)
    plan_room.check_room(load_job(job, ["islands.ranks=2"]), replace(WORK, parameters=parameters))


def test_the_machine_says_what_is_free() -> None:
    free = plan_room.free_bytes()
    assert free is not None
    assert free > 2**20


def test_a_round_trip_is_the_jobs_where_it_says_one(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "job.toml", "--step-time", "30ms", "--link", "100mbit"]
    assert "the round trip is not known, as the job has no link.rtt; say --rtt 40ms" in refused(capsys, *words)
    assert run_command([*words, "link.rtt=70ms"]) == 0
    assert "100 Mbit/s an island, 70 ms there and back, as was said, and the job's link.rtt" in capsys.readouterr().out

"""Do rows survive their file, are runs found again, and is a paired interval what statistics says?"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from dtrain.comparison import Behind, Row, append_row, behind, digest, parse_entry, points, read_rows, t975, table
from dtrain.launch import bench_recipes
from dtrain.launch.bench_recipes import JOB, Failed, Wanted, digests, family, run_all, wanted
from dtrain.methods import RULES
from dtrain.recipes import RECIPES
from tests.unit.small_run import refused

ROW = Row("choco", 1.0, 0, 8, 1000, "abc", 7, 2.0, 2.5, 0.1, 3e6, "2026-01-01", "2 x some")
TINY = """
[islands]
count = 2
threads = 1
[model]
layers = 1
width = 8
heads = 1
context = 4
[data]
source = "text.txt"
[train]
steps = 4
eval_every = 0
checkpoint_every = 0
"""


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 30, 31, 60])
def test_t975_leaves_a_fortieth_above(freedom: int) -> None:
    # The density over [0, t] by Simpson's rule, whose error with 20,000 intervals is below 1e-8. The table has three decimals,
    # and the density at the quantile is at most 0.06: 5e-4 in t is 3e-5 of probability; what the formula adds as much again.
    x = np.linspace(0, t975(freedom), 20_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    y = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    area = (x[1] / 3) * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum())
    assert 0.5 + area == pytest.approx(0.975, abs=6e-5)


@pytest.mark.parametrize(("freedom", "t"), [(31, 2.039513), (40, 2.021075), (100, 1.983972)])
def test_t975_above_its_table_is_what_others_print(freedom: int, t: float) -> None:
    assert t975(freedom) == pytest.approx(t, abs=1e-4)  # its next term, at 31: 980 / 384 / 31^3 = 9e-5


def test_a_pair_is_two_runs_of_one_seed() -> None:
    base = [replace(ROW, entry="allreduce", seed=seed, bits_per_byte=bits) for seed, bits in ((0, 2.0), (1, 4.0), (2, 1.0))]
    ours = [replace(ROW, seed=seed, bits_per_byte=bits) for seed, bits in ((1, 4.04), (0, 2.06), (7, 9.0))]
    # +1 % and +3 %: mean 2, standard deviation sqrt(2), and 12.706 sqrt(2) / sqrt(2) on either side; seed 7 has no pair.
    found = behind(ours, base)
    assert found is not None
    assert found.seeds == 2
    assert found.percent == pytest.approx(2.0)
    assert found.half_width == pytest.approx(12.706)
    assert behind(ours[:1], base) == Behind(1, pytest.approx(1.0), None)  # pyright: ignore[reportArgumentType]
    assert behind([replace(ROW, seed=5)], base) is None
    lost = replace(ROW, seed=2, bits_per_byte=None)
    assert behind([*ours, lost], base) == Behind(3, None, None), "a seed that went wrong does not leave a mean of the others"
    assert behind(ours, [replace(base[0], bits_per_byte=None), *base[1:]]) == Behind(2, None, None)


def test_a_table_compares_within_a_budget() -> None:
    rows = [
        replace(ROW, entry="allreduce", bits_per_byte=1.0),
        replace(ROW, bits_per_byte=1.1),
        replace(ROW, entry="allreduce", budget=4.0, bits_per_byte=2.0),
        replace(ROW, budget=4.0, bits_per_byte=2.02),
        replace(ROW, entry="allreduce", budget=4.0, seed=1, bits_per_byte=2.0),
        replace(ROW, budget=4.0, seed=1, bits_per_byte=None, bits_per_byte_islands=None),
    ]
    assert points([row for row in rows if row.entry == "choco"]) == [(3e6, 1.1)]
    assert table(rows, ["choco"]) == [
        ["choco", "1x", "1", "1.1000", "+10.00 %", "2.5000", "3.0"],
        ["choco", "4x", "2", "not finite", "not finite", "not finite", "3.0"],
    ]
    (first, _) = table(rows, ["allreduce"], "choco")
    assert first[4] == "-9.09 %", "of another baseline"


def test_rows_come_back_and_other_lines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    rows = [ROW, replace(ROW, seed=1, bits_per_byte=None)]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    append_row(path, replace(ROW, bits_per_byte=9.0))
    assert read_rows(path) == rows, "the first of a key counts, once"
    path.write_text('{"entry": "choco"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1 is no row of this command"):
        read_rows(path)
    path.write_text("half a l")
    with pytest.raises(ValueError, match=r"line 1 is no row \("):
        read_rows(path)


def test_a_row_is_one_write_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever another process has appended meanwhile."""
    path, write, lines = tmp_path / "rows.jsonl", os.write, list[bytes]()

    def written(descriptor: int, line: bytes) -> int:
        if not lines:
            lines.append(line)
            append_row(path, replace(ROW, seed=1))
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", written)
    append_row(path, ROW)
    assert len(lines) == 1
    assert read_rows(path) == [replace(ROW, seed=1), ROW]


def test_half_a_row_is_taken_back(tmp_path: Path) -> None:
    """A file that may grow by ten bytes more takes ten bytes of the row, as a full disk does."""
    path = tmp_path / "rows.jsonl"
    append_row(path, ROW)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            append_row(path, replace(ROW, seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    append_row(path, replace(ROW, seed=2))
    assert read_rows(path) == [ROW, replace(ROW, seed=2)]


def test_what_another_has_written_behind_half_a_row_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, others = tmp_path / "rows.jsonl", os.write, b"of another command\n"

    def half(descriptor: int, line: bytes) -> int:
        written = write(descriptor, line[:10])
        with path.open("ab") as file:
            file.write(others)
        return written

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        append_row(path, ROW)
    assert path.read_bytes().endswith(others)


def test_no_run_starts_once_those_alive_were_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run is about to start when the command is left; it goes on when the killer has passed, and the pool is waited
    for."""
    arrived, passed, started = Event(), Event(), list[int]()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            if wait:
                passed.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    class Ended:
        def wait(self) -> int:
            assert arrived.wait(10)
            return 1

        def kill(self) -> None:
            pass

    def start(run: Wanted, home: Path) -> Ended:
        (home / "stderr").write_text("no")
        started.append(run.seed)
        return Ended()

    def say(text: str) -> None:
        if "seed 1" in text:
            arrived.set()
            assert passed.wait(10)

    monkeypatch.setattr(bench_recipes, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(bench_recipes, "_start", start)
    runs = wanted(JOB, [parse_entry("allreduce")], [1.0], [0, 1], 2, [])
    found = run_all(runs, tmp_path / "rows.jsonl", 2, say)
    assert isinstance(next(found), Failed)
    assert isinstance(found, Generator)
    found.close()
    assert started == [0]


def test_an_entry_is_a_recipe_with_keys() -> None:
    entry = parse_entry("choco+codec=int4:64+train.lr=1e-3")
    assert (entry.recipe, entry.overrides) == ("choco", ("sync.codec=int4:64", "train.lr=1e-3"))
    with pytest.raises(ValueError, match="'gamma' in 'choco\\+gamma' is no override"):
        parse_entry("choco+gamma")


@pytest.mark.parametrize(
    "change",
    [
        *("islands.count=4", "job.seed=3", "model.width=8", "data.source=a", "sim.step_s=1", "link.rate=1mbit"),
        *("train.steps=9", "recipe=dpsgd", "sync.recipe=dpsgd"),
    ],
)
def test_entries_share_what_they_are_compared_on(change: str) -> None:
    with pytest.raises(ValueError, match=f"^'{change}' in 'choco\\+{change}' is not for an entry to say: .*--budgets$"):
        parse_entry(f"choco+{change}")


def test_comments_do_not_make_another_job() -> None:
    assert digest("[a]\nb = 1 # one") == digest("[a]\nb=1") != digest("[a]\nb = 2")


def test_families_share_what_they_are_compared_with() -> None:
    gossip, diloco = family("gossip"), family("diloco")
    trained = {row.name for row in RECIPES.values() if RULES[row.algorithm].simulated is None}
    assert set(gossip) | set(diloco) == trained
    assert "dadao" not in trained
    assert set(gossip) & set(diloco) == {"allreduce", "local", "single_merge"}
    assert "choco" in gossip
    assert {"delayed_diloco", "local_sgd", "noloco", "demo"} <= set(diloco)


def test_a_run_in_the_file_is_not_wanted_again() -> None:
    entries = [parse_entry("allreduce"), parse_entry("dpsgd+delay=0")]
    runs = wanted(JOB, entries, [2.0, 1.0], [0, 1], 4, [])
    assert [(r.entry.name, r.budget, r.seed) for r in runs][:5] == [
        *(("allreduce", 1.0, 0), ("dpsgd+delay=0", 1.0, 0), ("allreduce", 1.0, 1), ("dpsgd+delay=0", 1.0, 1)),
        ("allreduce", 2.0, 0),
    ]
    assert runs[4].job.train.steps == 2 * runs[0].job.train.steps
    assert runs[1].job.sync.delay == 0
    assert runs[1].job.islands.count == 4
    done = [replace(ROW, entry="allreduce", budget=1.0, islands=4, job=digest(JOB.read_text()))]
    left = wanted(JOB, entries, [2.0, 1.0], [0, 1], 4, done)
    assert len(left) == 7
    assert len(wanted(JOB, entries, [2.0, 1.0], [0, 1], 8, done)) == 8, "of another number of islands"


def test_a_run_is_another_where_a_file_that_it_names_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = 'from dtrain.recipes import Recipe\nrow = Recipe("r", "s", "p", "dpsgd", "parameters", 1, "neighbours", "ring")\n'
    texts = {"text.txt": "to be or not to be. " * 400, "mine.py": row, "edges.txt": "0 1\n"}
    for name, text in texts.items():
        Path(name).write_text(text)
    stdlib, own_text = Path("stdlib.toml"), Path("job.toml")
    own_text.write_text(TINY)
    stdlib.write_text(TINY.replace("text.txt", "stdlib"))
    names = ("dpsgd", "mine.py:row", "dpsgd+topology=graph+graph=./edges.txt")
    entries = [parse_entry(name) for name in names]

    def found(job: Path) -> list[str]:
        return [digests(job, entries, None)[name] for name in names]

    first, texts_first = found(stdlib), found(own_text)
    assert first[0] == digest(stdlib.read_text()), "of the job file alone, where the run names no other"
    assert len({*first, *texts_first}) == 6
    Path("mine.py").write_text(row + "# other\n")
    Path("edges.txt").write_text("1 0\n")
    assert [now == then for now, then in zip(found(stdlib), first, strict=True)] == [True, False, False]
    Path("text.txt").write_text("another " * 1000)
    assert not set(found(own_text)) & set(texts_first)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('[data]\nsource = "gone"', 'data.source = "gone" does not exist'),
        ("[islands]\nranks = 2", "islands.ranks = 2: dtrain sim gives every virtual island one rank"),
        ('[sim]\nproblem = "consensus"', 'sim.problem = "consensus" has no text to compare recipes on'),
        ("[model]\ncontext = 100000", "too few for model.context = 100000"),
    ],
)
def test_a_job_that_cannot_run_is_one_line_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be. " * 400)
    Path("job.toml").write_text(change + ("" if "[data]" in change else '\n[data]\nsource = "text.txt"'))
    assert said in refused(capsys, "bench", "recipes", "job.toml", "--recipes", "dpsgd")


def test_runs_leave_rows_and_failures_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    job, rows_file = tmp_path / "job.toml", tmp_path / "rows.jsonl"
    job.write_text(TINY)
    runs = wanted(job, [parse_entry("allreduce"), parse_entry("dpsgd+topology=ring")], [1.0], [0], None, [])
    gone = replace(runs[1], job=runs[1].job.model_copy(update={"data": runs[1].job.data.model_copy(update={"source": "gone"})}))
    found = list(run_all([runs[0], gone], rows_file, 2, lambda text: None))
    (failed,) = [one for one in found if isinstance(one, Failed)]
    assert failed.wanted is gone
    assert "gone" in failed.said
    (row,) = read_rows(rows_file)
    assert row in found
    assert (row.entry, row.seed, row.islands, row.steps) == ("allreduce", 0, 2, 4)
    # Two islands, each step: half of the gradients, and half of the mean, in fp32; a wire has a header, of at most 64 bytes.
    assert 0 <= row.sent_bytes - 4 * 4 * row.parameters <= 4 * 2 * 64 * 8
    assert row.bits_per_byte == pytest.approx(row.bits_per_byte_islands, abs=1e-6), "all-reduce's islands are equal"


def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = ("bench", "recipes")
    assert "say which recipes" in refused(capsys, *bench)
    assert "say which recipes" in refused(capsys, *bench, "--recipes", "choco", "--family", "gossip")
    assert "--family nothing is not known" in refused(capsys, *bench, "--family", "nothing")
    assert "recipe 'nothing' is not known" in refused(capsys, *bench, "--recipes", "nothing")
    assert "all must be above 0" in refused(capsys, *bench, "--recipes", "choco", "--budgets", "1,0")
    assert "write numbers with commas" in refused(capsys, *bench, "--recipes", "choco", "--seeds", "a")
    assert "must not change by round" in refused(capsys, *bench, "--recipes", "choco+topology=random_pairs")

"""Does the README name what is there, and nothing else? Its tables beside the code, its links beside the files."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from statistics import mean, median
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from dtrain import codec_name, comparison, schedule
from dtrain.config import Job, load_job
from dtrain.kernels import Format
from dtrain.launch.bench_recipes import JOB, JOBS
from dtrain.launch.recipe_sheet import QUESTIONS
from dtrain.recipes import AXES, DEFAULT_RECIPE, RECIPES, Recipe
from dtrain.sections_sync import Sync
from dtrain.topology import NAMES as TOPOLOGIES
from dtrain.wire import HEADER_BYTES
from tests.bench import lab

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = {name: set(get_args(hint)) for name, hint in get_type_hints(Recipe).items() if get_origin(hint) is Literal}
"""The answers of the questions that are answered in words."""


def table(first_column: str) -> list[list[str]]:
    """The rows of the README's table whose header begins so."""
    lines = README.splitlines()
    (at,) = [k for k, line in enumerate(lines) if line.startswith(f"| {first_column} |")]
    rows: list[list[str]] = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_recipes_are_those_of_the_code_and_one_is_the_default() -> None:
    rows = table("recipe")
    assert [ticked(cells[0]) for cells in rows] == [[name] for name in RECIPES]
    assert [ticked(cells[0])[0] for cells in rows if "default" in cells[0]] == [DEFAULT_RECIPE]


def test_the_questions_are_answered_by_keys_and_words_of_the_code() -> None:
    rows = table("question")
    assert len(rows) == 8
    keys = [key for _, names, _ in rows for key in ticked(names)]
    assert len(keys) == len(set(keys)), "a key answers one question"
    assert set(keys) == set(AXES) - {"bucket_bytes"}, "each key but the one that does not change what is learned"
    assert set(keys) <= set(Sync.model_fields)
    for _, names, answers in rows:
        known = set[str]().union(*(WORDS[key] for key in ticked(names) if key in WORDS))
        for word in ticked(answers):
            if "codec" in ticked(names):
                codec_name.parse(word)
            elif "schedule" in ticked(names):
                schedule.steps_at_first(word) if word.startswith("adaptive:") else schedule.parse(word)
            elif "topology" in ticked(names):
                assert word in TOPOLOGIES
            else:
                assert word in known, f"{word} is no answer of {names}"


def test_the_questions_of_a_recipe_shown_are_those_of_the_table() -> None:
    shown = [(question, [key for key in keys if key not in ("payload", "combine")]) for question, keys in QUESTIONS]
    assert shown == [(question, ticked(names)) for question, names, _ in table("question")]


@pytest.mark.parametrize("axis", ["topology", "outer", "landing", "reduce"])
def test_an_axis_of_words_is_shown_with_all_of_them(axis: str) -> None:
    (answers,) = [answers for _, names, answers in table("question") if axis in ticked(names)]
    assert set(ticked(answers)) == (set(TOPOLOGIES) if axis == "topology" else WORDS[axis] - {"none"})


def test_every_key_with_a_section_is_a_key_of_the_job_file() -> None:
    named = re.findall(rf"\b({'|'.join(Job.model_fields)})\.([a-z_]+)(?:=|`)", README)
    assert ("link", "timeout_s") in named
    for section, key in (pair for pair in named if pair[1] not in ("py", "safetensors", "toml")):  # names of files
        assert key in type(getattr(Job(), section)).model_fields, f"{section}.{key}"


def test_every_file_that_is_linked_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", README) if not re.match(r"[a-z]+:", link)]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []
    assert [shown for shown, link in re.findall(r"\[`([^`]+)`\]\(([^)]+)\)", README) if shown != link] == []


def test_the_files_to_read_open_with_a_question_and_methods_with_their_equations() -> None:
    reading = README.partition("## Reading the code")[2]
    files = re.findall(r"\(([a-z_/]+\.py)\)", reading)
    assert len(files) >= 10
    for file in files:
        docstring = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
        if file.startswith("dtrain/algorithms/"):
            assert "<-" in docstring, file
        else:
            assert "?" in docstring.partition("\n\n")[0], file


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"^.*\b(?:RESULTS|TODO|TBD|FIXME|XXX)\b.*$", README, flags=re.MULTILINE) == []


@pytest.mark.parametrize(("column", "family"), [("entry", "gossip"), ("outer loop", "diloco")])
def test_what_recipes_reach_is_what_the_rows_say(column: str, family: str) -> None:
    digest = comparison.digest(JOBS[family].read_text(encoding="utf-8"))
    rows = [row for row in comparison.read_rows(ROOT / "tests/bench/results/recipes.jsonl") if row.job == digest]
    rows = [row for row in rows if row.islands == load_job(JOBS[family]).islands.count]
    shown = [[ticked(entry)[0], *numbers] for entry, *numbers in table(column)]
    assert shown
    assert shown == comparison.table(rows, list(dict.fromkeys(entry for entry, *_ in shown)))
    best = next(row for row in rows if row.entry == "allreduce")
    assert f"{best.parameters:,} parameters" in README
    slow = [row.bits_per_byte for row in rows if row.entry == "diloco+train.lr=1.5e-3"]
    assert all(f"({bits:.4f} with 1.5e-3)" in README.replace("\n", " ") for bits in slow)


def test_what_recipes_reach_with_other_numbers_of_islands_is_what_the_rows_say() -> None:
    digest = comparison.digest(JOBS["diloco"].read_text(encoding="utf-8"))
    rows = comparison.read_rows(ROOT / "tests/bench/results/recipes.jsonl")
    rows = [row for row in rows if (row.job, row.budget, row.seed) == (digest, 1, 0)]
    bits = {(row.entry, row.islands): row.bits_per_byte for row in rows}
    shown = {ticked(entry)[0]: cells for entry, *cells in table("by islands")}
    assert len(shown) >= 3
    for entry, cells in shown.items():
        each = [(bits[entry, islands], bits["allreduce", islands]) for islands in (2, 4, 8)]
        assert cells == [f"{ours:.4f}, {100 * (ours / best - 1):+.2f} %" for ours, best in each if ours and best]


def test_what_the_text_says_of_outer_loops_is_what_the_rows_say() -> None:
    digest = comparison.digest(JOBS["diloco"].read_text(encoding="utf-8"))
    rows = comparison.read_rows(ROOT / "tests/bench/results/recipes.jsonl")
    rows = [row for row in rows if (row.job, row.budget) == (digest, 4)]

    def beside(entry: str, other: str, seeds: int, islands: int = 4) -> tuple[float, str]:
        found = comparison.behind(*([row for row in rows if (row.entry, row.islands) == (e, islands)] for e in (entry, other)))
        assert found is not None
        assert found.percent is not None
        assert found.seeds >= seeds
        return found.percent, f"{found.percent:.2f} % +- {found.half_width or 0:.2f}"

    text = README.replace("\n", " ")
    waited, late = (f"delayed_diloco+every=8+delay={delay}" for delay in (0, 1))
    assert f"waited for, is {beside(waited, 'allreduce', 5)[1]} behind at 4x with 60 times fewer bytes (five paired" in text
    assert f"one step late {beside(late, 'allreduce', 5)[1]}, which is {beside(late, waited, 5)[1]} behind waited for" in text
    muon, same = "muloco+every=10", "allreduce+train.optimizer=muon"
    assert f"at 4x that one is {beside(muon, same, 5)[1]} behind, and " in text
    ahead = beside(muon, "allreduce", 5)[1].removeprefix("-")
    assert f" behind, and {ahead} ahead of all-reduce with AdamW (five paired seeds)" in text
    two, eight = (beside(muon, same, 1, islands=islands)[0] for islands in (2, 8))
    assert f"with two islands it is {two:.2f} % behind at 4x, with eight {eight:.2f} % (one seed)" in text
    few = [beside("dilocox+every=30+rank=16+delay=2", other, 2)[0] for other in ("allreduce", "diloco")]
    assert f"every 30 steps is {few[0]:.2f} % behind all-reduce, and {-few[1]:.2f} % ahead of `diloco` as the recipe" in text
    sparse = ("sparseloco", "sparseloco+codec=topk:128/4096:2")
    behind = [beside(entry, "diloco", 1)[0] for entry in sparse]
    sent = {row.entry: row.sent_bytes for row in rows if row.islands == 4}
    fewer = [f"{sent['allreduce'] / sent[entry]:,.0f} times fewer" for entry in sparse]
    assert f"`sparseloco` is there {behind[0]:.2f} % behind that `diloco` with {fewer[0]} bytes than all-reduce" in text
    assert f"(`codec=topk:128/4096:2`) {-behind[1]:.2f} % ahead of it with {fewer[1]} (one seed)" in text


def test_what_the_text_says_of_pairs_of_recipes_is_what_the_rows_say() -> None:
    """`dtrain bench recipes` sets all beside all-reduce; these are beside each other, by the same mean of paired seeds."""
    digest = comparison.digest(JOB.read_text(encoding="utf-8"))
    rows = comparison.read_rows(ROOT / "tests/bench/results/recipes.jsonl")
    rows = [row for row in rows if (row.job, row.budget) == (digest, 4)]
    pairs = "+topology=alternating_exp_ring:2+train.lr="

    def beside(entry: str, other: str) -> tuple[float, float, int]:
        found = comparison.behind(*([row for row in rows if row.entry == name] for name in (entry, other)))
        assert found is not None
        assert found.percent is not None
        assert found.half_width is not None
        return found.percent, found.half_width, found.seeds

    text = README.replace("\n", " ")
    percent, within, _ = beside(f"accum_adam{pairs}2.4e-2", f"decent_adam{pairs}2.4e-2")
    assert f"at 4x it is {-percent:.2f} % +- {within:.2f} better than `decent_adam`" in text
    plain = "choco+codec=identity+train.lr=2.4e-2"
    eight, four = (beside(f"choco{codec}+train.lr=2.4e-2", plain) for codec in ("", "+codec=int4:64"))
    assert f"8 bits {eight[0]:+.2f} % +- {eight[1]:.2f} and 4 bits {four[0]:+.2f} % +- {four[1]:.2f} (five paired" in text
    assert eight[2] == four[2] == 5
    bits = {row.entry: row.bits_per_byte for row in rows if row.seed == 3}
    slow, slower = bits["allreduce+train.lr=6e-3"], bits[f"accum_adam{pairs}1.2e-2"]
    assert f"all-reduce with 6e-3 reaches {slow:.4f} and `accum_adam` with 1.2e-2 {slower:.4f}" in text


def test_what_the_quickstart_reaches_is_what_was_measured() -> None:
    quality, overlap = (json.loads((ROOT / f"tests/bench/results/{name}.json").read_text()) for name in ("quality", "overlap"))
    ours, theirs, alone = (mean(quality["bits_per_byte"][name]) for name in ("delayed_diloco", "allreduce", "local, single"))
    behind, closed = mean(quality["behind_allreduce_percent"]), mean(quality["gap_closed"])
    assert f"{ours:.4f} bits a byte (mean of three seeds): {behind:.1f} % behind all-reduce's {theirs:.4f}, with 210" in README
    assert 210 <= quality["wire_reduction"] < 220
    assert f"never talk reach {alone:.4f}: {100 * closed:.0f} % of that gap is closed" in README
    at = {row["rate"]: row for row in overlap["rows"]}
    assert max(at[rate]["overlapped_wait_s"] for rate in ("100mbit", "10mbit")) < 1e-3
    left = {rate: f"{100 * row['of_local']:.0f} %" for rate, row in at.items()}
    assert f"{left['100mbit']} at 100 and {left['10mbit']} at 10 Mbit/s of the tokens/s" in README
    assert f"{left['1mbit']} of the speed is left. Talk less" in README
    waits, says = ([at[rate][key] for rate in ("10mbit", "1mbit")] for key in ("waited_s", "wire_s"))
    said = f"rounds wait {waits[0]:.2f} s at 10 Mbit/s, where bytes x 8 / rate says {says[0]:.2f} s, and {waits[1]:.2f} s"
    assert said in README
    assert waits[1] == pytest.approx(says[1], rel=1e-3)


def test_how_soon_islands_train_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "tests/bench/results/first_step.json").read_text(encoding="utf-8"))["rows"]
    two, sixteen = (median(row["first_step_s"]) for row in rows)
    said = f"both islands have trained a step {two:.1f} s after the command (median of three), 16 islands after {sixteen:.1f} s"
    assert said in README


def test_the_speeds_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "tests/bench/results/speed.json").read_text(encoding="utf-8"))
    cells = {(cell["rate"], cell["recipe"]): cell for cell in measured["cells"]}
    (header,) = [line for line in README.splitlines() if line.startswith("| link of an island |")]
    recipes = [name.strip() for name in header.strip("|").split("|")[1:]]
    shown = dict[tuple[str, str], str]()
    for rate, *numbers in table("link of an island"):
        for recipe, number in zip(recipes, numbers, strict=True):
            shown[rate.replace(" ", "").replace("/s", "").lower(), recipe] = number
    assert shown == {key: f"{cell['measured_ms']:,.0f} ({cell['predicted_ms']:,.0f})" for key, cell in cells.items()}
    errors = [abs(cell["error"]) for cell in cells.values()]
    assert f"within 15 % in {sum(error <= 0.15 for error in errors)} of {len(errors)}" in README.replace("\n", " ")
    assert f"{100 * max(errors):.0f} % at worst" in README
    int8 = (cells["100mbit", f"{name} int8"] for name in ("dpsgd", "choco"))
    dpsgd, choco = (100 * cell["waited_ms"] / cell["measured_ms"] for cell in int8)
    assert f"for {dpsgd:.2f} % of the time, choco's for {choco:.0f} %." in README
    assert all(verdict["right"] for verdict in measured["fastest"])


def test_what_each_part_of_dilocox_buys_is_what_was_measured() -> None:
    """Each cell: tokens/s beside local's in the same minutes, how often all-reduce's, and bytes of an island a step."""
    links = json.loads((ROOT / "tests/bench/results/stages.json").read_text(encoding="utf-8"))["links"]
    shown = {ticked(name)[0]: cells for name, *cells in table("part of DiLoCoX")}
    assert shown == {
        row["variant"]: [
            cell
            for link in links
            for r in link["rows"]
            if r["variant"] == row["variant"]
            for cell in (f"{r['of_local']:.1%}", f"{r['gain']:.3g}", f"{r['bytes_per_step'] / 1e3:,.2f}")
        ]
        for row in links[0]["rows"]
    }


def test_what_two_levels_reach_is_what_was_measured() -> None:
    measured = json.loads((ROOT / "tests/bench/results/levels.json").read_text(encoding="utf-8"))
    text, live, (one, four) = README.replace("\n", " "), measured["live"], (measured["budgets"][budget] for budget in ("1", "4"))
    first, last = (f"{of['behind_percent']:.2f} % +- {of['half_width_percent']:.2f}" for of in (one, four))
    assert f"After its 1,000 steps that job is {first} behind all-reduce (five paired seeds), after 4,000 {last} (three" in text
    assert [len(of["bits_per_byte"][name]) for of in (one, four) for name in ("levels", "allreduce")] == [5, 5, 3, 3]
    far, near, all_reduce = (one[f"{name}_bytes"] for name in ("far", "near", "allreduce"))
    fewer = f"{all_reduce / far:,.0f} times fewer"
    assert f"{far / 1e6:.2f} MB of an island over the far link, {fewer}, and {near / 1e6:.0f} MB over" in text
    assert f"waits for {100 * live['wait_s'] / live['train_s']:.0f} % of its time" in text


def test_what_a_labs_links_carry_is_what_was_measured() -> None:
    """`python -m tests.bench.lab readme` writes it; here the cells are read back by hand."""
    measured = json.loads((ROOT / "tests/bench/results/lab.json").read_text(encoding="utf-8"))
    assert "\n".join(lab.readme(measured)) in README
    assert [row["rate"] for row in measured["rates"]] == ["1mbit", "10mbit", "100mbit", "1gbit"]
    for (rate, asked, gloo, *said), row in zip(table("link of a lab"), measured["rates"], strict=True):
        assert rate.lower().replace(" ", "").removesuffix("/s") == row["rate"]
        assert asked == f"{100 * row['of_asked']:.1f}%"
        assert gloo == (f"{100 * row['gloo_of_socket']:.1f}%" if "gloo_of_socket" in row else "-")
        assert said in ([], ["-"], [f"{100 * row.get('sent_of_said', 0):.1f}%"])
        if "sent_of_said" in row:
            beside = row["beside_what_is_said"]
            assert 1 + sum(beside.values()) == pytest.approx(row["sent_of_said"], abs=0.0006), "shown with three digits"
            shown = {name: f"{100 * share:.1f} %" for name, share in beside.items()}
            text, gloo = README.replace("\n", " "), shown["gloo's words"]
            assert f"headers of the frames that carry it, {shown['headers']} (4.6 % if all were full)" in text
            said = f"gloo's own words, three of 48 bytes for each wire that is sent, as many coming in, {gloo}"
            assert f"comes in, {shown['acknowledgements']}, {said}, and" in text
            # All but all wires are a round's: their bytes are 3 * 48 / share, but for those of the start and of the merge.
            quarter, int4 = 180_224 // 4, Format("int4", 64)
            wire = HEADER_BYTES + 2 * int4.num_scales(quarter) + int4.code_bytes(quarter)
            assert 3 * 48 / beside["gloo's words"] == pytest.approx(wire, rel=0.06)
            assert f"A round's wires have {wire / 1000:.0f} kB there" in text


def test_the_kernels_on_a_gpu_are_as_make_gpu_found_them() -> None:
    (path,) = re.findall(r"\((tests/gpu/results/nvidia[^)]*)\)", README)
    text = README.replace("\n", " ")
    results = json.loads((ROOT / path).read_text(encoding="utf-8"))
    checks, hardware = {check["name"]: check for check in results["checks"]}, results["hardware"]
    assert all(check["passed"] for check in checks.values())
    ours = [r for r in checks["kernels_timed"]["data"]["rows"] if r["backend"] == "triton"]
    timed = {(f"`{r['op']}` {r['variant']}".strip(), r["dtype"]): r for r in ours if r["numel"] == 1 << 28}
    shown = table("on an H200")
    assert len(shown) == 8
    for what, _, time, share, faster in shown:
        name, _, dtype = what.rpartition(", ")
        row = timed[name, dtype]
        found = f"{1e3 * row['median_s']:.2f} ms", f"{100 * row['copy_fraction']:.0f} %", f"{row['vs_eager']:.1f}"
        assert (time, share, faster) == found, what
    adam, overlap = timed["`accum_adam` s=1", "fp32"], checks["rounds_overlap_compute"]["data"]
    for words in (
        f"torch's fused AdamW takes {1 / adam['vs_adamw_fused']:.2f} times as long",
        f"On an {hardware['device'].removeprefix('NVIDIA ')} (`make gpu`, torch {hardware['torch']}",
        f"triton {hardware['triton']}, {results['date']}",
        f"covered {100 * overlap['fraction']:.0f} % of the time that rounds flew",
    ):
        assert words in text
    narrow = [row for (_, dtype), row in timed.items() if dtype == "bf16"]
    shares = sorted(100 * row["copy_fraction"] for row in narrow if "gossip_adam" in row["op"])
    adams = sorted(row["vs_adamw_fused"] for row in narrow if row["op"] == "accum_adam")
    compiled = sorted((row["vs_compile"], row["op"]) for row in ours if row["vs_compile"])
    ahead, behind = [pair for pair in compiled if pair[0] < 1], [pair for pair in compiled if pair[0] > 1]
    assert {op for _, op in ahead} == {"mix", "accum_adam"}
    assert not {op for _, op in behind} & {"mix", "accum_adam"}
    assert len(behind) == 7
    for words in (
        (
            f"In bf16 the gossip steps reach {shares[0]:.0f} to {shares[-1]:.0f} %, and `accum_adam` takes {adams[0]:.2f} to "
            f"{adams[-1]:.2f} times as long as torch's fused AdamW"
        ),
        (
            f"`torch.compile` takes {100 * ahead[0][0]:.0f} to {100 * ahead[-1][0]:.0f} % of the time of `mix` and `accum_adam`, "
            f"and {behind[0][0]:.2f} to {behind[-1][0]:.2f} times that of the other seven"
        ),
    ):
        assert words in text
    (calls,) = re.findall(r"specification's bytes in ([\d,]+) calls", README)
    assert f", {calls.replace(',', '')} calls" in checks["same_bytes_as_cpu"]["detail"]

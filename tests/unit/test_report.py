"""Are the summary's numbers right, does it say them in words, and are runs that do not compare refused?"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import metrics, plots, report
from dtrain.config import dump_job, parse_job
from dtrain.launch.checks import resolved
from dtrain.metrics import MetricsWriter, Part, RunRecord

# Two islands of a 1,000,000 parameter model for 50 steps. By hand: all-reduce on two islands sends 2 (2-1)/2 = 1 times
# the gradient each step, 4 MB x 50 = 200 MB; the islands sent 150 kB and 250 kB, 200 kB in the mean: 1000 times fewer.
FIRST = Part(
    island=0,
    parameters=1_000_000,
    steps=50,
    first_step=0,
    tokens=4_000,
    wall_s=9.0,
    train_s=8.0,
    compute_s=7.0,
    wait_s=1.0,
    wire_bytes_sent=150_000,
    wire_bytes_received=250_000,
    wire_bytes_start=4_000_000,
    wire_bytes_merge=2_000_000,
    wire_bytes_consensus=0,
    eval_loss=2 * math.log(2),
    eval_loss_island=3 * math.log(2),
    eval_tokens=65_536,
    bytes_per_token=4.0,
    consensus_distance=0.5,
    corpus_hash="c0ffee",
    recipe="diloco",
    islands=2,
    ranks=1,
)
SECOND = replace(
    FIRST,
    island=1,
    wall_s=12.0,
    train_s=10.0,
    compute_s=8.0,
    wait_s=2.0,
    wire_bytes_sent=250_000,
    wire_bytes_merge=3_000_000,
    eval_loss_island=5 * math.log(2),
)


def write_run(run: Path, parts: list[Part], steps: int = 50) -> Path:
    """A finished run as its islands leave it, but for the summary."""
    run.mkdir()
    (run / "job.toml").write_text(dump_job(resolved(parse_job({}))))
    for part in parts:
        folder = run / "logs" / f"island{part.island}"
        folder.mkdir(parents=True)
        metrics.write_part(folder, part)
        writer = MetricsWriter(run / "metrics.jsonl", part.island)
        for step in range(1, steps + 1):
            writer.line(
                step=step,
                loss=float("nan") if step == 7 else 1 + 4 / step,
                tokens=80,
                tokens_per_s=400.0,
                wire_bytes_sent=part.wire_bytes_sent * step // steps,
                wire_bytes_received=0,
                wait_s=part.wait_s * step / steps,
                lr=1e-3,
                time_s=part.wall_s * step / steps,
                eval_loss=1.2 if step % 25 == 0 else None,
                eval_loss_merged=1.1 if step % 25 == 0 else None,
            )
        writer.close()
    return run


def record(name: str, **changes: object) -> RunRecord:
    summary = {**report.summarize([FIRST, SECOND]), **changes}
    return RunRecord(path=Path("runs") / name, name=name, summary=summary, lines=[])


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_the_summary_equals_the_sums_done_by_hand(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [FIRST, SECOND])
    returned = report.write_summary(run, 2)
    summary = json.loads((run / "summary.json").read_text())
    assert summary == returned
    bits = summary.pop("eval_bits_per_byte"), summary.pop("eval_bits_per_byte_islands")
    assert bits == (pytest.approx(0.5), pytest.approx([0.75, 1.25]))
    assert summary == {
        "recipe": "diloco",
        "islands": 2,
        "ranks": 1,
        "parameters": 1_000_000,
        "steps": 50,
        "first_step": 0,
        "tokens": 8_000,
        "tokens_per_s": 800.0,
        "wall_s": 12.0,
        "train_s": 10.0,
        "compute_s": 7.5,
        "wait_s": 1.5,
        "wire_bytes_sent": 200_000,
        "wire_bytes_start": 4_000_000,
        "wire_bytes_merge": 2_500_000,
        "wire_bytes_consensus": 0,
        "allreduce_wire_bytes": 200_000_000,
        "wire_reduction": 1000.0,
        "eval_loss": 2 * math.log(2),
        "consensus_distance": 0.5,
        "corpus_hash": "c0ffee",
    }


def ring_bytes(parameters: int, islands: int) -> list[int]:
    """Bytes that each island sends in one ring all-reduce, counted chunk by chunk."""
    chunk_bytes = [4 * len(range(chunk, parameters, islands)) for chunk in range(islands)]
    sent = [0] * islands
    for turn in range(islands - 1):
        for island in range(islands):
            sent[island] += chunk_bytes[(island - turn) % islands]  # reduce-scatter
            sent[island] += chunk_bytes[(island + 1 - turn) % islands]  # all-gather
    return sent


@pytest.mark.parametrize("islands", [1, 2, 3, 5, 16])
def test_allreduce_bytes_equal_a_ring_counted_chunk_by_chunk(islands: int) -> None:
    parameters, steps = 240, 7  # 240 divides by every number above, so each island sends the same
    for sent in ring_bytes(parameters, islands):
        assert report.allreduce_wire_bytes(steps, parameters, islands) == steps * sent


def test_a_recipe_that_never_talks_has_no_reduction() -> None:
    parts = [replace(part, wire_bytes_sent=0, recipe="local") for part in (FIRST, SECOND)]
    summary = report.summarize(parts)
    assert summary["wire_reduction"] is None
    rows = {row[0]: row[1] for row in report.closing_rows(summary)}
    assert rows["Bytes an island sent"] == "nothing instead of 200 MB"


def test_a_run_that_diverged_still_has_a_summary(tmp_path: Path) -> None:
    parts = [replace(part, eval_loss=float("nan"), eval_loss_island=float("nan")) for part in (FIRST, SECOND)]
    run = write_run(tmp_path / "run", parts)
    summary = report.write_summary(run, 2)
    assert summary["eval_loss"] is None
    assert summary["eval_bits_per_byte"] is None
    assert summary["eval_bits_per_byte_islands"] == [None, None]
    assert "NaN" not in (run / "summary.json").read_text()
    assert report.closing_rows(summary)[0][1] == "not a finite number: training diverged"
    loaded = report.load_run(run)
    assert ["above the best", "-", "best"] in report.compare_rows([loaded, record("other")])[1]
    plots.plot_compare([loaded], tmp_path / "compare.png")


def test_an_island_that_has_not_finished_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [FIRST])
    with pytest.raises(ValueError, match=r"logs/island1/part\.json"):
        report.write_summary(run, 2)
    assert not (run / "summary.json").exists()


def test_parts_of_different_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="steps is 50 on island 0 but 60 on island 1"):
        report.summarize([FIRST, replace(SECOND, steps=60)])


def test_closing_rows_say_what_it_cost_and_what_it_saved() -> None:
    rows = report.closing_rows(report.summarize([FIRST, SECOND]))
    values = {label: value for label, value, _ in rows}
    assert values == {
        "Loss": "1.3863 nats a token = 0.5000 bits per byte",
        "Each island alone": "0.7500, 1.2500",
        "Bytes an island sent": "200 kB instead of 200 MB: 1,000x fewer",
        "Sent once besides": "4 MB first, 2.5 MB last",
        "Waited for the link": "1.5 s of 10 s, 15.0 %",
        "Speed": "800 tokens/s",
        "Time": "12 s",
    }
    assert all(explanation for _, _, explanation in rows)


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (200_000_000, "200 MB, as much as all-reduce"),
        (100_000_000, "100 MB instead of 200 MB: 2.0x fewer"),
        (400_000_000, "400 MB instead of 200 MB: 2.0x more"),
        (6_000_000, "6 MB instead of 200 MB: 33x fewer"),
        (161_900, "162 kB instead of 200 MB: 1,200x fewer"),
    ],
)
def test_bytes_are_set_against_allreduce(sent: int, words: str) -> None:
    summary = report.summarize([replace(part, wire_bytes_sent=sent) for part in (FIRST, SECOND)])
    assert words in [value for _, value, _ in report.closing_rows(summary)]


def test_one_island_has_nobody_to_send_to() -> None:
    summary = report.summarize([replace(FIRST, islands=1, wire_bytes_sent=0)])
    assert "nothing: there is one island" in [value for _, value, _ in report.closing_rows(summary)]


def test_the_far_links_bytes_are_told_apart_in_a_job_of_two_levels() -> None:
    parts = [replace(FIRST, wire_bytes_sent_near=100_000), replace(SECOND, wire_bytes_sent_near=200_000)]
    summary = report.summarize(parts)
    sent = (FIRST.wire_bytes_sent + SECOND.wire_bytes_sent) / 2
    assert (summary["wire_bytes_sent_near"], summary["wire_bytes_sent_far"]) == (150_000, sent - 150_000)
    assert ("To other groups", "50 kB") in [row[:2] for row in report.closing_rows(summary)]
    assert "wire_bytes_sent_far" not in report.summarize([FIRST, SECOND])


def test_runs_stand_side_by_side() -> None:
    header, rows = report.compare_rows([record("one"), record("two", recipe="local", eval_bits_per_byte=0.51)])
    assert header == ["", "one", "two"]
    assert ["recipe", "diloco", "local"] in rows
    assert ["bits per byte", "0.5000", "0.5100"] in rows
    assert ["waited for the link", "1.5 s, 15.0 %", "1.5 s, 15.0 %"] in rows, "of training, as the closing table says"
    assert ["above the best", "best", "+2.00 %"] in rows
    assert {len(row) for row in rows} == {3}


def test_a_merge_that_would_have_been_better_is_shown() -> None:
    losses = {25: 1.25, 50: 1.0, 75: 1.5}
    lines = [{"step": step, "island": 1, "eval_loss": 2.0, "eval_loss_merged": loss} for step, loss in losses.items()]
    looked = replace(record("one"), lines=[*lines, {"step": 100, "island": 1, "loss": 0.5}])
    assert ["best merge on the way", "1.0000 after step 50", "-"] in report.compare_rows([looked, record("two")])[1]
    assert "best merge on the way" not in [row[0] for row in report.compare_rows([record("two")])[1]]


def test_runs_of_one_name_are_shown_by_their_paths() -> None:
    other = replace(record("one"), path=Path("elsewhere/one"))
    assert report.compare_rows([record("one"), other])[0] == ["", "runs/one", "elsewhere/one"]


def test_runs_of_different_corpora_are_refused() -> None:
    runs = [record("one"), record("two"), record("three", corpus_hash="deadbeef")]
    with pytest.raises(ValueError, match=r"runs/one and runs/three .*c0ffee and deadbeef"):
        report.compare_rows(runs)


def test_no_run_to_report_is_refused() -> None:
    with pytest.raises(ValueError, match="name a run folder"):
        report.compare_rows([])


def test_a_folder_that_is_no_finished_run_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        report.load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no run folder"):
        report.load_run(tmp_path)
    run = write_run(tmp_path / "run", [FIRST, SECOND])
    with pytest.raises(ValueError, match=r"no summary\.json in .*: still running, or stopped; resume with: .*job\.toml --resume"):
        report.load_run(run)
    report.write_summary(run, 2)
    loaded = report.load_run(run)
    assert (loaded.name, len(loaded.lines), loaded.summary["recipe"]) == ("run", 100, "diloco")


def test_both_pictures_are_drawn_in_full_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [FIRST, SECOND])
    report.write_summary(run, 2)
    plots.plot_compare([report.load_run(run)] * 2, tmp_path / "compare.png")
    # Two and three panels of 5.5 x 4.6 inches at 150 dots an inch; an empty page of this size takes 3 kB.
    assert png_size(run / "loss.png") == (1650, 690)
    assert png_size(tmp_path / "compare.png") == (2475, 690)
    assert (run / "loss.png").stat().st_size > 20_000
    assert (tmp_path / "compare.png").stat().st_size > 20_000
    assert not [entry for entry in run.iterdir() if entry.name.startswith(".")]


def test_a_run_whose_metrics_were_emptied_is_drawn_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [FIRST, SECOND])
    (run / "metrics.jsonl").write_text("")
    report.write_summary(run, 2)
    plots.plot_compare([report.load_run(run), record("other")], tmp_path / "compare.png")
    assert png_size(run / "loss.png") == (1650, 690)
    assert png_size(tmp_path / "compare.png") == (2475, 690)


def test_meetings_are_counted_once_for_both_of_a_pair(tmp_path: Path) -> None:
    met = [replace(FIRST, meetings=7), replace(SECOND, meetings=7)]
    summary = report.write_summary(write_run(tmp_path / "run", met), 2)
    assert summary["meetings"] == 7
    assert ("Meetings", "7", "of two islands, as soon as both were ready") in report.closing_rows(summary)
    assert "Meetings" not in [row[0] for row in report.closing_rows(report.summarize([FIRST, SECOND]))]


def test_rounds_without_an_island_are_told_for_each() -> None:
    parts = [replace(FIRST, rounds_joined=12, rounds_left_out=0), replace(SECOND, rounds_joined=9, rounds_left_out=3)]
    summary = report.summarize(parts)
    assert (summary["rounds_joined_islands"], summary["rounds_left_out_islands"]) == ([12, 9], [0, 3])
    assert ("Left out of rounds", "0, 3 of 12") in [row[:2] for row in report.closing_rows(summary)]
    many = report.summarize([replace(parts[i % 2], island=i, islands=9) for i in range(9)])
    assert ("Left out of rounds", "0 to 3 of 12") in [row[:2] for row in report.closing_rows(many)]
    with_quorum = replace(record("one"), summary=summary)
    assert ["left out of rounds", "0, 3 of 12", "-"] in report.compare_rows([with_quorum, record("two")])[1]
    assert not [row for row in report.compare_rows([record("two")])[1] if "rounds" in row[0]]
    assert not [key for key in report.summarize([FIRST, SECOND]) if "rounds" in key]


def test_what_adapts_is_told_as_it_was_at_the_end() -> None:
    summary = report.summarize([replace(part, every_steps=8, rank_mean=50 / 3) for part in (FIRST, SECOND)])
    assert (summary["every_steps"], summary["rank_mean"]) == (8, 50 / 3)
    shown = [row[:2] for row in report.closing_rows(summary)]
    assert {("Steps between rounds", "8"), ("Mean rank", "16.7")} <= set(shown)
    rank_alone = replace(record("two"), summary=report.summarize([replace(part, rank_mean=24.0) for part in (FIRST, SECOND)]))
    rows = report.compare_rows([replace(record("one"), summary=summary), rank_alone, record("three")])[1]
    assert ["steps between rounds", "8", "-", "-"] in rows
    assert ["mean rank", "16.7", "24.0", "-"] in rows
    assert not {"every_steps", "rank_mean"} & report.summarize([FIRST, SECOND]).keys()


def test_a_summary_that_lacks_something_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [FIRST, SECOND])
    summary = report.write_summary(run, 2)
    for name in ("recipe", "eval_loss", "train_s"):
        metrics.write_json(run / "summary.json", {key: value for key, value in summary.items() if key != name})
        with pytest.raises(ValueError, match=rf"summary\.json lacks {name}; write it again with: dtrain run .* --resume"):
            report.load_run(run)
    (run / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks recipe, islands, ranks"):
        report.load_run(run)


def test_the_tables_and_pictures_need_no_more_of_a_summary_than_is_checked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [FIRST, SECOND])
    summary = report.write_summary(run, 2)
    shown = {name: summary[name] for name in report._SHOWN}
    metrics.write_json(run / "summary.json", shown)
    loaded = report.load_run(run)
    report.compare_rows([loaded])
    report.closing_rows(shown)
    plots.plot_run(loaded.lines, shown, tmp_path / "loss.png")
    plots.plot_compare([loaded], tmp_path / "compare.png")


@pytest.mark.parametrize(("islands", "steps"), [(1, 1), (9, 3)])
def test_the_shortest_run_and_many_islands_are_drawn(tmp_path: Path, islands: int, steps: int) -> None:
    parts = [replace(FIRST, island=i, islands=islands, steps=steps, wire_bytes_sent=0) for i in range(islands)]
    run = write_run(tmp_path / "run", parts, steps)
    report.write_summary(run, islands)
    plots.plot_compare([report.load_run(run)], tmp_path / "compare.png")
    assert png_size(run / "loss.png") == (1650, 690)


def test_smoothing_follows_a_line_and_ignores_a_spike() -> None:
    line: Any = np.arange(300.0)
    inside = slice(0, 290)
    np.testing.assert_allclose(plots.smooth(line)[inside], line[inside])
    spiked = np.zeros(300)
    spiked[150] = 1e6
    assert plots.smooth(spiked).max() == 0.0

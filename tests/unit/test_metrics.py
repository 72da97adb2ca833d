"""Do a run's records stay whole: many writers, a kill in the middle of a line, a resume, numbers that JSON lacks?"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from dtrain import metrics
from dtrain.metrics import ErrorNote, MetricsWriter, Part, StatusFile


def write_step(writer: MetricsWriter, step: int, loss: float = 2.5, eval_loss: float | None = None) -> None:
    writer.line(
        step=step,
        loss=loss,
        tokens=1024,
        tokens_per_s=20000.0,
        wire_bytes_sent=100 * step,
        wire_bytes_received=100 * step,
        wait_s=0.25,
        lr=1e-3,
        time_s=0.05 * step,
        eval_loss=eval_loss,
    )


def write_many(path: str, island: int, steps: int, start: Any) -> None:
    writer = MetricsWriter(Path(path), island)
    start.wait()
    for step in range(1, steps + 1):
        write_step(writer, step, loss=island + step / 1000)
    writer.close()


def steps_of(path: Path) -> list[tuple[int, int]]:
    return [(line["island"], line["step"]) for line in metrics.read(path)]


def test_lines_of_processes_that_write_at_once_stay_whole(tmp_path: Path) -> None:
    path, islands, steps = tmp_path / "metrics.jsonl", 4, 1500
    context = multiprocessing.get_context("fork")
    start = context.Barrier(islands)
    writers = [context.Process(target=write_many, args=(str(path), island, steps, start)) for island in range(islands)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0] * islands
    lines = metrics.read(path)
    assert len(lines) == islands * steps
    for island in range(islands):
        mine = [line for line in lines if line["island"] == island]
        assert [line["step"] for line in mine] == list(range(1, steps + 1))
        assert [line["loss"] for line in mine] == [island + step / 1000 for step in range(1, steps + 1)]


def test_a_line_has_the_documented_keys_and_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", 3)
    write_step(writer, 1)
    write_step(writer, 2, eval_loss=1.5)
    writer.close()
    plain, evaluated = metrics.read(tmp_path / "metrics.jsonl")
    keys = [
        "step",
        "island",
        "loss",
        "tokens",
        "tokens_per_s",
        "wire_bytes_sent",
        "wire_bytes_received",
        "wait_s",
        "lr",
        "time_s",
    ]
    assert list(plain) == keys
    assert list(evaluated) == [*keys, "eval_loss"]
    writer = MetricsWriter(tmp_path / "more.jsonl", 3)
    writer.line(
        step=1, loss=2.5, tokens=1024, tokens_per_s=20000.0, wire_bytes_sent=0, wire_bytes_received=0, wait_s=0.0, lr=1e-3,
        time_s=0.05, rounds_joined=3, rounds_left_out=0, every_steps=8, rank_mean=16.0,
    )  # fmt: skip
    writer.close()
    more = {"rounds_joined": 3, "rounds_left_out": 0, "every_steps": 8, "rank_mean": 16.0}
    assert list(metrics.read(tmp_path / "more.jsonl")[0].items())[len(keys) :] == list(more.items()), "0 is a count"
    assert (evaluated["island"], evaluated["step"], evaluated["eval_loss"]) == (3, 2, 1.5)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_json_cannot_hold_becomes_null(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    write_step(writer, 1, loss=loss, eval_loss=loss)
    writer.close()

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["loss"] is None
    assert content["eval_loss"] is None


@pytest.mark.parametrize("cut", [1, 2, 40, 100])
def test_a_half_written_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    for step in (1, 2, 3):
        write_step(writer, step)
    writer.close()
    path.write_bytes(path.read_bytes()[:-cut])
    # Without its newline alone the line is still all there.
    assert steps_of(path) == ([(0, 1), (0, 2), (0, 3)] if cut == 1 else [(0, 1), (0, 2)])


@pytest.mark.parametrize("broken", ['{"step": 2, "isl', "", "[1, 2]", '{"step": "2", "island": 0}', '{"island": 0}', "\xff"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "island": 0}}\n{broken}\n{{"step": 3, "island": 0}}\n', encoding="latin-1")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is broken"):
        metrics.read(path)
    metrics.cut_back(path, 3)
    assert path.read_text() == '{"step": 1, "island": 0}\n{"step": 3, "island": 0}\n', "a resume drops that line, and no other"


def test_cut_back_keeps_the_lines_up_to_the_step_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "island": {island}, "loss": 1.10}}' for step in (1, 2, 3, 4) for island in (1, 0)]
    path.write_text("\n".join(lines) + "\n" + lines[-1][:17])
    metrics.cut_back(path, 2)
    assert path.read_text() == "\n".join(lines[:4]) + "\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
    metrics.cut_back(path, 0)
    assert path.read_bytes() == b""


def test_after_cut_back_the_next_line_starts_on_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "island": 0}\n{"step": 2, "isl')
    metrics.cut_back(path, 5)
    writer = MetricsWriter(path, 0)
    write_step(writer, 2)
    writer.close()
    assert steps_of(path) == [(0, 1), (0, 2)]


def test_a_file_that_cannot_be_put_into_place_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "status.json" / "folder").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        metrics.write_json(tmp_path / "status.json", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_cut_back_of_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    metrics.cut_back(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_survived_a_cut_back_writes_to_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, 0)
    for step in (1, 2, 3):
        write_step(writer, step)
    metrics.cut_back(path, 1)
    write_step(writer, 2)
    writer.close()
    assert steps_of(path) == [(0, 1), (0, 2)]


def test_what_an_island_wrote_again_after_going_back_counts() -> None:
    def line(island: int, step: int, loss: float) -> dict[str, Any]:
        return {"island": island, "step": step, "loss": loss}

    written = [line(0, 1, 5.0), line(1, 1, 5.5), line(0, 2, 4.0), line(0, 3, 3.0), line(0, 2, 4.1), line(1, 2, 4.5)]
    assert metrics.newest(written) == [line(0, 1, 5.0), line(1, 1, 5.5), line(0, 2, 4.1), line(1, 2, 4.5)]


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    status = StatusFile(path, steps=1500, timeout_s=300.0)
    status.update("starting", 0)
    status.update("waiting", 40, waiting_for=[1, 2], waited_s=12.5)
    assert json.loads(path.read_text()) == {
        "state": "waiting",
        "step": 40,
        "steps": 1500,
        "waiting_for": [1, 2],
        "waited_s": 12.5,
        "timeout_s": 300.0,
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_the_first_reason_stays_and_is_one_line(tmp_path: Path) -> None:
    assert metrics.read_error(tmp_path) is None
    metrics.write_error(tmp_path, "user", "no text\n  at /data; name a file")
    metrics.write_error(tmp_path, "resumable", "connection closed by peer")
    assert metrics.read_error(tmp_path) == ErrorNote("user", "no text at /data; name a file")
    assert [entry.name for entry in tmp_path.iterdir()] == ["error.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not valid JSON"), ('{"kind": "user"}', "lacks message"), ('{"kind": "odd", "message": ""}', "kind = 'odd'")],
)
def test_an_error_file_that_says_nothing_useful_is_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "error.json").write_text(text)
    with pytest.raises(ValueError, match=rf"error\.json.*{words}"):
        metrics.read_error(tmp_path)


def test_a_part_comes_back_as_it_was_and_a_missing_key_is_named(tmp_path: Path) -> None:
    part = Part(
        island=0,
        parameters=10,
        steps=3,
        first_step=0,
        tokens=30,
        wall_s=1.5,
        train_s=1.5,
        compute_s=1.0,
        wait_s=0.5,
        wire_bytes_sent=7,
        wire_bytes_received=8,
        wire_bytes_start=9,
        wire_bytes_merge=11,
        wire_bytes_consensus=0,
        eval_loss=1.25,
        eval_loss_island=1.5,
        eval_tokens=65536,
        bytes_per_token=1.0,
        consensus_distance=None,
        corpus_hash="c0ffee",
        recipe="diloco",
        islands=1,
        ranks=2,
    )
    metrics.write_part(tmp_path, part)
    assert metrics.read_part(tmp_path) == part
    content = json.loads((tmp_path / "part.json").read_text())
    del content["wait_s"]
    metrics.write_json(tmp_path / "part.json", content)
    with pytest.raises(ValueError, match=r"part\.json lacks wait_s"):
        metrics.read_part(tmp_path)

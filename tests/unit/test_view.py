"""Does a person see how far each island is, and whom it waits for?"""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from dtrain.launch.progress import IslandView, Progress, Tail, slowest_step
from dtrain.launch.view import LiveView, now, picture, plain_line

TRAINING = IslandView(
    0,
    "training",
    step=300,
    steps=1500,
    loss=2.3456,
    tokens_per_s=12345.6,
    wire_bytes_sent=1_500_000,
    wait_s=75.0,
    timeout_s=300.0,
)
WAITING = IslandView(1, "waiting", step=290, steps=1500, waiting_for=(0,), waited_s=12.4, timeout_s=300.0)


def rendered(islands: list[IslandView], width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(picture(islands))
    return out.getvalue()


def test_the_picture_has_a_row_an_island_with_its_numbers() -> None:
    lines = rendered([TRAINING, WAITING]).splitlines()
    assert len(lines) == 3
    for word in ("300/1500", "2.346", "12,346", "1.5 MB", "1 min 15 s", "training"):
        assert word in lines[1]
    assert "waiting for island 0, 12 s of 300" in lines[2]


def test_the_bar_is_as_long_as_the_progress() -> None:
    def cells(step: int) -> int:
        row = rendered([IslandView(0, "training", step=step, steps=1000)]).splitlines()[1]
        return row.count("\u2501")  # without colours rich draws the done part only

    assert cells(0) == 0
    assert cells(1000) > 20
    assert abs(cells(500) - cells(1000) / 2) <= 1


def test_it_fits_a_terminal_of_80_columns() -> None:
    assert max(len(line) for line in rendered([TRAINING], width=80).splitlines()) <= 80


def test_the_launchers_word_goes_before_the_islands_own() -> None:
    assert now(IslandView(0, "training", note="lost; no restarts are left")) == "lost; no restarts are left"


def test_several_islands_are_named() -> None:
    assert now(IslandView(0, "waiting", waiting_for=(1, 2), waited_s=3.0, timeout_s=9.0)) == "waiting for islands 1, 2, 3 s of 9"


def test_without_a_terminal_there_is_a_line_every_ten_seconds_at_most() -> None:
    out = io.StringIO()
    later = IslandView(1, "waiting", steps=1500, waiting_for=(0,), waited_s=22.0, timeout_s=300.0)
    with LiveView(Console(file=out)) as view:
        for tenth in range(99):
            view.show([WAITING], tenth / 10)
        assert out.getvalue() == "island 1: waiting for island 0, 12 s of 300\n"
        view.show([later], 10.1)
    assert out.getvalue().splitlines()[1:] == ["island 1: waiting for island 0, 22 s of 300"]


def test_a_plain_line_is_one_line() -> None:
    line = plain_line([TRAINING, WAITING])
    assert "\n" not in line
    assert line.startswith("island 0: training, step 300/1500, loss 2.346, 12,346 tokens/s, sent 1.5 MB, waited 1 min 15 s | ")


def test_the_tail_gives_whole_lines_only_and_starts_over_when_the_file_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text("one\ntw")
    assert tail.lines() == ["one"]
    path.write_text("one\ntwo\n")
    assert tail.lines() == ["two"]
    path.write_text("1\n")
    assert tail.lines() == ["1"]


def test_progress_joins_metrics_and_status(tmp_path: Path) -> None:
    record = {"step": 7, "island": 0, "loss": 3.5, "tokens_per_s": 10.0, "wire_bytes_sent": 64, "wait_s": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n" + '{"step": 8, "isl')
    folder = tmp_path / "logs" / "island1"
    folder.mkdir(parents=True)
    status = {"state": "waiting", "step": 6, "steps": 9, "waiting_for": [0], "waited_s": 2.0, "timeout_s": 30.0}
    (folder / "status.json").write_text(json.dumps(status))
    first, second = Progress(tmp_path, 2, 9).read()
    assert (first.step, first.loss, first.wire_bytes_sent) == (7, 3.5, 64)
    assert first.state == "starting", "the numbers are an earlier start's until the island says what it does"
    assert now(second) == "waiting for island 0, 2 s of 30"
    assert slowest_step([first, second]) == 6

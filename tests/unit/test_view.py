"""Does a person see how far each island is, and whom it waits for?"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.launch.progress import IslandView, Progress, Tail, slowest_step
from dtrain.launch.view import LiveView, now, picture, plain_line

BAR = "\u2501"  # without colours rich draws the done part only
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


NAMES_MANY = IslandView(
    1000,
    "waiting",
    step=99_000,
    steps=100_000,
    loss=11.5,
    tokens_per_s=1_234_567.0,
    wire_bytes_sent=123_000_000,
    wait_s=7000.0,
    waiting_for=tuple(range(100, 116)),
    waited_s=299.0,
    timeout_s=300.0,
)
LOST = IslandView(3, "training", step=7, steps=1500, note="lost; will be started again (1 of 3)")


def rendered(islands: list[IslandView], width: int = 80, rows: int | None = None) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system=None).print(picture(islands, width, rows))
    return out.getvalue().splitlines()


def test_80_columns_hold_two_whole_lines_an_island() -> None:
    first, numbers, second = rendered([TRAINING, WAITING])
    assert first.split() == ["island", "0", BAR * 4, "300/1500", "training"], "a fifth of the 21 columns that are left"
    assert numbers == "    loss 2.346  12,346 tokens/s  sent 1.5 MB  waited for link 1 min 15 s"
    assert second.split(BAR)[0] == "island 1  "
    assert second.endswith("  290/1500  waiting for island 0, 12 s of 300")
    assert first.index("300/1500") == second.index("290/1500")
    assert rendered([TRAINING])[0] == first, "bars do not jump when another island begins to wait"


def test_who_watches_a_while_sees_how_quickly_it_sends() -> None:
    numbers = rendered([replace(TRAINING, tokens_per_s=1_234_567.0, wire_bytes_sent=123_000_000, wire_bytes_per_s=45_600.0)])[1]
    assert numbers == "    loss 2.346  1,234,567 tokens/s  sent 123 MB at 45.6 kB/s  waited 1 min 15 s"
    assert len(numbers) <= 80


def test_what_is_known_of_rounds_is_shown_where_there_is_room() -> None:
    view = replace(TRAINING, rounds_joined=9, rounds_left_out=3, every_steps=8, rank_mean=16.0)
    numbers = "    loss 2.346  12,346 tokens/s  sent 1.5 MB  waited for link 1 min 15 s"
    assert rendered([view], 120)[1] == f"{numbers}  left out of 3 of 12 rounds  H 8"
    assert rendered([view], 140)[1] == f"{numbers}  left out of 3 of 12 rounds  H 8  mean rank 16.0"
    assert rendered([view], 80)[1] == f"{numbers}  H 8", "nothing is cut off"
    assert plain_line([view]).endswith("waited for link 1 min 15 s, left out of 3 of 12 rounds, H 8, mean rank 16.0")
    assert rendered([replace(TRAINING, rounds_joined=2, rounds_left_out=0)], 140)[1] == f"{numbers}  left out of 0 of 2 rounds"


@pytest.mark.parametrize(
    ("view", "ending"),
    [
        (WAITING, "290/1500  waiting for island 0, 12 s of 300"),
        (LOST, "7/1500  lost; will be started again (1 of 3)"),
        (NAMES_MANY, "99000/100000  waiting for island 100 and 15 more, 299 s of 300"),
    ],
)
def test_at_80_columns_nothing_is_cut_off(view: IslandView, ending: str) -> None:
    for others in ([], [TRAINING], [replace(TRAINING, island=i) for i in range(1001, 1009)]):
        lines = rendered([replace(view, island=1000), *others])
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith(f"island 1000  {BAR if view.step * 2 > view.steps else ''}")
        state = ending.split("  ")[1]
        assert lines[0].endswith(ending if not others else state)
    lines = rendered([view])
    if view is NAMES_MANY:
        assert "    loss 11.500  1,234,567 tokens/s  sent 123 MB  waited for link 116 min 40 s" in lines


def test_many_islands_have_one_line_each_with_their_loss() -> None:
    lines = rendered([replace(TRAINING, island=i) for i in range(8)] + [replace(WAITING, loss=3.0, island=8)])
    assert len(lines) == 9
    assert lines[0].endswith("300/1500  loss 2.346  training")
    assert lines[8].startswith("island 8  ")
    assert lines[8].endswith("290/1500  loss 3.000  waiting for island 0, 12 s of 300")


def test_what_does_not_fit_on_the_screen_is_said_in_its_last_line() -> None:
    islands = [replace(TRAINING, island=i, step=300 + i) for i in range(100)]
    lines = rendered(islands, rows=24)
    assert len(lines) <= 23
    assert lines[-1] == "and 78 more, at step 322 or later"
    assert len(rendered(islands[:5], rows=10)) == 5, "two lines each would be ten"


def test_the_bar_is_as_long_as_the_progress() -> None:
    def cells(step: int) -> int:
        return rendered([IslandView(0, "training", step=step, steps=1000)], width=120)[0].count(BAR)

    assert cells(0) == 0
    assert cells(1000) == 40
    assert cells(500) == 20


def test_on_a_terminal_the_picture_is_redrawn_in_place() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True, color_system=None)
    with LiveView(console) as view:
        view.show([TRAINING, WAITING], 0.0)
        drawn = out.getvalue()
        view.show([replace(TRAINING, step=600), WAITING], 0.1)
        view.line("island 1 was lost")
    assert "island 1  " in drawn
    assert "waiting for island 0, 12 s of 300" in drawn
    redrawn = out.getvalue().removeprefix(drawn)
    assert redrawn.count("\x1b[1A") >= 2, "the cursor goes back over the three lines that were there"
    assert "600/1500" in redrawn
    assert "island 1 was lost" in redrawn


def test_on_a_terminal_a_scripts_islands_are_plain_lines() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=80, force_terminal=True, color_system=None), bars=False) as view:
        view.show([WAITING], 0.0)
    assert out.getvalue() == "island 1: waiting for island 0, 12 s of 300\n"


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


def test_without_a_terminal_a_new_wait_is_said_soon_and_once() -> None:
    out = io.StringIO()
    training = replace(WAITING, state="training", waiting_for=())
    with LiveView(Console(file=out)) as view:
        view.show([training], 0.0)
        for tenth in range(1, 90):
            view.show([replace(WAITING, waited_s=tenth / 10)], tenth / 10)
    assert out.getvalue().splitlines() == ["island 1: training", "island 1: waiting for island 0, 2 s of 300"]


def test_a_plain_line_of_many_islands_names_those_in_trouble() -> None:
    islands = [replace(TRAINING, island=i, step=300 + i) for i in range(1, 16)]
    assert plain_line([LOST, *islands]) == "16 islands, steps 7 to 315 of 1500 | island 3: lost; will be started again (1 of 3)"


def test_a_plain_line_is_one_line() -> None:
    line = plain_line([TRAINING, WAITING])
    assert "\n" not in line
    said = "island 0: training, step 300/1500, loss 2.346, 12,346 tokens/s, sent 1.5 MB, waited for link 1 min 15 s | "
    assert line.startswith(said)


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


def test_what_an_island_writes_where_a_round_lands_stays_until_the_next(tmp_path: Path) -> None:
    of_steps = ({}, {"every_steps": 12, "rank_mean": 24.0}, {}, {"every_steps": 8, "rank_mean": 16.0}, {})
    progress, seen = Progress(tmp_path, 1, 9), list[tuple[int, int | None, float | None]]()
    for step, more in enumerate(of_steps, start=1):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "island": 0, "rounds_joined": step, "rounds_left_out": step // 2} | more) + "\n")
        (view,) = progress.read()
        assert (view.rounds_joined, view.rounds_left_out) == (step, step // 2)
        seen.append((view.step, view.every_steps, view.rank_mean))
    assert seen == [(1, None, None), (2, 12, 24.0), (3, 12, 24.0), (4, 8, 16.0), (5, 8, 16.0)]


def test_a_first_start_says_why_it_takes_longer() -> None:
    said = now(IslandView(0, "compiling", steps=10))
    assert said == "compiling the CPU kernels, once, about half a minute"
    assert said in plain_line([IslandView(0, "compiling", steps=10), TRAINING])

"""Does ``dtrain status`` show an island at its own site, and say what it cannot see there?"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.config import load_job
from dtrain.launch import islands, part, prometheus
from dtrain.launch.cli import run_command
from dtrain.launch.cli_status import page
from dtrain.launch.launcher_word import path_of
from dtrain.launch.part_words import Order
from dtrain.launch.status import Reader, newest_run
from dtrain.launch.status_web import as_json
from tests.unit.watched import launcher_gone, make_run, record, site_run, write_lines

UNSEEN = "this is the site of island 1: what the others do is seen where the launcher is, 10.0.0.1:4711"


def test_its_own_island_is_shown_with_its_links_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "ring-island1"
    word = site_run(run, 1)
    state = Reader(run).read()
    assert (state.phase, state.how, state.part, state.unseen) == ("running", "", 1, UNSEEN)
    (own,) = state.seen
    assert (own.view.step, own.view.loss, own.view.waiting_for, own.view.waited_s) == (20, 4.98, (0,), 10.0)
    assert [island.view.state for island in state.islands] == ["elsewhere", "waiting", "elsewhere"]
    assert state.links is not None
    # Over 40 s, 15 steps of 1000 bytes; a half to each neighbour.
    rates = {(1, 0): 187.5, (1, 2): 187.5}
    assert {(at.sender, at.receiver): state.bytes_per_s(at) for at in state.links if at.sender == 1} == rates
    assert {state.bytes_per_s(at) for at in state.links if at.sender != 1} == {None}
    assert state.merged == ((10, 4.125),)

    assert run_command(["status", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{run}: running; 3 islands, choco"
    assert "its links carry 375 B/s" in out[1]
    assert UNSEEN in out
    assert [line for line in out if line.startswith("island ")] == [out[-1]]
    assert out[-1].startswith("island 1: waiting for island 0, 10 s of 300, step 20/3000, loss 4.980")
    console = Console(file=io.StringIO(), width=120)
    with console.capture() as shown:
        console.print(page(state, 120))
    assert ("island 1" in shown.get(), "island 0 " in shown.get().replace(" for island 0,", "")) == (True, False)

    word.end(75, "the launcher at 10.0.0.1:4711 is gone")
    state = Reader(run).read()
    assert state.how == "ended with exit status 75: the launcher at 10.0.0.1:4711 is gone"
    assert [island.view.note for island in state.islands] == ["", "stopped", ""]


def test_a_browser_and_prometheus_are_told_of_that_island_alone(tmp_path: Path) -> None:
    site_run(tmp_path / "run", 1)
    state = Reader(tmp_path / "run").read()
    said = as_json(state)
    assert said["unseen"] == UNSEEN
    assert [island["looks"] for island in said["islands"]] == ["elsewhere", "waiting", "elsewhere"], "places in the picture"
    text = prometheus.text(state)
    assert 'dtrain_step{island="1"} 20' in text
    assert 'dtrain_step{island="0"}' not in text
    assert "dtrain_islands 3" in text


def test_of_a_run_and_its_parts_on_one_disk_the_run_is_shown(tmp_path: Path) -> None:
    """As under Slurm; at a site alone its part is all there is."""
    site_run(tmp_path / "runs" / "ring-island1", 1)
    assert newest_run(tmp_path / "runs").name == "ring-island1"
    make_run(tmp_path / "runs" / "ring")
    os.utime(tmp_path / "runs" / "ring" / "job.toml", (0, 0))
    os.utime(path_of(tmp_path / "runs" / "ring"), (0, 0))
    assert newest_run(tmp_path / "runs").name == "ring"


def test_a_part_that_was_killed_is_found_out(tmp_path: Path) -> None:
    run = tmp_path / "run"
    site_run(run, 1)
    launcher_gone(run)
    assert Reader(run).read().how.startswith("island 1's part of the launcher (process ")


def test_a_part_says_how_often_its_island_was_started_again_and_that_it_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    word = site_run(run, 1)
    at_site = part.Part(islands.Launch(load_job(run / "job.toml"), run, "h:1", "tag"), 1)
    monkeypatch.setattr(islands, "start", lambda *which: Ended(1))
    for number, epoch in ((1, 0), (2, 1)):
        at_site.carry_out(Order(number, "start", epoch, 0))
    at_site.say(word)
    write_lines(run, [record(1, 21)])
    state = Reader(run).read()
    assert (state.epoch, [island.restarts for island in state.islands]) == (1, [0, 1, 0])
    assert [island.lost for island in state.islands] == [False, True, False]
    assert state.islands[1].view.note == "lost; the launcher decides"


class Ended:
    """In place of a torchrun."""

    def __init__(self, status: int) -> None:
        self._status = status

    def poll(self) -> int:
        return self._status

"""Does another process see how a run stands? Against numbers computed by hand from the lines that were written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dtrain.config import parse_job
from dtrain.launch.checks import resolved
from dtrain.launch.cli import run_command
from dtrain.launch.cli_status import heads, page, watch
from dtrain.launch.launcher_word import goes_on, path_of, read_word
from dtrain.launch.progress import Tail
from dtrain.launch.status import LATELY_S, MOST_POINTS, Curve, Reader, newest_run
from dtrain.launch.status_links import Link, links
from dtrain.metrics import cut_back
from tests.unit.small_run import contents, finish, refused
from tests.unit.watched import launcher_gone, make_run, record, site_run, status_file, training_run, write_lines

TWO_LEVELS = {"sync": {"level": [{"islands": 2, "recipe": "dpsgd"}, {"recipe": "diloco"}]}}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


RUN = Path("runs/watched")


def test_a_running_run_is_read_to_the_last_digit() -> None:
    training_run(RUN)
    state = Reader(RUN).read()
    assert (state.name, state.recipe, state.phase, state.how) == ("watched", "choco", "running", "")
    assert (state.epoch, state.committed_step) == (1, 10), "step 20 is not committed"
    waits, behind, ahead = state.islands
    assert [island.view.step for island in state.islands] == [20, 19, 20]
    assert [island.view.loss for island in state.islands] == [5.98, 4.981, 3.5]
    assert [island.tokens for island in state.islands] == [2560, 2432, 2560]
    assert [island.wire_bytes_received for island in state.islands] == [18_000, 17_100, 18_000]
    assert [island.time_s for island in state.islands] == [40.0, 38.0, 40.0]
    assert [island.restarts for island in state.islands] == [0, 1, 0]
    assert [island.eval_loss for island in state.islands] == [None, None, 3.25]
    assert (waits.view.waiting_for, waits.view.waited_s, waits.view.timeout_s) == ((2,), 10.0, 300.0)
    # Over 30 s, 15 steps of 1000 bytes; island 0 has waited 10 s since its last line.
    assert behind.view.wire_bytes_per_s == ahead.view.wire_bytes_per_s == 500.0
    assert waits.view.wire_bytes_per_s == 15_000 / 40
    assert behind.curve == tuple((t, 6 - t / 1000 - 1) for t in range(1, 20))
    assert ahead.curve[-1] == (20, 3.5)
    assert state.links is not None
    rates = {(0, 1): 187.5, (0, 2): 187.5, (1, 0): 250.0, (1, 2): 250.0, (2, 0): 250.0, (2, 1): 250.0}
    assert {(at.sender, at.receiver): state.bytes_per_s(at) for at in state.links} == rates
    assert state.merged == ((10, 4.125),)
    assert 0 <= state.quiet_s < 60


def test_nothing_is_written_into_the_run() -> None:
    training_run(RUN)
    before = contents(RUN), [(path, path.stat().st_mtime_ns) for path in sorted(RUN.rglob("*"))]
    reader = Reader(RUN)
    for _ in range(2):
        reader.read()
    assert run_command(["status", str(RUN)]) == 0
    assert (contents(RUN), [(path, path.stat().st_mtime_ns) for path in sorted(RUN.rglob("*"))]) == before


def test_a_run_in_which_nobody_has_written_yet() -> None:
    make_run(RUN)
    state = Reader(RUN).read()
    assert state.phase == "running"
    seen = [(island.view.state, island.view.loss, island.view.wire_bytes_per_s, island.curve) for island in state.islands]
    assert seen == [("starting", None, None, ())] * 2
    assert (state.committed_step, state.merged) == (None, ())
    assert heads(state)[1] == "nothing committed yet"


def test_a_lost_island_sends_nothing_and_says_what_the_launcher_says() -> None:
    word = training_run(RUN)
    word.say(1, 10, [0, 1, 0], ["", "lost; will be started again (2 of 3)", ""])
    state = Reader(RUN).read()
    assert [island.lost for island in state.islands] == [False, True, False]
    assert state.islands[1].view.note == "lost; will be started again (2 of 3)"
    assert state.islands[1].view.wire_bytes_per_s is None
    assert "lost and started again: island 1 1x" in heads(state)
    word.end(75, "island 1 failed and no restarts are left")
    state = Reader(RUN).read()
    assert (state.phase, state.how) == ("ended", "ended with exit status 75: island 1 failed and no restarts are left")
    assert [island.view.note for island in state.islands] == ["stopped", "lost", "stopped"]
    assert [island.lost for island in state.islands] == [False, True, False]


def test_a_run_that_finished() -> None:
    word = make_run(RUN)
    finish(RUN, 20)
    part = json.loads((RUN / "logs" / "island0" / "part.json").read_text())
    (RUN / "logs" / "island0" / "part.json").write_text(json.dumps(part | {"eval_loss": 2.5}))
    for island in range(2):
        status_file(RUN, island).update("done", 20)
    assert Reader(RUN).read().phase == "running", "the launcher has not said so"
    word.end(0)
    state = Reader(RUN).read()
    assert (state.phase, state.how) == ("ended", "finished")
    assert [(island.view.state, island.view.note) for island in state.islands] == [("done", "")] * 2
    assert state.merged == ((20, 2.5),), "the merged model's, at the end"
    path_of(RUN).unlink()
    assert Reader(RUN).read().how == "finished", "of a version that left no word"
    (RUN / "summary.json").unlink()
    assert Reader(RUN).read().how.startswith("not started")
    (RUN / "virtual.json").write_text("{}")
    assert Reader(RUN).read().how == "finished, on a virtual clock: its numbers are in runs/watched/virtual.json"


def test_a_launcher_that_was_killed_is_found_out() -> None:
    training_run(RUN)
    word = read_word(RUN)
    assert word is not None
    assert goes_on(word)
    assert goes_on(replace(word, machine="another", process=1)), "of another machine nothing can be seen"
    launcher_gone(RUN)
    state = Reader(RUN).read()
    assert state.phase == "ended"
    assert state.how == f"the launcher (process {os.getpid()}) is gone without a word, as if killed"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stat = Path(f"/proc/{child.pid}/stat").read_text()
    theirs = replace(word, process=child.pid, started=int(stat.rpartition(")")[2].split()[19]))
    assert goes_on(theirs)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not goes_on(theirs), "dead, though nobody has reaped it"
    child.communicate()
    assert not goes_on(theirs)


def test_a_half_written_last_line_counts_once_it_is_whole() -> None:
    make_run(RUN)
    write_lines(RUN, [record(0, 1), record(1, 1)])
    whole = json.dumps(record(0, 2)) + "\n"
    reader, path = Reader(RUN), RUN / "metrics.jsonl"
    with path.open("a") as file:
        file.write(whole[:30])
    assert [island.view.step for island in reader.read().islands] == [1, 1]
    with path.open("a") as file:
        file.write(whole[30:])
    state = reader.read()
    assert [island.tokens for island in state.islands] == [256, 128]
    assert state.islands[0].curve == ((1, 5.999), (2, 5.998))
    write_lines(RUN, [{"step": 3, "island": 7}, {"no": "step"}])
    assert [island.view.step for island in reader.read().islands] == [2, 1], "a line of no island of this run"


def test_after_a_loss_the_steps_that_were_set_back_are_not_counted_twice() -> None:
    word = make_run(RUN)
    write_lines(RUN, (record(i, t) for t in range(1, 11) for i in range(2)))
    reader = Reader(RUN)
    assert reader.read().islands[0].tokens == 1280
    cut_back(RUN / "metrics.jsonl", 5)
    # As many lines again before the next look: the new file is as long as the old one, and longer.
    write_lines(RUN, (record(i, t, loss=1.0) for t in range(6, 13) for i in range(2)))
    word.say(1, 5, [1, 0], ["", ""])
    state = reader.read()
    assert [island.tokens for island in state.islands] == [12 * 128] * 2
    assert state.islands[0].curve == (*((t, 6 - t / 1000) for t in range(1, 6)), *((t, 1.0) for t in range(6, 13)))
    assert state.epoch == 1


def test_a_tail_reads_a_file_that_took_anothers_place_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\n")
    tail = Tail(path)
    assert tail.lines() == ["one"]
    (tmp_path / "new").write_text("1\n2\n3\n")
    (tmp_path / "new").replace(path)
    assert tail.lines() == ["1", "2", "3"]


def test_a_long_curve_is_of_means() -> None:
    """1300 steps: means of two would be 650 points, of four 325; the k-th is (4 k + 1 + ... + 4 k + 4) / 4 = 4 k + 2.5."""
    curve = Curve()
    for step in range(1, 1301):
        curve.add(step, float(step), 2)
        assert len(curve.points()) <= MOST_POINTS
    assert curve.points() == tuple((4 * k + 4, 4 * k + 2.5) for k in range(325))
    assert curve.tokens() == 2600
    curve.add(1299, 0.0, 2)
    assert curve.points()[-2:] == ((1296, 1294.5), (1299, 0.0)), "by whole points"
    idle = Curve()
    idle.add(1, None)
    idle.add(2, 3.0)
    assert idle.points() == ((2, 3.0),)


def test_merged_losses_are_of_one_island_and_in_order() -> None:
    make_run(RUN)
    for step in (1, 2, 3):
        more = {"eval_loss_merged": 3.0 - step} if step != 2 else {}
        write_lines(RUN, [record(1, step, **more), record(0, step, **more)])
    assert Reader(RUN).read().merged == ((1, 2.0), (3, 0.0))


def of(*overrides: str, **job: object) -> dict[tuple[int, int], float] | None:
    found = links(resolved(parse_job(dict(job), overrides)))
    return None if found is None else {(at.sender, at.receiver): at.share for at in found}


def test_links_are_those_of_the_topology() -> None:
    pairs = {(a, b): 1 / 3 for a in range(4) for b in range(4) if a != b}
    assert of("islands.count=4", "sync.recipe=local") == {}
    assert of("islands.count=4") == pairs, "all-to-all"
    assert of("islands.count=4", "sync.recipe=noloco") == pairs, "drawn evenly"
    ring = {(a, (a + d) % 4): 1 / 2 for a in range(4) for d in (1, 3)}
    assert of("islands.count=4", "sync.recipe=choco") == ring
    assert of("islands.count=4", "sync.recipe=dpsgd", "sync.topology=one_peer_ring") == ring, "two rounds, a half each"
    ways = {(a, (a + d) % 4): 1 / 2 for a in range(4) for d in (1, 2)}
    assert of("islands.count=4", "sync.recipe=dpsgd", "sync.topology=one_peer_exponential") == ways
    one_way = {(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}
    assert of("islands.count=3", "sync.recipe=push_sum", "sync.graph=cycle") == one_way
    assert of("islands.count=21") is None, "420 links"
    script = parse_job({}, ["islands.count=2"])
    assert links(script) == (Link(0, 1, 1.0), Link(1, 0, 1.0)), "which recipe it takes is not known here"


def test_two_levels_have_near_links_and_far_ones() -> None:
    assert of("islands.count=4", **TWO_LEVELS) == {(a, b): 1.0 for a in range(4) for b in (a ^ 1, (a + 2) % 4)}
    make_run(RUN, "islands.count=4", job=TWO_LEVELS)
    write_lines(RUN, (record(0, t, wire_bytes_sent_near=900 * t) for t in range(1, 21)))
    status_file(RUN, 0).update("training", 20)
    state = Reader(RUN).read()
    assert state.recipe == "dpsgd + diloco"
    assert state.links is not None
    rates = {(at.sender, at.receiver): state.bytes_per_s(at) for at in state.links}
    assert (rates[0, 1], rates[0, 2], rates[1, 0]) == (450.0, 50.0, None)
    assert state.islands[0].view.wire_bytes_per_s == 500.0


def test_a_run_that_was_replaced_is_read_anew() -> None:
    training_run(RUN)
    reader = Reader(RUN)
    reader.read()
    RUN.rename("old")
    with pytest.raises(ValueError, match=r"^runs/watched holds no run any more$"):
        reader.read()
    make_run(RUN, "islands.count=5")
    assert len(reader.read().islands) == 5


def quiet_since(run: Path, time_s: float) -> None:
    for path in (path_of(run), run / "job.toml"):
        os.utime(path, (time_s, time_s))


def test_left_out_it_is_the_newest_run_that_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "status").startswith("there is no run in runs; start one with dtrain run JOB.toml")
    for second, name in enumerate(("first", "second", "third", "last")):
        make_run(Path("runs", name))
        if name in ("third", "last"):
            launcher_gone(Path("runs", name))
        quiet_since(Path("runs", name), second)
    assert newest_run(Path("runs")).name == "second"
    for name in ("first", "second"):
        launcher_gone(Path("runs", name))
        os.utime(path_of(Path("runs", name)), (0, 0))
    assert newest_run(Path("runs")).name == "last"
    assert run_command(["status"]) == 0
    assert capsys.readouterr().out.startswith("runs/last: the launcher (process ")


def test_a_launcher_that_nobody_can_see_counts_as_long_as_its_run_changes() -> None:
    """On a shared disk it may be alive on another machine; one that died with its machine would count for ever."""
    make_run(Path("runs/lost"))
    word = json.loads(path_of(Path("runs/lost")).read_text())
    path_of(Path("runs/lost")).write_text(json.dumps(word | {"machine": "an earlier boot"}))
    site_run(Path("runs/site-island1"), 1)
    quiet_since(Path("runs/lost"), time.time() - LATELY_S / 2)
    assert newest_run(Path("runs")).name == "lost"
    quiet_since(Path("runs/lost"), time.time() - 2 * LATELY_S)
    assert newest_run(Path("runs")).name == "site-island1"
    make_run(Path("runs/quiet"))  # by this process, which can be seen
    quiet_since(Path("runs/quiet"), 0)
    assert newest_run(Path("runs")).name == "quiet"


def test_a_run_of_another_version_is_no_obstacle(capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs/good"))
    make_run(Path("runs/old"))
    path_of(Path("runs/old")).write_text('{"pid": 1}')
    assert newest_run(Path("runs")).name == "good"
    assert refused(capsys, "status", "runs/old").startswith("runs/old/logs/launcher.json is no word of this launcher")
    Path("runs/good/job.toml").unlink()
    assert refused(capsys, "status").startswith("runs/old/logs/launcher.json is no word of this launcher"), "there is no other"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["status", "none"], "none is no run folder (it holds no job.toml); name one, as in runs/quickstart"),
        (["status", "--once", "--web"], "--once and --web exclude each other"),
        (["status", "--port", "8080"], "--port 8080 has no effect without --web"),
        (["status", "--web", "--port", "70000"], "Invalid value for '--port'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert refused(capsys, *arguments).startswith(said)


def test_in_a_pipe_it_is_a_line_an_island(capsys: pytest.CaptureFixture[str]) -> None:
    training_run(RUN)
    assert run_command(["status", str(RUN)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "runs/watched: running; 3 islands, choco",
        "in training for 40 s; all links carry 1.38 kB/s; last commit at step 10",
        "the merged model's loss is 4.125 at step 10",
        "lost and started again: island 1 1x",
        "island 0: waiting for island 2, 10 s of 300, step 20/3000, loss 5.980, 64 tokens/s, sent 20 kB at 375 B/s, waited 10 s",
        "island 1: training, step 19/3000, loss 4.981, 64 tokens/s, sent 19 kB at 500 B/s, waited 9.5 s",
        "island 2: training, step 20/3000, loss 3.500, 64 tokens/s, sent 20 kB at 500 B/s, waited 10 s",
    ]


def test_a_page_has_no_more_lines_than_the_terminal() -> None:
    make_run(RUN, "islands.count=20")
    write_lines(RUN, (record(i, 1, wait_s=7000.0, wire_bytes_sent=123_000_000, tokens_per_s=1_234_567.0) for i in range(20)))
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    state = Reader(RUN).read()
    console.print(page(state, 80, 24))
    assert len(out.getvalue().splitlines()) <= 24
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "and " in out.getvalue().splitlines()[-1]


def test_on_a_terminal_it_ends_with_the_run() -> None:
    word, out = training_run(RUN), io.StringIO()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            word.end(130, "stopped at step 19")

    watch(Reader(RUN), Console(file=out, width=80, height=24, force_terminal=True, color_system=None), sleep)
    assert len(slept) == 3
    assert "runs/watched: running; 3 islands, choco" in out.getvalue()
    assert "waiting for island 2, 10 s of 300" in out.getvalue()
    last = out.getvalue().rpartition("runs/watched: ")[2]
    assert last.startswith("ended with exit status 130: stopped at step 19")
    assert "waiting" not in last


def test_ctrl_c_is_the_way_to_end_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    training_run(RUN)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal's
    monkeypatch.setattr("time.sleep", interrupted)
    assert run_command(["status", str(RUN)]) == 0
    out, err = capsys.readouterr()
    assert "island 2" in out
    assert err == ""


def test_it_does_not_wait_for_torch() -> None:
    training_run(RUN)
    probe = (
        "import sys; from dtrain.launch.cli import run_command; status = run_command(['status']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", probe], env=environment, check=False, timeout=60).returncode == 0

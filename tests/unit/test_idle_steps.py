"""Does a job whose islands are of unequal speed count what it trained, go on after any step, and keep nobody waiting?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dtrain import checkpoint
from dtrain.config import dump_job
from dtrain.launch.checks import read_job, resolved
from dtrain.launch.cli import run_command
from dtrain.launch.resume import resumed_job
from dtrain.virtual_run import simulate_job
from tests.unit.by_hand import job_of, lines_of, part_of, same, train, weights_of, write_texts

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDS = ("sync.recipe=async_diloco", "sync.every=4", "sync.delay=3", "islands.speeds=[1, 0.5]", "train.steps=9")


@pytest.mark.parametrize("after", [5, 6])
def test_a_run_goes_on_between_idle_steps_to_the_bit(tmp_path: Path, after: int) -> None:
    """Of a round that lands with the next step, and on island 1 with steps 2, 4, 6 and 8 idle: from the end of step 5, before an
    idle one, and from the end of 6, before one that is none."""
    texts = write_texts(tmp_path / "texts")
    often = (f"sync.delay={after - 3}", f"train.checkpoint_every={after}")
    job = job_of(texts, *ROUNDS, *often, "train.eval_every=2", "train.consensus_every=4")
    whole, again = train(job, tmp_path / "whole"), tmp_path / "again"
    shutil.copytree(checkpoint.step_folder(whole, after), checkpoint.step_folder(again, after))
    train(job, again, resume_step=after)
    for island in range(2):
        assert same(weights_of(again, island), weights_of(whole, island))
        late = [line.get("loss") for line in lines_of(whole, island) if line["step"] > after]
        assert [line.get("loss") for line in lines_of(again, island)] == late
    lines = [lines_of(whole, island) for island in range(2)]
    assert [[line["step"] for line in each] for each in lines] == [list(range(1, 10))] * 2
    assert [line["step"] for line in lines[1] if "loss" in line] == [1, 3, 5, 7, 9]
    assert len({line["loss"] for line in lines[1] if "loss" in line}) == 5
    assert [line["tokens"] for line in lines[1]] == [64, 0] * 4 + [64]
    assert [line["step"] for line in lines[1] if "eval_loss" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in lines[1] if "consensus_distance" in line] == [4, 8]
    assert [line["lr"] for line in lines[0]] == [line["lr"] for line in lines[1]], "of the job's steps, idle or not"
    for run in (whole, again):
        assert [part_of(run, island).tokens for island in range(2)] == [9 * 64, 5 * 64], "all from step 0, of those trained"
        assert part_of(run, 0).wire_bytes_sent == part_of(run, 1).wire_bytes_sent > 0


def test_islands_of_unequal_speed_end_each_round_together(tmp_path: Path) -> None:
    """On the virtual clock, whose steps take an island of half the speed twice as long. Rounds are waited for and the link takes
    no time, so what is waited is the rounding of seconds."""
    base = (
        "sim.problem=quadratic", "sim.numel=8", "sim.step_s=0.25", "islands.count=3", "train.steps=12", "sync.recipe=diloco",
        "sync.every=4", "train.lr=0.01",
    )  # fmt: skip
    found = simulate_job(job_of(tmp_path, *base, "islands.speeds=[1, 0.5, 0.3]"))
    half, third = 3 * 2 * 0.25 / 0.5, 3 * 1 * 0.25 / 0.3
    assert [account.compute_s for account in found.accounts] == pytest.approx([3.0, half, third])
    assert half == 3.0, "floor(4 / 2) steps of twice the seconds"
    assert [account.waited_s for account in found.accounts] == pytest.approx([0.0, 0.0, 3.0 - third], abs=1e-9)
    assert found.virtual_s == pytest.approx(3.0)


def test_a_resumed_run_names_speeds_anew_with_the_number_of_its_islands(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.toml").write_text(dump_job(resolved(job_of(write_texts(tmp_path / "texts"), *ROUNDS))))
    assert resumed_job(run, []).islands.speeds == [1.0, 0.5]
    assert resumed_job(run, ["islands.count=3", "islands.speeds=[0.5, 1, 0.5]"]).islands.speeds == [0.5, 1.0, 0.5]
    with pytest.raises(ValueError, match="names 2 islands, and there are 3"):
        resumed_job(run, ["islands.count=3"])
    with pytest.raises(ValueError, match=r"^islands\.speeds = \[1\.0, 0\.75\] differs from the run's \[1\.0, 0\.5\]"):
        resumed_job(run, ["islands.speeds=[1, 0.75]"])


@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        ("sim", ("sync.every=1", "sync.delay=0"), "islands.speeds = [1, 0.5] is for rounds that are many steps apart"),
        ("run", ("islands.count=3",), "islands.speeds = [1, 0.5] names 2 islands, and there are 3; give a speed for each"),
        ("plan", (), "islands.speeds = [1.0, 0.5] has no effect with dtrain plan"),
        ("run", ("--", "script.py"), "on a script, which says it itself by dtrain.join(speeds=...)"),
    ],
)
def test_a_command_refuses_speeds_that_say_nothing_there(
    command: str, changes: tuple[str, ...], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text("[islands]\nspeeds = [1, 0.5]\n[sync]\nevery = 4\ndelay = 1\n")
    Path("script.py").write_text("")
    link = ("--link", "10mbit", "--rtt", "1ms", "--step-time", "10ms") if command == "plan" else ()
    assert run_command([command, "job.toml", *link, *changes]) == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()
    assert read_job(Path("job.toml"), ["islands.speeds=[0.25, 1.0]"]).islands.speeds == [0.25, 1.0]

"""Does a run go on from where it was, whenever it was killed, and is what a person asks for done or refused?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dtrain import checkpoint
from dtrain.config import load_job
from dtrain.launch.cli import run_command
from tests.unit.small_run import commit, finish, killed_anywhere, opened, refused, write_job_file, write_metrics


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


def test_resume_goes_on_from_the_newest_commit_and_cuts_the_metrics_back() -> None:
    run = opened("train.lr=0.1").run
    write_metrics(run, 15)
    commit(run, 5, 2)
    commit(run, 10, 2)
    checkpoint.save_island(run, 15, 0, {"model.w": torch.zeros(1)}, rank=0, num_ranks=1)
    again = opened("train.steps=40", "link.rate=1mbit", resume=True)
    assert (again.resume_step, again.job.train.steps, again.job.train.lr) == (10, 40, 0.1)
    assert load_job(run / "job.toml") == again.job
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10
    assert not checkpoint.step_folder(run, 15).exists(), "island 1 never wrote it"
    slower = "train.steps is 40, was 20: the learning rate follows the schedule of the new length from here on"
    assert again.notes[:2] == (slower, "resuming from step 10")
    assert "kept as the run has it, not as the job file says: train.lr" in again.notes


def test_a_run_goes_on_whose_file_is_older_than_a_key() -> None:
    run = opened().run
    commit(run, 5, 2)
    file = run / "job.toml"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("alpha =", "feedback_decay =", "landing ="))]
    assert len(kept) == len(lines) - 3
    file.write_text("".join(kept), encoding="utf-8")
    assert opened(resume=True).resume_step == 5


def test_a_checkpoint_that_all_islands_wrote_counts_though_the_launcher_died_before_it_said_so() -> None:
    run = opened().run
    for island in range(2):
        checkpoint.save_island(run, 5, island, {"model.w": torch.zeros(1)}, rank=0, num_ranks=1)
    assert opened(resume=True).resume_step == 5


def test_without_a_checkpoint_resume_says_that_it_starts_at_zero() -> None:
    run = opened().run
    write_metrics(run, 3)
    again = opened(resume=True)
    assert (again.resume_step, again.notes) == (0, ("there is no checkpoint yet: starting from step 0",))
    assert (run / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("budget", [("sync.recipe=dpsgd", "sync.schedule=budget:25%"), ("sync.recipe=single_merge",)])
def test_resume_refuses_to_spread_a_budget_over_other_steps(capsys: pytest.CaptureFixture[str], budget: tuple[str, ...]) -> None:
    commit(opened(*budget).run, 5, 2)
    said = refused(capsys, "run", "job.toml", "--resume", "train.steps=40")
    assert said.startswith("train.steps = 40 differs from the run's 20, over which sync.schedule = \"budget:")
    assert opened("train.steps=20", "link.rate=1mbit", resume=True).resume_step == 5


@pytest.mark.parametrize(
    "change", ["model.layers=9", "job.seed=1", "data.source=.", "sync.every=10", "train.lr=1e-2", "islands.ranks=2"]
)
def test_resume_refuses_what_would_be_another_run(capsys: pytest.CaptureFixture[str], change: str) -> None:
    commit(opened().run, 5, 2)
    assert refused(capsys, "run", "job.toml", "--resume", change).startswith(f"{change.partition('=')[0]} = ")


def test_another_number_of_islands_starts_from_the_merged_weights() -> None:
    run = opened().run
    write_metrics(run, 9)
    commit(run, 5, 2)
    again = opened("islands.count=3", resume=True)
    assert (again.resume_step, again.job.islands.count) == (5, 3)
    assert "dropped: inner optimizer state" in again.notes[0]
    assert checkpoint.load_weights(run / "init.safetensors")["w"].tolist() == [0.5]
    assert (run / "checkpoints.islands2" / "step_00000005" / "COMMIT").exists()
    assert opened(resume=True).resume_step == 5, "killed before its first checkpoint, it starts from the merged weights again"
    commit(run, 10, 3)
    assert opened(resume=True).resume_step == 10


def test_a_kill_while_islands_are_regrouped_loses_nothing_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened().run
    write_metrics(run, 9)
    commit(run, 5, 2)
    checkpoint.save_island(run, 10, 0, {"model.w": torch.zeros(1)}, rank=0, num_ranks=1)  # island 1 has not written it
    for _ in killed_anywhere(run, lambda: opened("islands.count=3", resume=True), monkeypatch):
        shutil.copytree(run, "killed")
        again = opened(resume=True)
        assert again.resume_step == 5
        assert any("dropped: inner optimizer state" in note for note in again.notes) == (again.job.islands.count == 3)
        assert checkpoint.newest_commit(run) == (5 if again.job.islands.count == 2 else None)
        shutil.rmtree(run)
        shutil.move("killed", run)
        again = opened("islands.count=3", resume=True)
        assert (again.resume_step, again.job.islands.count) == (5, 3)
        assert any("merged weights of 2 islands at step 5; dropped" in note for note in again.notes)
        assert checkpoint.load_weights(run / "init.safetensors")["w"].tolist() == [0.5]


def test_fewer_islands_never_take_a_step_that_only_some_had_written(monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened("islands.count=3").run
    commit(run, 5, 3)
    for island in range(2):  # all that two islands need, and island 2 had not written it
        checkpoint.save_island(run, 10, island, {"model.w": torch.zeros(1)}, rank=0, num_ranks=1)
    for _ in killed_anywhere(run, lambda: opened("islands.count=2", resume=True), monkeypatch):
        assert opened("islands.count=2", resume=True).resume_step == 5


def test_a_start_from_merged_weights_always_says_what_was_dropped() -> None:
    run = opened().run
    commit(run, 5, 2)
    notes = opened("islands.count=3", resume=True).notes
    assert notes == (checkpoint.merged_note(run / "init.safetensors"), "resuming from step 5")
    assert opened("islands.count=3", resume=True).notes == notes


@pytest.mark.parametrize("command", ["run", "sim"])
@pytest.mark.parametrize("kept", [True, False])
def test_a_finished_run_shows_what_came_out_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, kept: bool
) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("an island was started")

    monkeypatch.setattr("dtrain.launch.local.run_local", started)
    monkeypatch.setattr("dtrain.launch.simulated.run_simulated", started)
    run = opened().run
    finish(run, 20)
    if kept:
        commit(run, 20, 2)
    for name in ("summary.json", "loss.png"):
        (run / name).unlink()
    before = (run / "metrics.jsonl").read_bytes()
    assert run_command([command, "job.toml", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "all 20 steps are done" in out
    assert "Bytes an island sent" in out
    assert (run / "metrics.jsonl").read_bytes() == before
    assert all((run / name).exists() for name in ("summary.json", "loss.png", "model.safetensors", "job.toml"))


def test_a_run_of_which_one_island_had_not_ended_is_not_finished() -> None:
    run = opened().run
    finish(run, 20)
    (run / "logs" / "island1" / "part.json").unlink()
    assert not opened(resume=True).finished


@pytest.mark.parametrize("change", ["train.steps=40", "islands.count=3"])
def test_a_finished_run_without_a_checkpoint_is_not_thrown_away(capsys: pytest.CaptureFixture[str], change: str) -> None:
    run = opened("train.checkpoint_every=0").run
    finish(run, 20)
    line = refused(capsys, "run", "job.toml", change, "--resume")
    assert line.startswith("runs/small ended at step 20 and kept no checkpoint to go on from")
    assert "--fresh" in line


def test_what_an_earlier_end_left_does_not_pass_for_the_result_of_a_run_that_goes_on() -> None:
    run = opened().run
    finish(run, 20)
    commit(run, 20, 2)
    (run / "notes.txt").touch()
    assert opened("train.steps=40", resume=True).resume_step == 20
    left = [".lock", "checkpoints", "job.toml", "logs", "metrics.jsonl", "notes.txt"]
    assert sorted(path.name for path in run.iterdir()) == left


@pytest.mark.parametrize("ended", [True, False])
def test_fewer_steps_than_the_run_has_behind_it_are_refused(capsys: pytest.CaptureFixture[str], ended: bool) -> None:
    run = opened("train.steps=40").run
    if ended:
        finish(run, 40)
    else:
        commit(run, 40, 2)
    line = refused(capsys, "run", "job.toml", "train.steps=10", "--resume")
    assert line.startswith("train.steps = 10 is less than the 40 steps that runs/small has behind it; use 40 or more")


def test_another_number_of_threads_is_said_to_change_last_bits() -> None:
    commit(opened().run, 5, 2)
    said = "islands.threads is 3, was 0: results may differ in the last bits"
    assert opened("islands.threads=3", resume=True).notes == (said, "resuming from step 5")


def test_a_folder_that_was_renamed_is_resumed_by_its_own_job_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("book.txt").write_text("text " * 10_000)
    run = opened("data.source=book.txt").run
    commit(run, 5, 2)
    (run / "logs" / "island0").mkdir(parents=True)
    run.rename("renamed")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for job_file in (Path("../renamed/job.toml"), tmp_path / "renamed" / "job.toml"):
        again = opened(job_file=job_file, resume=True)
        assert (again.run, again.resume_step, again.notes) == (job_file.parent, 5, ("resuming from step 5",))
        assert again.job.data.source == str(tmp_path / "book.txt")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_job_file_beside_a_folder_of_ones_own_logs_is_no_run() -> None:
    Path("logs").mkdir()
    commit(opened().run, 5, 2)
    before = Path("job.toml").read_bytes()
    assert opened(resume=True).run == Path("runs/small")
    assert Path("job.toml").read_bytes() == before


def test_models_of_another_number_of_islands_are_removed() -> None:
    run = opened().run
    finish(run, 20)
    commit(run, 20, 2)
    assert opened("islands.count=1", resume=True).resume_step == 20
    assert not (run / "islands").exists(), "there is no island 1 any more"

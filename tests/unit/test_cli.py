"""Is every command line understood or refused with one line, and is a run never written over?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain import checkpoint, launch
from dtrain.config import Job, load_job
from dtrain.launch.cli import run_command
from dtrain.launch.run_folder import Choice, Opened, open_run
from dtrain.recipes import DEFAULT_RECIPE, RECIPES

PACKAGE_ROOT = Path(dtrain.__file__).parents[1]
QUICKSTART = Path(launch.__file__).parent / "jobs" / "quickstart.toml"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(
        '[job]\nname = "small"\n[islands]\ncount = 2\n[train]\nsteps = 20\n[sync]\nevery = 5\ndelay = 0\n'
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits 2 and writes nothing."""
    before = sorted((path, path.is_file() and path.read_bytes()) for path in Path().rglob("*"))
    assert run_command(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dtrain: ")
    assert err.count("\n") == 1
    assert sorted((path, path.is_file() and path.read_bytes()) for path in Path().rglob("*")) == before
    return err.removeprefix("dtrain: ").strip()


def opened(*overrides: str, **choice: bool) -> Opened:
    with open_run(Path("job.toml"), overrides, Choice(**choice)) as run:
        return run


def commit(run: Path, step: int, num_islands: int) -> None:
    """A checkpoint as the islands and the launcher leave it; island i's only weight is i."""
    for island in range(num_islands):
        checkpoint.save_island(run, step, island, {"model.w": torch.tensor([float(island)])}, rank=0, num_ranks=1)
    checkpoint.commit_ready(run, num_islands, keep=2)


def write_metrics(run: Path, steps: int) -> None:
    lines = [json.dumps({"step": step, "island": 0, "loss": 1.0}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_help_is_quick_and_names_the_first_commands() -> None:
    probe = (
        "import sys; from dtrain.launch.cli import run_command; status = run_command(['--help']); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run([sys.executable, "-c", probe], env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for words in ("slow link", "dtrain run launch/jobs/quickstart.toml", "dtrain report runs/quickstart", "dtrain recipes"):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "job.toml", "sync.evry=5"], "job.toml: unknown key sync.evry; did you mean 'every'?"),
        (["run", "job.toml", "snyc.every=5"], "job.toml: unknown section [snyc]; did you mean 'sync'?"),
        (["run", "job.toml", "islands.count=0"], "job.toml: islands.count = 0 is not allowed"),
        (["run", "job.toml", "train.steps=many"], "job.toml: train.steps = 'many' is not allowed"),
        (["run", "job.toml", "resume"], "'resume' is not an override; write section.key=value"),
        (["run", "job.toml", "sync.delay=9"], "sync.delay = 9 is longer than sync.every = 5"),
        (["run", "job.toml", "sync.recipe=choco", "islands.count=1"], 'sync.topology = "ring" needs at least'),
        (["run", "job.toml", "data.source=not/there"], 'data.source = "not/there" is not there'),
        (["run", "no.toml"], "no job file at no.toml"),
        (["run", "."], ". is a folder"),
        (["run", "job.toml", "--resume"], "runs/small holds no run to resume"),
        (["run", "job.toml", "--resume", "--fresh"], "--resume, --fresh and --fresh-name exclude each other"),
        (["run", "job.toml", "job.dir=job.toml"], "the run folder job.toml/small cannot be written: Not a directory"),
        (["run", "job.toml", "job.dir=/proc"], "the run folder /proc/small cannot be written"),
        (["run", "job.toml", "--", "no.py"], "no script at no.py"),
        (["sim", "job.toml", "--", "no.py"], "only dtrain run takes a script"),
        (["sim", "job.toml", "--islands", "0"], "Invalid value for '--islands'"),
        (["run", "job.toml", "--no-such-flag"], "No such option: --no-such-flag"),
        (["rnu", "job.toml"], "No such command 'rnu'"),
        (["recipes", "--show", "dilco"], "recipe 'dilco' is not known; use one of"),
        (["report", "runs/none"], "runs/none is no run folder"),
        (["eval", "runs/none"], "runs/none is not a run folder"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert refused(capsys, *arguments).startswith(said)


def test_a_run_is_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    run = opened().run
    write_metrics(run, 3)
    assert refused(capsys, "run", "job.toml").startswith("runs/small holds a run already; go on with --resume")
    assert refused(capsys, "sim", "job.toml").startswith("runs/small holds a run already")


def test_fresh_removes_the_run_and_leaves_what_is_not_its_own() -> None:
    run = opened().run
    write_metrics(run, 3)
    commit(run, 2, 2)
    (run / "my-notes.txt").write_text("mine")
    assert opened("train.steps=7", fresh=True).job.train.steps == 7
    assert sorted(path.name for path in run.iterdir()) == ["job.toml", "my-notes.txt"]


def test_a_folder_that_is_no_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/thesis.tex").write_text("years of work")
    for flags in ([], ["--fresh"]):
        assert refused(capsys, "run", "job.toml", *flags).startswith("runs/small is not empty and holds no run")


def test_fresh_name_takes_the_next_free_one() -> None:
    assert [opened(fresh_name=True).run.name for _ in range(3)] == ["small", "small-2", "small-3"]
    assert load_job(Path("runs/small-3/job.toml")).job.name == "small-3"


def test_a_run_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(Path("job.toml"), [], Choice()):
        for flag in ("--resume", "--fresh"):
            assert refused(capsys, "run", "job.toml", flag).startswith("runs/small is in use by another dtrain")


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
    assert "resuming from step 10" in again.notes
    assert "kept as the run has it, not as the job file says: train.lr" in again.notes


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


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)
    assert f"{DEFAULT_RECIPE} (default)" in out
    assert run_command(["recipes", "--show", "diloco"]) == 0
    assert "outer_momentum" in capsys.readouterr().out


def test_the_quickstart_is_small_and_leaves_the_recipe_to_the_default() -> None:
    job = load_job(QUICKSTART)
    assert isinstance(job, Job)
    assert job.sync.model_dump(exclude_none=True) == {}
    assert (job.islands.count, job.link.rate, job.link.rtt) == (2, "10mbit", "20ms")
    assert job.train.steps >= 1500

"""Is a run never written over, and is nothing deleted that a person did not give up?"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import dtrain
from dtrain.config import load_job
from dtrain.launch.cli import run_command
from dtrain.launch.run_folder import Choice, open_part, open_run
from tests.unit.small_run import RUN, commit, finish, killed_anywhere, opened, refused, write_job_file, write_metrics


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


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
    assert sorted(path.name for path in run.iterdir()) == [".lock", "job.toml", "my-notes.txt"]


def test_a_kill_inside_fresh_leaves_a_run_that_fresh_and_resume_take(monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened().run
    commit(run, 5, 2)
    finish(run, 10)
    for _ in killed_anywhere(run, lambda: opened(fresh=True), monkeypatch):
        shutil.copytree(run, "killed")
        assert opened(resume=True).resume_step in (0, 5)
        shutil.rmtree(run)
        shutil.move("killed", run)
        assert opened(fresh=True).resume_step == 0
        assert sorted(path.name for path in run.iterdir()) == [".lock", "job.toml"]


def test_fresh_removes_what_a_kill_left_half_written() -> None:
    run = opened().run
    finish(run, 5)
    for name in (".metrics.jsonl.77", ".summary.json.77", ".loss.png.77", ".job.toml.77", ".writing-model.safetensors"):
        (run / name).touch()
    (run / "best.safetensors").write_text("mine")
    opened(fresh=True)
    assert sorted(path.name for path in run.iterdir()) == [".lock", "best.safetensors", "job.toml"]


def test_a_launch_killed_before_it_wrote_its_first_job_can_be_started_again() -> None:
    RUN.mkdir(parents=True)
    (RUN / ".job.toml.77").write_text("[jo")
    opened()
    assert sorted(path.name for path in RUN.iterdir()) == [".lock", "job.toml"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "data.source=gone.txt"], 'data.source = "gone.txt" does not exist'),
        (["run", "data.source=short.txt"], 'data.source = "short.txt" holds out 3 tokens, too few for model.context = 128'),
        (["run", "data.source=texts", "islands.count=3", "islands.shard=by_file"], 'islands.shard = "by_file" needs'),
        (["run", "link.port=1", "link.interface=nope0"], "link.interface = 'nope0' is not an interface"),
        (["run", "link.transport=nccl"], 'link.transport = "nccl" needs CUDA GPUs'),
        (["sim", "islands.ranks=2"], "islands.ranks = 2: dtrain sim gives every virtual island one rank"),
        (
            ["sim", "islands.ranks=2", "islands.engine=pipeline", "train.accumulate=2"],
            "islands.ranks = 2: dtrain sim gives every virtual island one rank; use islands.ranks=1 and islands.engine=ddp",
        ),
        (["sim", "data.source=short.txt"], 'data.source = "short.txt" holds out 3 tokens'),
    ],
)
def test_bad_input_with_fresh_leaves_the_old_run_as_it_was(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Path("short.txt").write_text("x" * 140)
    Path("texts").mkdir()
    for number in range(3):
        Path("texts", f"{number}.txt").write_text("text " * 100)
    command, *changes = arguments
    finish(opened().run, 5)
    assert refused(capsys, command, "job.toml", *changes, "--fresh").startswith(said)
    Path("none.toml").write_text('[job]\nname = "none"\n')
    assert refused(capsys, command, "none.toml", *changes).startswith(said), "and no folder is made for it"


def test_a_port_that_is_taken_leaves_the_old_run_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    finish(opened().run, 5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = f"link.port={taken.getsockname()[1]}"
        assert "cannot be opened on 127.0.0.1" in refused(capsys, "run", "job.toml", port, "--fresh")


def test_a_run_is_begun_without_torch(tmp_path: Path) -> None:
    """Importing it takes 2 s, in which the islands are already on their way."""
    probe = (
        "import sys; from pathlib import Path; from dtrain.launch.run_folder import Choice, open_run\n"
        "with open_run(Path('job.toml'), [], Choice()): sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(dtrain.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", probe], env=environment, check=False, timeout=60).returncode == 0
    assert (tmp_path / "runs" / "small" / "job.toml").exists()


def test_the_run_keeps_the_absolute_path_of_its_text(tmp_path: Path) -> None:
    Path("book.txt").write_text("text " * 10_000)
    run = opened("data.source=book.txt").run
    assert load_job(run / "job.toml").data.source == str(tmp_path / "book.txt")
    assert opened("data.source=book.txt", resume=True).notes == ("there is no checkpoint yet: starting from step 0",)


def test_a_folder_that_is_no_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/thesis.tex").write_text("years of work")
    for flags in ([], ["--fresh"]):
        assert refused(capsys, "run", "job.toml", *flags).startswith("runs/small is not empty and holds no run")


def test_fresh_name_takes_the_next_free_one() -> None:
    assert [opened(fresh_name=True).run.name for _ in range(3)] == ["small", "small-2", "small-3"]
    assert load_job(Path("runs/small-3/job.toml")).job.name == "small-3"


def test_a_simulation_takes_the_next_free_name_too() -> None:
    small = ("sim.problem=consensus", "sim.numel=4", "sync.recipe=fedavg", "sync.every=5")
    for name in ("small", "small-2"):
        assert run_command(["sim", "job.toml", *small, "--fresh-name"]) == 0
        assert load_job(Path("runs", name, "job.toml")).job.name == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("sync.every=21",), "(sync.every = 21): the islands talk only in the last merge"),
        (("sync.every=21", "sim.problem=quadratic"), "(sync.every = 21): the islands never talk"),
        (("sync.every=84", "sync.fragments=4"), "(sync.every = 84): the islands talk only in the last merge"),
        (("sync.every=80", "sync.fragments=4"), None),
        (("sync.every=20",), None),
        (("sync.recipe=local", "train.steps=1"), None),
    ],
)
def test_a_run_without_a_round_says_so_before_it_starts(changes: tuple[str, ...], said: str | None) -> None:
    with open_run(Path("job.toml"), changes, Choice(), how="sim") as opened:
        notes = tuple(note for note in opened.notes if not note.startswith("sync.recipe on the command line"))
        assert notes == (() if said is None else (f"train.steps = 20 ends before the first round {said}",))


def test_a_scripts_run_is_not_taken_for_one_of_the_jobs_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("script.py").write_text("")
    with open_run(Path("job.toml"), [], Choice(), how="script"):
        pass
    said = refused(capsys, "run", "job.toml", "--resume")
    assert said == "runs/small is a run of a script; to go on with it name it: --resume -- SCRIPT ARGS"
    assert refused(capsys, "report", "runs/small").startswith("runs/small is the run of a script")
    assert refused(capsys, "eval", "runs/small").startswith("runs/small is the run of a script")
    opened(fresh=True)
    said = refused(capsys, "run", "job.toml", "--resume", "--", "script.py")
    assert said == "runs/small is a run of the job's own model; to go on with it leave -- SCRIPT out"


def test_a_run_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with open_run(Path("job.toml"), [], Choice()):
        for flag in ("--resume", "--fresh"):
            assert refused(capsys, "run", "job.toml", flag).startswith("runs/small is in use by another dtrain")


def test_a_run_in_use_on_another_machine_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS a lock of a folder is this machine's own, and one of a file holds everywhere if it is open for writing."""
    of_files = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR
            of_files(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_run(Path("job.toml"), [], Choice()):
        for flag in ("--resume", "--fresh"):
            assert refused(capsys, "run", "job.toml", flag).startswith("runs/small is in use by another dtrain")
    with open_part(Path("job.toml"), (), Choice(), 1):
        said = refused(capsys, "run", "job.toml", "--island", "1", "--meet", "127.0.0.1:1", "--resume")
        assert said.startswith("runs/small-island1 is in use by another dtrain")


def test_a_folder_that_is_refused_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    RUN.mkdir(parents=True)
    (RUN / "notes.txt").touch()
    assert refused(capsys, "run", "job.toml").startswith("runs/small is not empty and holds no run")
    assert [path.name for path in RUN.iterdir()] == ["notes.txt"]

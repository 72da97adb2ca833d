"""Does a job run over a lab's links as it does over others, to the same bits, and are its bytes those that the kernel counts?

Real namespaces and queues: needs root, ip and tc. Each test has a lab beside others (DTRAIN_LAB)."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dtrain.config import Job, load_job
from dtrain.launch import lab, lab_net, lab_run
from dtrain.launch.cli import run_command
from dtrain.launch.lab import Counted, Lab, parse
from dtrain.launch.lab_link import Link
from dtrain.section import Section
from tests.dist.job import QUICKSTART, ROOT, SMALL, assert_same_weights, logs, run, steps_written, until
from tests.dist.lab_sockets import a_lab_of_its_own, needs_root
from tests.dist.test_readme_commands import SMALLER, commands, dtrain


@pytest.fixture(autouse=True)
def own_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with a_lab_of_its_own(monkeypatch):
        yield


def test_a_job_in_a_lab_has_the_labs_link(tmp_path: Path) -> None:
    """Keys that are typed come after, and win; two levels have two links of the lab's."""
    plain, late = (Lab(4, Link(1e7, 1e9, rtt_s=rtt), 2) for rtt in (0.0, 0.04))
    levels = ROOT / "launch" / "jobs" / "two_levels.toml"
    for path, there, typed in ((QUICKSTART, plain, ()), (levels, plain, ()), (levels, late, ("link.rate=5mbit",))):
        job = load_job(path, typed)
        inside = load_job(path, (*lab_run.link_keys(there, job), *typed))
        assert (inside.link.rate, inside.link.interface, inside.link.advertise) == ("5mbit" if typed else "none", "lab0", "")
        assert inside.link.rtt == ("0ms" if there is late else job.link.rtt)
        assert {level.rate for level in inside.sync.level or ()} <= {"none"}
        same = {name: getattr(job, name) for name in Job.model_fields if name not in ("link", "sync")}
        assert {name: getattr(inside, name) for name in same} == same
        assert [answers(a) for a in inside.sync.level or ()] == [answers(a) for a in job.sync.level or ()]


def answers(level: Section) -> dict[str, object]:
    return level.model_dump(exclude={"rate", "rtt"})


def test_bytes_are_shown_beside_those_that_the_run_says() -> None:
    before, after = [Counted(100, 50), Counted(0, 0)], [Counted(1150, 1050), Counted(2000, 3000)]
    assert lab_run.rows(before, after, [1000, None]) == [
        ["0", "1.05 kB", "1 kB", "1 kB", "1.050"],
        ["1", "2 kB", "3 kB", "-", "-"],
    ]


@needs_root
@pytest.mark.timeout(300)
def test_the_commands_of_the_readme_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    listed = [words[1:] for words in commands() if words[1] == "lab"]
    assert [words[1] for words in listed] == ["up", "run", "cut", "heal", "slow", "kill", "status", "down"]
    said = dict[str, str]()
    for words in listed:
        if words[1] == "run":  # in a process of its own, which moves into the lab
            said["run"] = dtrain(tmp_path, [*words, *SMALLER])
        else:
            assert run_command(words) == 0, capsys.readouterr().err
            said[words[1]] = capsys.readouterr().out
    assert (tmp_path / "runs" / "real" / "model.safetensors").exists()
    header, *counted = said["run"].splitlines()[-3:]
    assert " ".join(header.split()) == "at an island's interface sent received the run says it sent sent / said"
    assert [(line.split()[0], float(line.split()[-1]) >= 1514 / 1448) for line in counted] == [("0", True), ("1", True)]
    assert said["cut"] == "islands 0 and 1 are cut from each other; dtrain lab heal 0 1 joins them again\n"
    assert said["heal"] == "islands 0 and 1 hear each other\n"
    assert said["kill"] == "island 1: 0 processes ended\n"
    assert [line.split()[2] for line in said["status"].splitlines()[2:]] == ["10mbit", "1mbit"]
    assert said["down"] == "2 islands removed\n"


def lab_job(folder: Path, name: str, *overrides: str) -> list[str]:
    words = ["lab", "run", str(QUICKSTART), f"job.dir={folder}", f"job.name={name}", *overrides]
    return [sys.executable, "-m", "dtrain.launch", *words]


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_over_a_lab_ends_with_the_same_bits_and_its_bytes_are_those_of_the_interface(tmp_path: Path) -> None:
    """The quickstart as `make train` runs it, shorter: 24 steps of its own model, two rounds, one merge."""
    job = ("train.steps=24", "train.batch=1", "train.warmup=5", "train.eval_every=0", "train.checkpoint_every=0")
    job += ("sync.every=8", "sync.delay=2", "sync.codec=identity", "islands.threads=1")
    throttled = run(tmp_path, "throttled", *job, timeout_s=250)
    lab.up(parse(2, "10mbit"))
    command = lab_job(tmp_path, "real", *job)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr + logs(tmp_path / "real")
    assert "the lab's link in place of link.rate = 10mbit: 2 islands, 10 Mbit/s each way" in done.stdout
    assert_same_weights(throttled, tmp_path / "real")
    counted = done.stdout.splitlines()[-2:]
    assert [line.split()[0] for line in counted] == ["0", "1"]
    for line in counted:
        ratio = float(line.split()[-1])
        assert 1514 / 1448 <= ratio <= 1.06, f"{line}\nheaders of full frames are 4.6 %"
    parts = [json.loads((tmp_path / "real" / "logs" / f"island{i}" / "part.json").read_text()) for i in (0, 1)]
    says = parts[0]["wire_bytes_sent"] + parts[0]["wire_bytes_start"] + parts[0]["wire_bytes_merge"]
    assert counted[0].split()[-3:-1] == [f"{says / 1e6:.3g}", "MB"]
    assert not any(lab_net.processes([lab.hub(), *map(lab.namespace, (0, 1))]).values())


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cut_is_waited_out_and_a_killed_island_comes_back(tmp_path: Path) -> None:
    """A step's exchange takes a quarter of a second of the link, so that the job is still under way when it is cut."""
    job = (*SMALL, "train.steps=100", "train.checkpoint_every=20", "sync.recipe=dpsgd", "train.batch=4")
    calm = run(tmp_path, "calm", *job, timeout_s=250)
    lab.up(parse(2, "5mbit"))
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            lab_job(tmp_path, "rough", *job), cwd=ROOT, stdout=out, stderr=out, text=True, stdin=subprocess.DEVNULL
        )
        said = tmp_path / "out"
        until(lambda: steps_written(tmp_path / "rough") >= 50, "50 lines of metrics")
        lab.cut(0, 1)
        until(lambda: re.search(r"waiting for island \d, [2-9] s", said.read_text()) is not None, "a wait to be shown")
        lab.heal(0, 1)
        until(lambda: steps_written(tmp_path / "rough") >= 100, "100 lines of metrics")
        assert lab.kill(1) >= 2, "torchrun and a rank"
        process.wait(timeout=300)
    assert process.returncode == 0, said.read_text() + logs(tmp_path / "rough")
    assert "island 1 was lost and is started again" in said.read_text()
    assert_same_weights(calm, tmp_path / "rough")
    lab.down()


@needs_root
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_down_ends_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    job = (*SMALL, "train.steps=2000", "train.checkpoint_every=0")
    lab.up(parse(2, "10mbit"))
    process = subprocess.Popen(
        lab_job(tmp_path, "ended", *job), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: steps_written(tmp_path / "ended") >= 2, "2 lines of metrics")
    assert lab.down()[0] == "2 islands removed"
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"resume with: dtrain lab run {tmp_path / 'ended' / 'job.toml'} --resume" in said

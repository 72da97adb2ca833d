"""Are islands that their sites start, by hand or over ssh, what they are on one machine? To the bit, also where one is lost."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dtrain import checkpoint, metrics
from dtrain.launch.cli import run_command
from tests.dist.job import QUICKSTART, ROOT, SMALL, descendants, final_weights, kill_tree, logs, started, steps_written, until
from tests.dist.sshd import running_sshd, skip_without_sshd

STEPS = 90
ALIKE = (*SMALL, f"train.steps={STEPS}", "train.checkpoint_every=30", "sync.every=10", "sync.delay=5", "train.batch=4")
NEAR = ("link.interface=lo", "link.port=0")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the job ends with on one machine; in this process, which is quicker and the same to the bit (test_same_bits)."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_command(["sim", str(QUICKSTART), f"job.dir={folder}", "job.name=calm", *ALIKE]) == 0
    return final_weights(folder / "calm")


def commands() -> list[list[str]]:
    """What the README says to type at sites, and where the launcher is."""
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("dtrain run ")]
    words = [shlex.split(line, comments=True)[2:] for line in lines]
    return [line for line in words if "--hosts" in line or line[0].endswith("two_sites.toml")]


OVER_SSH, (TWO_SITES,), BY_HAND = commands()


def assert_same(calm: dict[str, torch.Tensor], run: Path, hosts: tuple[Path, Path], said: str) -> None:
    """Each island's model lies where the island ran, and the merged one where island 0 did."""
    ended = final_weights(hosts[0])
    ended |= {f"island1.{name}": x for name, x in load_file(hosts[1] / "islands" / "island1.safetensors").items()}
    assert not (hosts[1] / "model.safetensors").exists()
    assert ended.keys() == calm.keys(), said
    assert [name for name in calm if not torch.equal(calm[name], ended[name])] == []
    lines = metrics.read(run / "metrics.jsonl")
    assert sorted((line["island"], line["step"]) for line in lines) == [(i, s) for i in (0, 1) for s in range(1, STEPS + 1)]
    assert metrics.read_json(run / "summary.json")["islands"] == 2
    steps = checkpoint.committed(run)
    assert (len(steps), steps[-1]) == (2, STEPS)
    for island, host in enumerate(hosts):
        assert checkpoint.committed(host) == steps
        assert sorted(p.name for p in checkpoint.step_folder(host, STEPS).iterdir()) == ["COMMIT", f"island{island}"]


@contextmanager
def by_hand(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Types at the site what the launcher says that it has to."""
    out = folder / f"{name}.out"
    until(lambda: "is started at its site, by: " in out.read_text(), "the launcher to say what its site types")
    (line,) = re.findall(r"island 1 is started at its site, by: dtrain run (.*)", out.read_text())
    words = shlex.split(line)
    at = words.index("--island")
    assert [words[0], *words[at : at + 3]] == [str(ROOT / BY_HAND[0]), *BY_HAND[1:-1]], "as the README shows it"
    with (folder / f"{name}.far.out").open("w") as output:
        part = subprocess.Popen(
            [sys.executable, "-m", "dtrain.launch", "run", *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield part
        finally:
            kill_tree(part)


def said_by(folder: Path, name: str) -> str:
    outs = [folder / f"{name}.out", folder / f"{name}.far.out"]
    runs = [folder / name, folder / f"{name}-island1"]
    return "\n".join([*(out.read_text() for out in outs if out.exists()), *(logs(run) for run in runs if run.exists())])


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_island_that_its_site_starts_is_the_same_to_the_bit(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    with started(tmp_path, "hand", *ALIKE, *NEAR, job=ROOT / TWO_SITES) as launcher, by_hand(tmp_path, "hand") as part:
        assert (launcher.wait(timeout=200), part.wait(timeout=30)) == (0, 0), said_by(tmp_path, "hand")
    said = said_by(tmp_path, "hand")
    assert "waiting for its site" in said, "one sees what is waited for"
    assert_same(calm, tmp_path / "hand", (tmp_path / "hand", tmp_path / "hand-island1"), said)


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_rank_that_is_killed_at_its_site_is_started_again_there(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    with started(tmp_path, "lost", *ALIKE, *NEAR, job=ROOT / TWO_SITES) as launcher, by_hand(tmp_path, "lost") as part:
        until(lambda: steps_written(tmp_path / "lost-island1") >= 40, "40 steps there", timeout_s=200)
        (rank,) = [pid for pid in descendants(part.pid) if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(rank, signal.SIGKILL)
        assert (launcher.wait(timeout=200), part.wait(timeout=30)) == (0, 0), said_by(tmp_path, "lost")
    said = said_by(tmp_path, "lost")
    assert "waiting for island 1" in said
    assert "island 1 was lost and is started again; all islands go on from step" in said
    assert_same(calm, tmp_path / "lost", (tmp_path / "lost", tmp_path / "lost-island1"), said)


@pytest.mark.timeout(500)
@pytest.mark.slow
def test_a_job_that_was_stopped_goes_on_at_both_sites(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    """A round of the slow link takes a quarter of a second: the test meets the job alive."""
    run = tmp_path / "again"
    job, slow = ROOT / TWO_SITES, (*ALIKE, *NEAR, "link.rtt=500ms")
    with started(tmp_path, "again", *slow, job=job) as launcher, by_hand(tmp_path, "again") as part:
        until(lambda: bool(checkpoint.committed(run)), "a checkpoint of both", timeout_s=200)
        launcher.send_signal(signal.SIGINT)
        assert (launcher.wait(timeout=60), part.wait(timeout=60)) == (130, 130), said_by(tmp_path, "again")
    with started(tmp_path, "again", *ALIKE, *NEAR, "--resume", job=job) as launcher, by_hand(tmp_path, "again") as part:
        assert (launcher.wait(timeout=200), part.wait(timeout=30)) == (0, 0), said_by(tmp_path, "again")
    said = said_by(tmp_path, "again")
    assert "resuming from step " in said
    assert_same(calm, run, (run, tmp_path / "again-island1"), said)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_islands_over_ssh_are_the_same_to_the_bit(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    """All of them elsewhere: the launcher has none of its own."""
    skip_without_sshd()
    job, *words = OVER_SSH
    hosts = words[words.index("--hosts") + 1].split(",")
    with running_sshd(tmp_path, *hosts) as config:
        own = [word for word in words if not word.startswith(("job.name=", "link.interface="))]
        with started(tmp_path, "ssh", *own, *ALIKE, *NEAR, "--ssh-config", str(config), job=ROOT / job) as launcher:
            assert launcher.wait(timeout=250) == 0, said_by(tmp_path, "ssh") + (tmp_path / "sshd.log").read_text()
    said = said_by(tmp_path, "ssh")
    assert "everything but what is island 0, 1's own is in" in said
    assert_same(calm, tmp_path / "ssh", (tmp_path / "ssh-island0", tmp_path / "ssh-island1"), said)

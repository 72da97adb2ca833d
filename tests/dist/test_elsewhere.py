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
BY_HAND = 'islands.each=[{},{launcher="manual"}]'
NEAR = "link.interface=lo"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What the job ends with on one machine; in this process, which is quicker and the same to the bit (test_same_bits)."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_command(["sim", str(QUICKSTART), f"job.dir={folder}", "job.name=calm", *ALIKE]) == 0
    return final_weights(folder / "calm")


def assert_same(calm: dict[str, torch.Tensor], run: Path, said: str) -> None:
    """Each island's model lies where the island ran, and the merged one where island 0 did."""
    far = run.with_name(f"{run.name}-island1")
    ended = final_weights(run)
    ended |= {f"island1.{name}": x for name, x in load_file(far / "islands" / "island1.safetensors").items()}
    assert ended.keys() == calm.keys(), said
    assert [name for name in calm if not torch.equal(calm[name], ended[name])] == []
    lines = metrics.read(run / "metrics.jsonl")
    assert sorted((line["island"], line["step"]) for line in lines) == [(i, s) for i in (0, 1) for s in range(1, STEPS + 1)]
    assert metrics.read_json(run / "summary.json")["islands"] == 2
    steps = checkpoint.committed(run)
    assert steps == checkpoint.committed(far)
    assert (len(steps), steps[-1]) == (2, STEPS)
    for host, island in ((run, "island0"), (far, "island1")):
        assert sorted(p.name for p in checkpoint.step_folder(host, STEPS).iterdir()) == ["COMMIT", island]


@contextmanager
def by_hand(folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """Types at the site what the launcher says that it has to."""
    out = folder / f"{name}.out"
    until(lambda: "is started at its site, by: " in out.read_text(), "the launcher to say what its site types")
    (line,) = re.findall(r"island 1 is started at its site, by: dtrain (.*)", out.read_text())
    with (folder / f"{name}.far.out").open("w") as output:
        part = subprocess.Popen(
            [sys.executable, "-m", "dtrain.launch", *shlex.split(line)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
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
    with started(tmp_path, "hand", *ALIKE, NEAR, BY_HAND) as launcher, by_hand(tmp_path, "hand") as part:
        assert (launcher.wait(timeout=200), part.wait(timeout=30)) == (0, 0), said_by(tmp_path, "hand")
    said = said_by(tmp_path, "hand")
    assert "waiting for its site" in said, "one sees what is waited for"
    assert_same(calm, tmp_path / "hand", said)


@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_rank_that_is_killed_at_its_site_is_started_again_there(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    with started(tmp_path, "lost", *ALIKE, NEAR, BY_HAND) as launcher, by_hand(tmp_path, "lost") as part:
        until(lambda: steps_written(tmp_path / "lost-island1") >= 40, "40 steps there", timeout_s=200)
        (rank,) = [pid for pid in descendants(part.pid) if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(rank, signal.SIGKILL)
        assert (launcher.wait(timeout=200), part.wait(timeout=30)) == (0, 0), said_by(tmp_path, "lost")
    said = said_by(tmp_path, "lost")
    assert "waiting for island 1" in said
    assert "island 1 was lost and is started again; all islands go on from step" in said
    assert_same(calm, tmp_path / "lost", said)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_an_island_over_ssh_is_the_same_to_the_bit(tmp_path: Path, calm: dict[str, torch.Tensor]) -> None:
    skip_without_sshd()
    over_ssh = ('islands.each=[{},{launcher="ssh"}]', "--hosts", "far", "--ssh-config")
    with running_sshd(tmp_path, "far") as config:
        with started(tmp_path, "ssh", *ALIKE, NEAR, *over_ssh, str(config)) as launcher:
            assert launcher.wait(timeout=200) == 0, said_by(tmp_path, "ssh") + (tmp_path / "sshd.log").read_text()
        assert_same(calm, tmp_path / "ssh", said_by(tmp_path, "ssh"))

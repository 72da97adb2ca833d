"""What does ``dtrain slurm`` refuse, before a script is written?"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.small_run import refused, write_job_file

IB = "link.interface=ib0"
RANKS = ("islands.ranks=4", "train.batch=4")
SSH = 'islands.each=[{}, {launcher = "ssh", host = "gate"}]'


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    for name in ("train.py", "it's mine"):
        Path(name).touch()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "link.interface is empty, which is loopback, and island 0 is not on one node with all others; name"),
        ((IB, "--submit"), "--submit: this machine has no sbatch; write the script with --output FILE"),
        ((IB, "sync.evry=5"), "on the command line: unknown key sync.evry"),
        ((IB, "sync.delay=9"), "sync.delay = 9 is longer than sync.every = 5"),
        ((IB, "train.optimizer=muon", "--", "train.py"), "train.optimizer = 'muon' has no effect on a script"),
        ((IB, "log.tensorboard=true", "--island", "1", "--meet", "h:1", "--", "train.py"), "log.tensorboard = True has no"),
        ((IB, "model.factory=none.py:build"), "model.factory = 'none.py:build': there is no file "),
        ((IB, "sim.step_s=1.0"), "sim.step_s = 1.0 has no effect with dtrain run"),
        ((IB, "--partition", "a b"), "--partition a b: Slurm has no such names"),
        ((IB, "--partition", "a", "--partition", "b", "--partition", "c"), "3 times --partition for 2 islands; name one for all"),
        ((IB, "--time", "noon"), '--time noon: write "12:00:00"'),
        ((IB, "--account", "$(rm)"), "--account $(rm): Slurm has no such names"),
        ((IB, "--meet", "login1"), "--meet login1: write HOST:PORT"),
        ((IB, "--meet", "login1:65535"), "--meet login1:65535: use a port from 1 to 65534"),
        ((IB, "--island", "1"), "--island 1 joins a launcher that runs elsewhere; say where with --meet HOST:PORT"),
        ((IB, "--island", "2", "--meet", "h:1"), "--island 2: the last of 2 islands is island 1"),
        ((IB, *RANKS, "--nodes-per-island", "3"), "4 ranks of island 0 do not divide by 3 nodes"),
        ((IB, *RANKS, "--nodes-per-island", "2", "--gpus-per-node", "1"), "2 ranks a node of island 0 are more than"),
        ((IB, "job.dir=a\nb"), "'/"),
        ((IB, "job.dir=100%"), "the run folder"),
        ((IB, "link.port=65535"), "link.port = 65535: torchrun takes the port after it"),
        ((IB, "--setup", "a\nb"), r"'a\nb' has characters that cannot stand in a line of a script"),
        ((IB, "--ssh-config", "none"), "--ssh-config none is no file"),
        ((IB, "--ssh-config", "it's mine"), "--ssh-config it's mine has no effect: nothing here starts an island over ssh"),
        ((IB, 'islands.each=[{}, {launcher = "ssh"}]'), 'islands.each.1.launcher = "ssh" without a host; say'),
        ((IB, SSH, "--island", "1", "--meet", "h:1"), '--island 1: its table says launcher = "ssh", so the launcher starts it'),
        ((IB, 'islands.each=[{launcher = "manual"}, {launcher = "manual"}]'), "no table [[islands.each]] leaves its island to"),
        (("islands.count=2", SSH), "link.interface is empty, which is loopback, and island 0 is not on one node with all others"),
        ((IB, "--", "none.py"), "no script at none.py"),
        ((IB, "--", "train.py", "a\nb"), r"'a\nb' has characters that cannot stand in a line of a script"),
        ((IB, "--output", "no/such.sh"), "--output no/such.sh: there is no folder no; make it first"),
        ((IB, "--output", "."), "--output .: that is a folder; name a file in it"),
        ((IB, "--force"), "--force has no effect without --output FILE"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: Sequence[str], said: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert refused(capsys, "slurm", "job.toml", *words).startswith(said)


def test_a_job_on_stdin_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "slurm", "-", IB) == "dtrain slurm reads its job file twice; name a file in place of -"

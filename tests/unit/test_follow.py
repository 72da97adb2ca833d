"""Does another node of an island start its torchrun whenever the launcher says that the island starts?"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore

from dtrain.config import load_job
from dtrain.errors import PeerLost
from dtrain.launch import follow, islands
from tests.unit.small_run import write_job_file

# Plays a torchrun: notes how it was started, and fails in epoch 1.
TORCHRUN = """
import json, os, sys
with open("starts", "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
sys.exit(os.environ["DTRAIN_EPOCH"] == "1")
"""


class Told(HashStore):
    """A meeting point at which the launcher says one thing after the other."""

    def __init__(self, *words: str) -> None:
        super().__init__()
        self._words: Iterator[str] = iter(words)
        self.set("started/1", "")

    def get(self, key: str) -> bytes:
        assert key == "started/1", "of its own island: others are started again without it"
        return next(self._words).encode()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "_POLL_S", 0.001)
    write_job_file()
    Path("torchrun.py").write_text(TORCHRUN)


def test_each_start_is_followed_until_one_ends_well() -> None:
    words = (sys.executable, "-IS", "torchrun.py", "--node-rank=1")
    launch = islands.Launch(load_job(Path("job.toml")), Path("/runs/x"), "there:29400", tag="", torchruns=words)
    assert follow.follow(launch, 1, Told("1:40", "1:40", "1:40", "2:500")) == 0
    starts: list[tuple[list[str], dict[str, Any]]] = [json.loads(line) for line in Path("starts").read_text().splitlines()]
    told = [(said["DTRAIN_EPOCH"], said["DTRAIN_RESUME_STEP"]) for _, said in starts]
    assert told == [("1", "40"), ("2", "500")]
    for (words, said), epoch in zip(starts, (1, 2), strict=True):
        assert words[:2] == ["--node-rank=1", f"--rdzv-id=epoch{epoch}"], "which the first node's torchrun says too"
        assert words[-4:] == ["-m", "dtrain.launch", "train", "/runs/x/job.toml"]
        assert (said["DTRAIN_ISLAND"], said["DTRAIN_NUM_ISLANDS"], said["DTRAIN_MEET"]) == ("1", "2", "there:29400")
        assert said["DTRAIN_RUN"] == "/runs/x"


def test_torchruns_are_started_as_the_script_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the one here, by who was told so; all else of the command stays."""
    monkeypatch.setenv(islands.TORCHRUN_VARIABLE, "'srun' '--nodes=2' 'bash' '-c' 'exec \"$@\"' '_' '--nnodes=2'")
    launch = islands.Launch(load_job(Path("job.toml")), Path("/runs/x"), "n1:20007", "tag")
    alone = islands.command(launch, 1, 3)
    several = islands.command(replace(launch, torchruns=islands.take_torchruns()), 1, 3)
    assert islands.TORCHRUN_VARIABLE not in os.environ, "what ranks start has other nodes"
    assert islands.take_torchruns() == ()
    assert several[:7] == ["srun", "--nodes=2", "bash", "-c", 'exec "$@"', "_", "--nnodes=2"]
    assert alone[1:5] == ["-m", "dtrain.launch.agent", "--nnodes=1", "--nproc-per-node=1"]
    assert alone[5] == "--rdzv-id=epoch3-tag"
    assert several[7:] == ["--rdzv-id=epoch3", *alone[6:]], "a name that torchruns elsewhere know too"


def test_the_command_starts_the_torchruns_that_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a scheduler's script does, and the meeting point tells of the start."""
    monkeypatch.setenv(islands.TORCHRUN_VARIABLE, shlex.join([sys.executable, "-IS", "torchrun.py", "--node-rank=1"]))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("started/1", "2:500")
    assert follow.main("job.toml", "/runs/x", "1", f"127.0.0.1:{store.port}") == 0
    (line,) = Path("starts").read_text().splitlines()
    words, said = json.loads(line)
    assert words[:2] == ["--node-rank=1", "--rdzv-id=epoch2"]
    assert (said["DTRAIN_RUN"], said["DTRAIN_RESUME_STEP"]) == ("/runs/x", "500")
    assert islands.TORCHRUN_VARIABLE not in said, "what ranks start has other nodes"


def test_the_meeting_point_is_asked() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("started/1", "3:40")
    there = follow.reach(f"127.0.0.1:{store.port}", 30.0)
    assert follow.newer(there, 1, 2, 30.0) == (3, 40)
    with pytest.raises(PeerLost, match=r"the launcher has told of no start within 0\.3 s"):
        follow.newer(there, 1, 3, 0.3)


def test_a_launcher_that_never_comes_is_not_waited_for_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.toml").write_text("[link]\ntimeout_s = 0.1\n")
    assert follow.main("job.toml", "run", "1", "127.0.0.1:1") == 75
    assert capsys.readouterr().err.startswith("dtrain: no launcher at 127.0.0.1:1 within 0.1 s (Connection refused)")

"""Does another node of an island start its torchrun whenever the launcher says that the island starts?"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore, TCPStore

from dtrain.config import load_job
from dtrain.errors import PeerLost
from dtrain.launch import follow, islands, processes
from tests.unit.small_run import write_job_file

# Plays a torchrun: notes how it was started, and fails in epoch 1.
TORCHRUN = """
import json, os, sys
with open("starts", "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
sys.exit(os.environ["DTRAIN_EPOCH"] == "1")
"""
# Plays one that hangs in epoch 1, with a rank in a session of its own, and ends well in epoch 2.
HANGS = """
import os, subprocess, sys, time
if os.environ["DTRAIN_EPOCH"] == "1":
    rank = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(600)"], start_new_session=True)
    with open("pids.new", "w") as file:
        file.write(f"{os.getpid()} {rank.pid}")
    os.rename("pids.new", "pids")
    time.sleep(600)
"""
# Plays one that ends when the launcher is gone, with the status that it is given.
ENDS_LATE = """
import os, sys, time
open("runs", "w").close()
while not os.path.exists("gone"):
    time.sleep(0.001)
time.sleep(600 * (sys.argv[1] == "never"))
sys.exit(int(sys.argv[1]))
"""


class Told(HashStore):
    """A meeting point at which the launcher says what it likes."""

    def __init__(self, says: Callable[[], str]) -> None:
        super().__init__()
        self._says = says
        self.set("started/1", "")

    def get(self, key: str) -> bytes:
        assert key == "started/1", "of its own island: others are started again without it"
        return self._says().encode()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(follow, "_POLL_S", 0.001)
    write_job_file()
    Path("torchrun.py").write_text(TORCHRUN)


def launch_of(program: str, *words: str, timeout_s: float = 300.0) -> islands.Launch:
    Path("torchrun.py").write_text(program)
    job = load_job(Path("job.toml"), (f"link.timeout_s={timeout_s}",))
    torchrun = (sys.executable, "-IS", "torchrun.py", *words)
    return islands.Launch(job, Path("/runs/x"), "there:29400", tag=secrets.token_hex(8), torchruns=torchrun)


def test_each_start_is_followed_until_one_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    """However long the launcher waits with the next."""
    printed, words_since = "", 0

    def says() -> str:
        nonlocal printed, words_since
        printed += capsys.readouterr().out
        words_since += "has failed here" in printed
        return "1:40" if words_since < 50 else "2:500"

    assert follow.follow(launch_of(TORCHRUN, "--node-rank=1", timeout_s=0.01), 1, Told(says)) == 0
    assert printed == "the torchrun of epoch 1 has failed here; waiting for the next\n"
    starts: list[tuple[list[str], dict[str, Any]]] = [json.loads(line) for line in Path("starts").read_text().splitlines()]
    told = [(said["DTRAIN_EPOCH"], said["DTRAIN_RESUME_STEP"]) for _, said in starts]
    assert told == [("1", "40"), ("2", "500")]
    for (words, said), epoch in zip(starts, (1, 2), strict=True):
        assert words[:2] == ["--node-rank=1", f"--rdzv-id=epoch{epoch}"], "which the first node's torchrun says too"
        assert words[-4:] == ["-m", "dtrain.launch", "train", "/runs/x/job.toml"]
        assert (said["DTRAIN_ISLAND"], said["DTRAIN_NUM_ISLANDS"], said["DTRAIN_MEET"]) == ("1", "2", "there:29400")
        assert said["DTRAIN_RUN"] == "/runs/x"


def runs(pid: int) -> bool:
    """Not so of one that ended and that nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_torchrun_that_hangs_is_ended_for_the_next_start(capsys: pytest.CaptureFixture[str]) -> None:
    told = Told(lambda: "2:500" if Path("pids").exists() else "1:40")
    assert follow.follow(launch_of(HANGS), 1, told) == 0
    assert [runs(int(pid)) for pid in Path("pids").read_text().split()] == [False, False]
    assert capsys.readouterr().out == "the island starts anew: its torchrun of epoch 1 is ended here\n"


def test_a_torchrun_may_outlive_the_launcher_and_end_well() -> None:
    """At the end of a run. At any other the follower does not stay behind."""

    def says() -> str:
        if not Path("runs").exists():
            return "0:0"
        Path("gone").touch()
        raise PeerLost((), "the launcher is gone")

    assert follow.follow(launch_of(ENDS_LATE, "0"), 1, Told(says)) == 0
    for words, timeout_s in (("1", 300.0), ("never", 0.01)):
        Path("runs").unlink()
        Path("gone").unlink()
        launch = launch_of(ENDS_LATE, words, timeout_s=timeout_s)
        with pytest.raises(PeerLost, match="the launcher is gone"):
            follow.follow(launch, 1, Told(says))
        assert processes.tagged(launch.tag) == []


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


def test_a_launcher_that_is_gone_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(islands.TORCHRUN_VARIABLE, shlex.join([sys.executable, "-IS", "torchrun.py"]))
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    stores[0].set("started/1", "1:40")
    meet, start = f"127.0.0.1:{stores[0].port}", follow._start

    def goes(launch: islands.Launch, island: int, epoch: int, step: int) -> subprocess.Popen[bytes]:
        stores.clear()
        return start(launch, island, epoch, step)

    monkeypatch.setattr(follow, "_start", goes)
    assert follow.main("job.toml", "/runs/x", "1", meet) == 75
    err = capsys.readouterr().err
    assert err.startswith(f"dtrain: the launcher at {meet} is gone; start it again with --resume, and then this")
    assert err.count("\n") == 1


def test_who_stops_it_stops_its_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("torchrun.py").write_text("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(600)\n")
    monkeypatch.setenv(islands.TORCHRUN_VARIABLE, shlex.join([sys.executable, "-IS", "torchrun.py"]))
    monkeypatch.setattr("secrets.token_hex", lambda size: "a tag of this test")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("started/1", "0:0")
    assert follow.main("job.toml", "/runs/x", "1", f"127.0.0.1:{store.port}") == 128 + signal.SIGINT
    assert processes.tagged("a tag of this test") == []


def test_a_launcher_that_never_comes_is_not_waited_for_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.toml").write_text("[link]\ntimeout_s = 0.1\n")
    assert follow.main("job.toml", "run", "1", "127.0.0.1:1") == 75
    assert capsys.readouterr().err.startswith("dtrain: no launcher at 127.0.0.1:1 within 0.1 s (Connection refused)")

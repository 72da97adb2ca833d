"""Does another node of an island start its torchrun whenever the launcher says that the island starts?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from dtrain.errors import PeerLost
from dtrain.launch import follow, islands
from tests.unit.small_run import write_job_file

# Plays a torchrun: notes how it was started, and in epoch 1 has the launcher tell of another start, and fails.
TORCHRUN = """
import json, os, pathlib, sys
from torch._C._distributed_c10d import TCPStore
from datetime import timedelta
with open("starts", "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
host, port = os.environ["DTRAIN_MEET"].split(":")
if os.environ["DTRAIN_EPOCH"] == "1":
    TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=60)).set("regroup", "2:500")
    sys.exit(1)
"""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    Path("torchrun.py").write_text(TORCHRUN)
    monkeypatch.setenv(islands.TORCHRUN_VARIABLE, f"{sys.executable} torchrun.py --node-rank=1")
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def test_each_start_is_followed_until_one_ends_well(store: TCPStore, tmp_path: Path) -> None:
    store.set("regroup", "1:40")
    meet = f"127.0.0.1:{store.port}"
    assert follow.main("job.toml", str(tmp_path / "run"), "1", meet) == 0
    starts: list[tuple[list[str], dict[str, Any]]] = [json.loads(line) for line in Path("starts").read_text().splitlines()]
    told = [(said["DTRAIN_EPOCH"], said["DTRAIN_RESUME_STEP"]) for _, said in starts]
    assert told == [("1", "40"), ("2", "500")]
    for (words, said), epoch in zip(starts, (1, 2), strict=True):
        assert words[:2] == ["--node-rank=1", f"--rdzv-id=epoch{epoch}"], "which the first node's torchrun says too"
        assert words[-4:] == ["-m", "dtrain.launch", "train", str(tmp_path / "run" / "job.toml")]
        assert (said["DTRAIN_ISLAND"], said["DTRAIN_NUM_ISLANDS"], said["DTRAIN_MEET"]) == ("1", "2", meet)
        assert said["DTRAIN_RUN"] == str(tmp_path / "run")


def test_a_start_that_never_comes_is_not_waited_for_without_end(store: TCPStore, capsys: pytest.CaptureFixture[str]) -> None:
    store.set("regroup", "1:40")
    with pytest.raises(PeerLost, match=r"the launcher has told of no start within 0\.3 s"):
        follow.newer(store, 1, 0.3)
    Path("job.toml").write_text("[link]\ntimeout_s = 0.1\n")
    assert follow.main("job.toml", "run", "1", "127.0.0.1:1") == 75
    assert capsys.readouterr().err.startswith("dtrain: no launcher at 127.0.0.1:1 within 0.1 s (Connection refused)")

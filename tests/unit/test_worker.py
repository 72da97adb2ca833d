"""Does a rank of ``dtrain run JOB.toml`` leave its last word where the launcher looks for it?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launch import islands, worker


def test_an_error_of_a_rank_is_its_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: as a rank that torchrun started, whose job file is damaged by the time it reads it."""
    job = tmp_path / "job.toml"
    job.write_text("[islands]\ncount = 0\n")
    monkeypatch.setenv("DTRAIN_RUN", str(tmp_path))
    monkeypatch.setenv("DTRAIN_ISLAND", "1")
    monkeypatch.setenv("DTRAIN_NUM_ISLANDS", "2")
    islands.folder(tmp_path, 1).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"islands\.count") as raised:
        worker.train(job)
    word = islands.last_word(tmp_path, 1)
    assert (word.kind, word.message) == ("user", str(raised.value))


def test_rank_0_says_where_a_script_prints_to(tmp_path: Path) -> None:
    """On whichever node of its island it is; the others print to files of the same name."""
    (tmp_path / "script.py").write_text("print('here')")
    islands.folder(tmp_path, 1).mkdir(parents=True)
    assert islands.stdout_log(tmp_path, 1) is None
    command = [sys.executable, "-m", "dtrain.launch.worker", str(tmp_path / "script.py")]
    for rank in ("0", "1"):
        said = {**os.environ, "DTRAIN_RUN": str(tmp_path), "DTRAIN_ISLAND": "1", "RANK": rank, "DTRAIN_PARENT": str(os.getpid())}
        with (tmp_path / f"stdout{rank}.log").open("wb") as log:
            subprocess.run(command, env=said, stdout=log, check=True)
    log = islands.stdout_log(tmp_path, 1)
    assert log == tmp_path / "stdout0.log"
    assert (tmp_path / "stdout0.log").read_text() == "here\n"
    islands.forget_news(tmp_path, 1)
    assert islands.stdout_log(tmp_path, 1) is None, "of another start"

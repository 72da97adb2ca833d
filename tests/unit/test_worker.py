"""Does a rank of ``dtrain run JOB.toml`` leave its last word where the launcher looks for it?"""

from __future__ import annotations

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

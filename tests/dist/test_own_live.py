"""Do live islands train somebody's own model on somebody's own data to the same bits as ``dtrain sim`` does?"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dtrain.launch.cli import run_command
from tests.dist.job import ROOT
from tests.unit.by_hand import same
from tests.unit.test_hf_data import write_rows, write_tokenizer
from tests.unit.test_own_model import MINE

JOB = """
[islands]
threads = 1
[model]
factory = "mine.py:Words"
arguments = {{ width = 12 }}
context = 16
[data]
source = "{source}"
tokenizer = "tokens"
streaming = true
[train]
steps = 6
checkpoint_every = 0
[sync]
recipe = "diloco"
every = 2
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_live_run_is_the_simulated_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    write_tokenizer()
    Path("job.toml").write_text(JOB.format(source=write_rows("jsonl")))
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.launch", "run", "job.toml", "job.name=live"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_command(["sim", "job.toml", "job.name=sim"]) == 0, capsys.readouterr().err
    live, simulated = (load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("live", "sim"))
    assert same(live, simulated)

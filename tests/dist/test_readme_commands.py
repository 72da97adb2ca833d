"""Does every ``dtrain`` command of the README work as it is written there? With a smaller model and fewer steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.launch.cli import run_command
from tests.dist.job import ROOT, SMALL
from tests.unit.test_comparison import TINY

SMALLER = (*SMALL, "train.steps=16", "train.batch=4", "sync.every=8", "sync.delay=2")


def commands() -> list[list[str]]:
    """The ``dtrain`` lines of the README's console blocks, in order."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("dtrain ")]
    return [shlex.split(line, comments=True) for line in lines]


def mine() -> str:
    """The file that the README shows as a method of one's own."""
    (block,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return block


def dtrain(folder: Path, words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.launch", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"dtrain {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.timeout(400)
def test_every_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    listed = [words for words in commands() if words[1] != "lab"]  # those need root: test_lab_jobs
    known = {"run", "plan", "profile", "sim", "status", "report", "eval", "recipes", "topology", "check", "keys", "bench"}
    assert {words[1] for words in listed} == known | {"doctor", "slurm", "kubernetes"}
    (tmp_path / "mine.py").write_text(mine(), encoding="utf-8")
    # What make train leaves behind; in this process, which is quicker and the same to the bit (test_same_bits).
    assert run_command(["sim", "launch/jobs/quickstart.toml", *SMALLER]) == 0, capsys.readouterr().err
    said: dict[str, str] = {}
    for words in listed:
        if "--hosts" in words or "launch/jobs/two_sites.toml" in words:
            continue  # test_elsewhere, which has an sshd
        if words[1] == "profile":
            said[words[1]] = dtrain(tmp_path, [*words[1:], "--steps", "8", *(key for key in SMALLER if "steps" not in key)])
        elif words[1:3] == ["run", "launch/jobs/gossip.toml"]:
            # In this process; a live run of what that job says is a slow test (test_same_bits, fused).
            assert run_command(["sim", *words[2:], *SMALLER, "train.checkpoint_every=0"]) == 0, capsys.readouterr().err
        elif words[1:3] == ["run", "launch/jobs/two_levels.toml"]:  # live: test_same_bits, two levels
            smaller = [key for key in SMALLER if not key.startswith("sync.")]
            every = "sync.level.1.every=8"
            assert run_command(["sim", *words[2:], *smaller, every, "train.checkpoint_every=0"]) == 0, capsys.readouterr().err
        elif words[1] == "run":
            # As make train.
            said[words[1]] = dtrain(tmp_path, [*words[1:], *(() if "--resume" in words else ("--fresh-name", *SMALLER))])
        elif words[1:3] == ["bench", "recipes"]:
            (tmp_path / "tiny.toml").write_text(TINY.replace("text.txt", "stdlib"))
            said["bench recipes"] = dtrain(tmp_path, [*words[1:3], "tiny.toml", *words[3:]])
        elif words[1] == "doctor":  # its status is 0 where nothing will stop a job
            said[words[1]] = dtrain(tmp_path, words[1:])
        else:  # in this process, which has imported torch already
            # A Poisson clock has no rounds.
            smaller = [key for key in SMALLER if not (key.startswith("sync.") and "sim.clock=poisson" in words)]
            if any(word.startswith("model.factory") for word in words):  # whose layers are its own
                smaller = [key for key in smaller if not re.match(r"model\.(layers|width|heads)", key)]
            smaller.append("train.checkpoint_every=0")  # nothing is resumed, and sixteen islands would write sixteen
            assert run_command([*words[1:], *(smaller if words[1] == "sim" else ())]) == 0, capsys.readouterr().err
            said["uncertainty" if "--uncertainty" in words else words[1]] = capsys.readouterr().out
    assert "sync.every" in said["keys"]
    assert said["check"].count("kept ") == 7
    assert said["doctor"].splitlines()[-1] == "nothing will stop a job"
    assert [line.split()[0] for line in said["uncertainty"].splitlines()[1:-1]] == ["merged", "island0", "island1", "ensemble"]
    assert "a step takes" in said["profile"]
    assert said["status"].splitlines()[0] == "runs/quickstart: finished; 2 islands, delayed_diloco"
    assert "2 islands: take " in said["plan"]
    assert (tmp_path / "runs" / "quickstart-profile" / "trace.json").exists()
    assert "gossip_adam" in said["bench"]
    assert {line.split()[0] for line in said["bench recipes"].splitlines()} >= {"allreduce", "mine.py:row", "dpsgd", "choco"}
    assert (tmp_path / "both.png").exists()
    assert (tmp_path / "job.sbatch").exists()
    assert (tmp_path / "job.yaml").exists()
    assert (tmp_path / "mine.png").exists()
    assert (tmp_path / "runs" / "slow" / "model.safetensors").exists()
    names = {Path(word).name for words in listed if words[1] == "report" for word in words if word.startswith("runs/")}
    assert len(names) == 2
    assert names <= set(said["report"].splitlines()[0].split()), "a column a run"
    (merged,) = [line.split() for line in said["eval"].splitlines() if line.startswith("merged")]
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text(encoding="utf-8"))
    # Four digits are printed; sums in fp32 may come in another order where another number of threads makes them.
    expected = [summary["eval_loss"], summary["eval_bits_per_byte"]]
    assert [float(number) for number in merged[1:]] == pytest.approx(expected, rel=0, abs=0.5e-4 + 1e-5)

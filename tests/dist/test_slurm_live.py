"""Does a job that Slurm starts train to its end, and is it what it is on one machine? To the bit, on real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dtrain import checkpoint, metrics
from dtrain.launch.cli import run_command
from tests.dist.job import QUICKSTART, ROOT, SMALL, final_weights, run
from tests.dist.slurm import Slurm, check_script, running_slurm
from tests.dist.sshd import running_sshd, skip_without_sshd

STEPS = 7
TRAIN = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import dtrain.hf

torch.manual_seed(1)
model = LlamaForCausalLM(
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
)
rows = [{{"input_ids": row, "labels": row}} for row in torch.randint(50, (10, 8))]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out", max_steps={STEPS}, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True,
        save_strategy="no",
    ),
    train_dataset=rows,
    callbacks=[dtrain.hf.DtrainCallback()],
)
trainer.train()
trainer.save_model()
trainer.save_state()
"""
JOB = """
[job]
name = "both"
[islands]
count = 2
threads = 1
[[islands.each]]
launcher = "slurm"
[[islands.each]]
launcher = "ssh"
host = "far"
python = "@python"
[sync]
recipe = "diloco"
every = 3
[link]
interface = "lo"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """Three nodes; the folder and the words of who submits."""
    monkeypatch.chdir(tmp_path)
    with running_slurm(tmp_path, "127.0.0.1", "127.0.0.2", "127.0.0.3") as slurm:
        monkeypatch.setenv("PATH", f"{slurm.folder / 'bin'}:{os.environ['PATH']}")
        yield slurm


def submit(slurm: Slurm, capsys: pytest.CaptureFixture[str], *words: str, script: tuple[str, ...] = ()) -> None:
    """The one command that a person types."""
    assert run_command(["slurm", *words, "--setup", slurm.setup, "--submit", *script]) == 0
    assert capsys.readouterr().out.strip().isdecimal(), "the job's number"
    check_script(slurm.script)


def of_trainers(folder: Path) -> list[dict[str, Tensor]]:
    """The model that each island's Trainer saved, of one that came to its end."""
    for island in (0, 1):
        state = json.loads((folder / "out" / f"island{island}" / "trainer_state.json").read_text())
        assert state["global_step"] == STEPS
    return [load_file(folder / "out" / f"island{island}" / "model.safetensors") for island in (0, 1)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trainers_script_on_an_island_of_slurm_and_one_over_ssh(
    tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    skip_without_sshd()
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))
    (tmp_path / "job.toml").write_text(JOB.replace("@python", str(slurm.python)))
    with running_sshd(tmp_path, "far") as config:
        submit(slurm, capsys, "job.toml", "--ssh-config", str(config), script=("--", "train.py"))
        assert slurm.ended(timeout_s=600) == 0, slurm.said() + (tmp_path / "sshd.log").read_text()
        slurm.check_all_ended()
    here, there = of_trainers(tmp_path)
    assert same(here, there), "merged"
    assert not (slurm.folder / "scontrol.log").exists(), "nothing is queued again"

    alone = tmp_path / "alone"
    alone.mkdir()
    command = [sys.executable, "-m", "dtrain.launch", "run", "../job.toml", "islands.each=[{}, {}]", "--", "../train.py"]
    said = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=alone, env=said, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert same(here, of_trainers(alone)[0]), "as two islands on one machine end"


SHORT = (*SMALL, "train.steps=30", "train.checkpoint_every=10", "sync.every=8", "sync.delay=3", "train.batch=4")
UNLIKE = "islands.each=[{ranks = 2}, {}]"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_island_of_two_nodes_beside_one_of_one(tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    """A torchrun on each of the two, which find each other at the first."""
    place = (f"job.dir={tmp_path}", "job.name=nodes", "link.interface=lo", "--gpus-per-node", "1")
    submit(slurm, capsys, str(QUICKSTART), *SHORT, UNLIKE, *place)
    assert slurm.ended(timeout_s=600) == 0, slurm.said()
    slurm.check_all_ended()
    folders = [tmp_path / f"nodes-island{island}" for island in (0, 1)]
    (logs,) = (tmp_path / "nodes-slurm").iterdir()
    assert {log.name for log in logs.iterdir()} >= {"island0-127.0.0.1.log", "island0-127.0.0.2.log", "island1-127.0.0.3.log"}
    ranks = sorted(folders[0].glob("logs/island0/torchrun/epoch0_*/attempt_0/*/stdout.log"))
    assert [log.parent.name for log in ranks] == ["0", "0"], "two torchruns, of one rank each"

    steps = checkpoint.committed(tmp_path / "nodes")
    assert steps[-1] == 30
    assert [checkpoint.committed(folder) for folder in folders] == [steps, steps]
    lines = metrics.read(tmp_path / "nodes" / "metrics.jsonl")
    assert sorted((line["island"], line["step"]) for line in lines) == [(i, s) for i in (0, 1) for s in range(1, 31)]
    ended = final_weights(folders[0])
    ended |= {f"island1.{name}": x for name, x in load_file(folders[1] / "islands" / "island1.safetensors").items()}
    here = run(tmp_path, "here", *SHORT, UNLIKE, timeout_s=400)
    assert same(ended, final_weights(here))

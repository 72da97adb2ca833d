"""Is a Trainer of transformers with the callback an island like any other? Beside plain loops that join by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from dtrain.connect import Connection
from dtrain.engine import join
from dtrain.hf import DtrainCallback
from tests.islands import run_islands
from tests.unit.by_hand import flat
from tests.unit.test_hf_model import config

ROOT = Path(__file__).parents[2]
BATCH, STEPS, SEED, LR, CLIP = 2, 7, 7, 1e-2, 0.5
ROWS = 10
"""Not a multiple of the batches of the run, so that it goes through more than one epoch."""
pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.tokens = torch.randint(50, (ROWS, 8), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Any:
        return iter([Rows()[k % ROWS] for k in range(100)])


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(vocab=50))


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    said: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": LR,
        "weight_decay": 0.1, "max_grad_norm": CLIP, "lr_scheduler_type": "linear", "data_seed": SEED, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "adam_beta2": 0.95, "logging_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(**(said | more))


def by_trainer(link: Connection, folder: Path, recipe: Mapping[str, Any], model: nn.Module) -> Tensor:
    callback = DtrainCallback(**recipe, link=link)
    Trainer(model=model, args=arguments(folder), train_dataset=Rows(), callbacks=[callback]).train()
    assert callback.sync is None, "it has left"
    assert callback.merged_distance is not None
    return flat(model.state_dict())


def by_loop(link: Connection, recipe: Mapping[str, Any], model: nn.Module) -> Tensor:
    """The loop that a Trainer is: AdamW with decay on matrices, clipping, and a learning rate that falls in a line."""
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    order = list[int]()
    for epoch in range(3):
        seed = torch.Generator().manual_seed(SEED + 2**20 * link.node + epoch)
        order += torch.randperm(ROWS, generator=seed).tolist()
    rows = Rows()
    with join(model, optimizer, **recipe, link=link) as sync:
        for step in range(STEPS):
            tokens = torch.stack([rows.tokens[k] for k in order[BATCH * step : BATCH * (step + 1)]])
            logits = model(input_ids=tokens).logits[:, :-1]
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / STEPS)
            optimizer.step()
            optimizer.zero_grad()
        sync.merge()
    return flat(model.state_dict())


def loops(recipe: Mapping[str, Any], seed: int) -> list[Tensor]:
    """Of two islands; models are made before, as threads share torch's generator."""
    models = [model_of(seed) for _ in range(2)]
    return run_islands(2, lambda link: by_loop(link, recipe, models[link.node]))


@pytest.mark.parametrize(
    "recipe", [{"recipe": "dpsgd"}, {"recipe": "diloco", "every": 3}, {"recipe": "delayed_diloco", "every": 2, "delay": 1}]
)
def test_a_trainer_beside_a_loop_is_two_loops(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """The Trainer is island 1, whose data come in an order of its own, and which gets island 0's first weights."""
    models = [model_of(seed) for seed in (1, 2)]

    def mixed(link: Connection) -> Tensor:
        return by_trainer(link, tmp_path, recipe, models[1]) if link.node else by_loop(link, recipe, models[0])

    got = run_islands(2, mixed)
    expected = loops(recipe, 1)
    assert torch.equal(got[0], got[1]), "merged"
    assert torch.equal(expected[0], expected[1])
    # The Trainer divides a sum by its tokens where the loop takes a mean: the last bits of a gradient, which Adam passes on.
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-6)
    alone = run_islands(1, lambda link: by_loop(link, {"recipe": "local"}, model_of(1)))[0]
    assert (expected[0] - alone).abs().max() > 1e-3, "islands that did not talk would be seen"
    assert (tmp_path / "island1").exists() is False, "nothing was to be saved"


def test_one_island_is_the_trainer_alone(tmp_path: Path) -> None:
    """Bit for bit, in its own output_dir and order."""
    (joined,) = run_islands(1, lambda link: by_trainer(link, tmp_path, {"recipe": "diloco"}, model_of(1)))
    model = model_of(1)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows()).train()
    assert torch.equal(joined, flat(model.state_dict()))


@pytest.mark.parametrize(
    ("more", "data", "said"),
    [
        ({"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}, Rows, "load_best_model_at_end"),
        ({}, Stream, "split them by island in the script, and give DtrainCallback"),
    ],
)
def test_what_does_not_fit_is_one_line_before_the_first_step(tmp_path: Path, more: dict[str, Any], data: Any, said: str) -> None:
    stepped: list[int] = []

    def island(link: Connection) -> str:
        if link.node:  # is there, as join waits for it
            with join(model_of(1), torch.optim.SGD(model_of(1).parameters(), lr=0.1), recipe="local", link=link):
                return ""
        trainer = Trainer(
            model=model_of(1), args=arguments(tmp_path, **more), train_dataset=data(), eval_dataset=Rows(),
            callbacks=[DtrainCallback(recipe="local", link=link)],
        )  # fmt: skip
        with pytest.raises(ValueError, match=said) as caught:
            trainer.train()
        stepped.append(trainer.state.global_step)
        return str(caught.value)

    line = run_islands(1 if more else 2, island)[0]
    assert "\n" not in line
    assert stepped == [0]


SCRIPT = """
import torch
from transformers import LlamaForCausalLM, Trainer
import dtrain.hf
from tests.unit.test_hf_trainer import Rows, arguments, model_of

model = model_of(3)
Trainer(
    model=model, args=arguments("out", save_strategy="steps", save_steps=7), train_dataset=Rows(),
    callbacks=[dtrain.hf.DtrainCallback()],
).train()
model.save_pretrained("island" + __import__("os").environ["DTRAIN_ISLAND"])
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_launcher_runs_a_trainers_script_by_the_jobs_recipe(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    (tmp_path / "job.toml").write_text('[islands]\ncount = 2\nthreads = 1\n[sync]\nrecipe = "diloco"\nevery = 3\n')
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.launch", "run", "job.toml", "--", "train.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    expected = loops({"recipe": "diloco", "every": 3}, 3)
    for island in range(2):
        got = load_file(tmp_path / f"island{island}" / "model.safetensors")
        torch.testing.assert_close(flat(got), expected[0], rtol=0, atol=1e-6)
        assert (tmp_path / "out" / f"island{island}" / f"checkpoint-{STEPS}" / "model.safetensors").is_file()

"""What does DeepSpeed hear of a job, and which jobs, files and recipes are refused in one line?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dtrain import zero_config
from dtrain.build import build_recipe
from dtrain.config import Job, parse_job
from dtrain.launch import checks


def job_of(folder: Path, said: object, *changes: str) -> Job:
    path = folder / "zero.json"
    path.write_text(said if isinstance(said, str) else json.dumps(said), encoding="utf-8")
    named = (f'islands.deepspeed="{path}"', "islands.engine=deepspeed", "islands.ranks=2", "train.batch=8", "train.accumulate=2")
    return parse_job({}, (*named, *changes))


def test_the_job_says_what_is_its_own_and_the_file_the_rest(tmp_path: Path) -> None:
    """A batch of 8 is 2 ranks' of 2 micro-batches of 2; "auto", as others' files have it, leaves it to the job."""
    said = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "train_batch_size": "auto"}
    config = zero_config.of_job(job_of(tmp_path, said, "train.clip=0.5"))
    assert config["zero_optimization"] == said["zero_optimization"]
    own = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config[key] for key in own] == [8, 2, 2, 0.5]
    clipped = zero_config.of_job(job_of(tmp_path, said | {"gradient_clipping": 3.0}, "train.clip=0.5"))
    assert clipped["gradient_clipping"] == 3.0


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no object"),
        ({}, "zero_optimization.stage = null shards nothing; use 1, 2 or 3, or islands.engine=ddp"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0 shards nothing"),
        ({"train_batch_size": 16}, "train_batch_size = 16, and the job's train.batch is 8; make them alike"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu = 4, and the job's train.batch / (islands.ranks"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps = 1, and the job's train.accumulate is 2"),
        ({"scheduler": {"type": "WarmupLR"}}, 'scheduler = {"type": "WarmupLR"} does not go with dtrain: the learning rate is'),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true does not go with dtrain: its loss scale skips steps"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size = 2 does not go"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, 'offload_param.device = "nvme" is not known'),
    ],
)
def test_a_file_that_says_something_else_is_one_line(tmp_path: Path, said: Any, line: str) -> None:
    if isinstance(said, dict) and said:
        said = {"zero_optimization": {"stage": 1}} | said
    with pytest.raises(ValueError, match=r"zero\.json") as caught:
        zero_config.of_job(job_of(tmp_path, said))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    job = job_of(tmp_path, {})
    (tmp_path / "zero.json").unlink()
    with pytest.raises(ValueError, match=r"zero\.json cannot be read: No such file or directory; name DeepSpeed's JSON file$"):
        zero_config.of_job(job)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["sync.recipe=allreduce"], 'sync.recipe = "allreduce" exchanges gradients before each update'),
        (["sync.recipe=gradient_tracking"], 'sync.recipe = "gradient_tracking" exchanges gradients before each update'),
        (["sync.recipe=beer"], 'sync.recipe = "beer" exchanges gradients before each update'),
        (["sync.recipe=demo"], 'sync.recipe = "demo" exchanges gradients before each update'),
        (["sync.recipe=accum_adam"], 'sync.recipe = "accum_adam" accumulates AdamW\'s moments'),
        (["sync.recipe=muloco"], 'sync.recipe = "muloco" is defined with muon'),
        (["sync.recipe=diloco", "train.optimizer=muon"], "train.optimizer is defined with muon"),
        (["sync.recipe=diloco", "train.optimizer=schedule_free"], "train.optimizer is defined with schedule_free"),
        (["sync.recipe=diloco", "train.sam_rho=0.05"], "train.sam_rho takes a gradient at another place (SAM)"),
    ],
)
def test_an_update_that_deepspeed_does_not_make_is_one_line(tmp_path: Path, changes: list[str], line: str) -> None:
    plain = {"zero_optimization": {"stage": 2}}
    for fits in ("diloco", "decent_adam", "dilocox"):
        job = job_of(tmp_path, plain, f"sync.recipe={fits}")
        zero_config.check(job, build_recipe(job))
    job = job_of(tmp_path, plain, *changes)
    with pytest.raises(ValueError, match=r'"deepspeed" updates by its own step; use islands\.engine=fsdp$') as caught:
        zero_config.check(job, build_recipe(job))
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["islands.engine=ddp"], "islands.deepspeed is of islands.engine = \"deepspeed\", and it is 'ddp'"),
        (["islands.ranks=1"], 'islands.engine = "deepspeed" with islands.ranks = 1 has nobody to share with'),
        (["train.precision=bf16"], 'islands.engine = "deepspeed" has bf16 by its file: {"bf16": {"enabled": true}}'),
        (["train.merge=variance_corrected"], 'train.merge = "variance_corrected" needs each tensor whole on a rank'),
    ],
)
def test_a_job_that_does_not_fit_is_one_line(tmp_path: Path, changes: list[str], line: str) -> None:
    with pytest.raises(ValueError, match=r"^on the command line: ") as caught:
        job_of(tmp_path, {}, *changes)
    assert line in str(caught.value)


def test_the_engine_needs_a_file() -> None:
    with pytest.raises(ValueError, match=r"without islands\.deepspeed: its JSON file says the stage of ZeRO; name it, as"):
        parse_job({}, ["islands.engine=deepspeed", "islands.ranks=2"])


def test_without_deepspeed_the_launcher_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    job = job_of(tmp_path, {"zero_optimization": {"stage": 2}}, "sync.recipe=diloco")
    with pytest.raises(ValueError, match=r"is not installed; in a checkout: pip install '\.\[deepspeed\]'$"):
        checks.check_answers(job, "run")


def test_a_run_finds_the_file_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = parse_job({}, ["islands.engine=deepspeed", "islands.ranks=2", "islands.deepspeed=zero.json"])
    assert checks.with_absolute_paths(job).islands.deepspeed == str(tmp_path / "zero.json")

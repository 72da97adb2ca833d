"""What is DeepSpeed told on an island of a job, and which jobs can it not run? A person's own JSON file, and in it what the job
says of batches, accumulation and clipping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.config import Job
from dtrain.methods import RULES
from dtrain.recipes import Recipe, moments_of, optimizer_of, rho_of

ZERO = "zero_optimization"
"""Of a file of DeepSpeed's, what says how it shards."""
_REFUSED = {
    ("scheduler",): "the learning rate is train.lr's",
    ("fp16", "enabled"): "its loss scale skips steps, and islands would count other ones; use bf16",
    ("bf16", "bf16_master_weights_and_grads"): "islands share fp32 master weights",
    ("fp16", "fp16_master_weights_and_grads"): "islands share fp32 master weights",
    ("managed_gradient_accumulation",): "train.accumulate says how many micro-batches a step has",
    (ZERO, "zero_hpz_partition_size"): "buckets are cut where each rank has one part",
    (ZERO, "mics_shard_size"): "buckets are cut where each rank has one part",
    (ZERO, "zenflow"): "it steps on its own time",
    (ZERO, "offload_optimizer", "super_offload"): "it steps on its own time",
    ("tensor_parallel",): "ranks of an island share its batch",
    ("sequence_parallel_size",): "ranks of an island share its batch",
}
"""What a file may not say, and why."""
_NOTHING = {
    ("managed_gradient_accumulation",): (True,), (ZERO, "zero_hpz_partition_size"): (0, 1), (ZERO, "mics_shard_size"): (-1,),
    ("sequence_parallel_size",): (1,),
}  # fmt: skip
"""What says nothing there, besides false and null."""


def of_job(job: Job) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises ValueError for a file that cannot be read, or says what the job, or dtrain, does not."""
    assert job.islands.deepspeed is not None
    path = Path(job.islands.deepspeed)
    said = _read(path)
    stage = at(said, (ZERO, "stage"))
    if stage not in (1, 2, 3):
        raise ValueError(f"{path}: {ZERO}.stage = {json.dumps(stage)} shards nothing; use 1, 2 or 3, or islands.engine=ddp")
    for key, why in _REFUSED.items():
        value = at(said, key)
        if value not in (None, False, *_NOTHING.get(key, ())):
            raise ValueError(f"{path}: {'.'.join(key)} = {json.dumps(value)} does not go with dtrain: {why}; leave it out")
    for side in ("offload_optimizer", "offload_param"):
        if at(said, (ZERO, side, "device")) == "nvme":
            raise ValueError(f'{path}: {ZERO}.{side}.device = "nvme" is not known to dtrain; use "cpu"')
    train = job.train
    micro = train.batch // (job.islands.ranks * train.accumulate)
    owned = {
        "train_batch_size": (train.batch, "train.batch"),
        "train_micro_batch_size_per_gpu": (micro, "train.batch / (islands.ranks x train.accumulate)"),
        "gradient_accumulation_steps": (train.accumulate, "train.accumulate"),
    }
    for key, (value, whose) in owned.items():
        if said.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f"{path}: {key} = {json.dumps(said[key])}, and the job's {whose} is {value}; make them alike, or leave it out of "
                "the file"
            )
    out = said | {key: value for key, (value, _) in owned.items()}
    if out.get("gradient_clipping", "auto") == "auto":
        out["gradient_clipping"] = train.clip
    out.setdefault("zero_force_ds_cpu_optimizer", False)  # the job's AdamW steps what is offloaded, where the file names none
    return out


def check(job: Job, recipe: Recipe) -> None:
    """``of_job`` for a recipe. Raises ValueError, too, where an update is not one that DeepSpeed makes."""
    of_job(job)
    train, said = job.train, f'sync.recipe = "{recipe.name}"'
    optimizer, rho = optimizer_of(recipe, train.optimizer, train.moments_every), rho_of(recipe, train.sam_rho)
    every = moments_of(recipe, train.moments_every) or 1
    level = next((v for v in recipe.levels if RULES[v.algorithm].rewrites_gradients or v.payload == "gradients"), None)
    if level is not None:
        what = f'sync.recipe = "{level.name}" exchanges gradients before each update'
    elif rho:
        what = f"{'train.sam_rho' if train.sam_rho is not None else said} takes a gradient at another place (SAM)"
    elif optimizer != "adamw":
        what = f'{said if recipe.optimizer is not None else "train.optimizer"} is defined with {optimizer}'
    elif every > 1:
        what = f"{'train.moments_every' if train.moments_every is not None else said} accumulates AdamW's moments"
    else:
        return
    raise ValueError(f'{what}, and islands.engine = "deepspeed" updates by its own step; use islands.engine=fsdp')


def _read(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ValueError(f"islands.deepspeed: {path} cannot be read: {e.strerror}; name DeepSpeed's JSON file") from None
    except ValueError as e:
        raise ValueError(f"islands.deepspeed: {path} is not valid JSON: {e}") from None
    if not isinstance(said, dict):
        raise ValueError(f"islands.deepspeed: {path} holds no object; write DeepSpeed's keys between braces")
    return said


def at(said: Mapping[str, Any], key: tuple[str, ...]) -> Any:
    """What is said there, or None."""
    value: Any = said
    for name in key:
        value = value.get(name) if isinstance(value, dict) else None
    return value

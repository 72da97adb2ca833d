"""What does torch say of itself, of this machine, and of a job's size? A process of its own, which ``dtrain doctor`` asks.

    python -m dtrain.launch.doctor_torch [JOB.toml [section.key=value ...]]    torch's version, Torch, Size or why not
    python -m dtrain.launch.doctor_torch --store HOST:PORT                     "store", or an error where none answers

Each is a line of JSON. torch's version is said before anything else is imported, so that it is known what failed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtrain.launch.doctor import Gpu, Size, Torch

if TYPE_CHECKING:
    from dtrain.config import Job
    from dtrain.recipes import Recipe

_STORE_S = 5.0


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["--store"]:
        from dtrain.membership import meeting_store

        meeting_store(arguments[1], _STORE_S).check(["doctor"])
        print(json.dumps("store"))
        return
    print(json.dumps(torch.__version__), flush=True)
    print(json.dumps(asdict(_torch())), flush=True)
    if arguments:
        print(json.dumps(_of_job(Path(arguments[0]), arguments[1:])))


def _of_job(path: Path, overrides: Sequence[str]) -> dict[str, object]:
    from dtrain.build import build_recipe
    from dtrain.config import load_job
    from dtrain.data.corpus import corpus_of

    job = load_job(path, overrides)
    try:
        recipe = build_recipe(job)
    except ValueError as e:
        return {"refused": str(e)}
    try:
        vocab = corpus_of(job.data).vocab
    except ValueError as e:
        return {"no_text": str(e)}
    return asdict(size_of(job, recipe, vocab))


def _torch() -> Torch:
    import torch.distributed as dist

    from dtrain.kernels import cache_folder, is_compiled

    gpus, error = (), ""
    try:
        gpus = tuple(_gpu(k) for k in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    except RuntimeError as e:  # a GPU that is seen and cannot be used
        error = str(e).partition("\n")[0]
    nccl = None
    if dist.is_nccl_available():
        from torch.cuda import nccl as of_cuda

        nccl = ".".join(map(str, of_cuda.version()))
    return Torch(
        cuda=torch.version.cuda or torch.version.hip,
        gloo=dist.is_gloo_available(),
        nccl=nccl,
        gpus=gpus,
        gpu_error=error,
        cache=str(cache_folder()),
        compiled=is_compiled(),
    )


def _gpu(k: int) -> Gpu:
    seen = torch.cuda.get_device_properties(k)
    free_bytes, total_bytes = torch.cuda.mem_get_info(k)
    return Gpu(seen.name, (seen.major, seen.minor), total_bytes, free_bytes)


def size_of(job: Job, recipe: Recipe, vocab: int) -> Size:
    """Of one island: its weights, its optimizer's numbers and what its recipe keeps, of every level."""
    from dtrain.build import model_of_shapes
    from dtrain.optim import hidden_matrices
    from dtrain.plan.sent import sent
    from dtrain.recipes import moments_of, optimizer_of

    model = model_of_shapes(job, vocab)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    trained, by_muon = sum(map(math.prod, shapes.values())), sum(p.numel() for p in hidden_matrices(model))
    optimizer = optimizer_of(recipe, job.train.optimizer, job.train.moments_every)
    numbers = {"adamw": 2, "muon": 2, "schedule_free": 3, "sgd": 0}[optimizer] * trained
    numbers -= by_muon if optimizer == "muon" else 0
    numbers += trained if (moments_of(recipe, job.train.moments_every) or 1) > 1 else 0
    kept = sum(sent(level, shapes, job.islands.count).state_bytes for level in recipe.levels)
    parameters = sum(p.numel() for p in model.parameters())
    return Size(parameters, kept, 4 * (parameters + numbers) + kept, parameters - trained)


if __name__ == "__main__":
    main(sys.argv[1:])

"""What does a rank of an island with an engine run in tests? The job's own training, on the harness's process group and link."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import dtrain
from dtrain import checkpoint, metrics, waves
from dtrain.bucket import Bucket
from dtrain.config import Job, parse_job
from dtrain.connect import connect, settings_of
from dtrain.core import Core
from dtrain.data.corpus import load_corpus
from dtrain.engines import ranks_of
from dtrain.inside import Batches
from dtrain.island.parts import Parts
from dtrain.membership import place_from_env
from dtrain.metrics import StatusFile
from dtrain.optim import SAM
from dtrain.profiled import Observe, unobserved
from dtrain.sections_each import PIPELINES
from dtrain.shards import local, whole
from dtrain.train import train_island
from tests.unit.by_hand import job_of

_OF_ENGINES = {
    "islands.deepspeed": ("deepspeed",), "islands.shards": ("fsdp", "fsdp+pipeline"), "islands.stages_per_rank": PIPELINES,
}  # fmt: skip
"""Keys that jobs of other engines are refused with."""
_LATER_EPOCHS = 1000
"""For links beyond the one that the harness gives each scenario."""


def staged_job(source: str, *changes: str) -> Job:
    """Two micro-batches, as two stages need; three blocks, so that the stages are unequal."""
    return job_of(
        Path(source), "islands.ranks=2", 'islands.engine="pipeline"', "model.layers=3", "train.accumulate=2", "train.steps=8",
        *changes,
    )  # fmt: skip


def engine_job(source: str, engine: str, ranks: int, *changes: str, micro_batches: int = 0) -> Job:
    """Four blocks, so that two or four stages are possible, and four sequences, which are in so many micro-batches, of all ranks
    together; one a rank or stage where it is not said."""
    accumulate = (micro_batches or ranks) // {"pipeline": 1, "fsdp+pipeline": 2}.get(engine, ranks)
    theirs = [change for change in changes if change.startswith(("model.factory=", "model.arguments="))]
    job = job_of(
        Path(source), f"islands.ranks={ranks}", f'islands.engine="{engine}"', "model.layers=4", "train.batch=4",
        f"train.accumulate={accumulate}", "train.steps=20", *(change for change in changes if change not in theirs),
    )  # fmt: skip
    if not theirs:
        return job
    return parse_job(job.model_dump(exclude_none=True, exclude={"model"}) | {"model": {"context": job.model.context}}, theirs)


def with_engines(
    *, source: str, name: str, changes: list[str], engines: list[tuple[str, int]], micro_batches: int = 0, resume_step: int = 0
) -> dict[str, Any]:
    """Train to the end, each island with an engine and a number of ranks of its own; with ``resume_step`` as ``trained``."""
    torch.set_num_threads(1)
    waves.FLYING_BYTES = 0  # the model's buckets are small, and not all of a round that is waited for are to fly at once
    engine, ranks = engines[place_from_env().island]
    run = Path(os.environ["DTRAIN_RUN"], name)
    others = [key for key, engines in _OF_ENGINES.items() if engine not in engines]
    said = [change for change in changes if change.partition("=")[0] not in others]
    return _once_and_again(engine_job(source, engine, ranks, *said, micro_batches=micro_batches), run, resume_step)


def trained(*, source: str, name: str, changes: list[str], resume_step: int = 0) -> dict[str, Any]:
    """Train to the end; with ``resume_step`` once more from that checkpoint, in a link of its own. What rank 0 finds of the
    weights of both is compared here, the rest in the test."""
    torch.set_num_threads(1)
    return _once_and_again(staged_job(source, *changes), Path(os.environ["DTRAIN_RUN"], name), resume_step)


def _once_and_again(job: Job, run: Path, resume_step: int) -> dict[str, Any]:
    _train(job, run, 0, int(os.environ["DTRAIN_EPOCH"]))
    once = _left(run)
    if not resume_step:
        return {"stats": once[1:]}
    _train(job, run, resume_step, int(os.environ["DTRAIN_EPOCH"]) + _LATER_EPOCHS)
    again = _left(run)
    return {"stats": once[1:], "same": once[0].keys() == again[0].keys() and all(
        torch.equal(once[0][k], again[0][k]) for k in once[0]
    )}  # fmt: skip


def most_bytes(*, source: str, name: str, changes: list[str], engines: list[tuple[str, int]]) -> dict[str, int]:
    """Train, and count the bytes of all tensors of this rank before each step, when gradients are still there, and at each
    fifth time that buckets are at hand: the most of it, and the bytes that the rounds' state had."""
    torch.set_num_threads(1)
    engine, ranks = engines[place_from_env().island]
    counted: list[int] = []
    times = itertools.count()
    at_hand = Parts.at_hand

    @contextmanager
    def counting(self: Parts, buckets: Sequence[Bucket], *, changes: bool) -> Iterator[None]:
        with at_hand(self, buckets, changes=changes):
            yield
            if dist.is_initialized() and next(times) % 5 == 0:  # a count takes a second, and waves of a round are alike
                counted.append(tensor_bytes())

    states: list[int] = []
    Parts.at_hand = counting
    core_init = Core.__init__

    def init(self: Core, *args: Any, **kwargs: Any) -> None:
        core_init(self, *args, **kwargs)
        states.append(sum(x.numel() * x.element_size() for lane in self.lanes for x in lane.state.values()))

    Core.__init__ = init
    job = engine_job(source, engine, ranks, *changes)

    def observe(step: int) -> None:
        counted.append(tensor_bytes())
        if step == job.train.steps - 1:
            raise _Enough

    with suppress(_Enough):
        _train(job, Path(os.environ["DTRAIN_RUN"], name), 0, int(os.environ["DTRAIN_EPOCH"]), observe)
    return {"most": max(counted), "state": sum(states)}


def between_micro_batches(*, source: str, name: str, engine: str, ranks: int, changes: list[str]) -> int:
    """The bytes of all tensors of this rank when the second of two steps has done the first of two micro-batches."""
    torch.set_num_threads(1)
    job = engine_job(source, engine, ranks, 'sync.recipe="local"', *changes, micro_batches=2 * ranks)
    found, part = dict[tuple[int, int], int](), Batches.part

    def counting(self: Batches, step: int, number: int, *, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        found[step, number % 2] = tensor_bytes()
        if (step, number % 2) == (1, 1):
            raise _Enough
        return part(self, step, number, size=size)

    Batches.part = counting
    with suppress(_Enough):
        _train(job, Path(os.environ["DTRAIN_RUN"], name), 0, int(os.environ["DTRAIN_EPOCH"]), unobserved)
    return found[1, 1]


class _Enough(Exception):
    """What is asked for has been seen; all ranks stop at one step."""


def own_loop(*, recipe: str, every: int, codec: str, rho: float = 0.0) -> list[list[float]]:
    """Somebody's own loop over a model that ``fully_shard`` has sharded, or over a plain one where there is one rank. What the
    model is after the merge."""
    torch.set_num_threads(1)
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 3))
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(k)) / 3)
    if ranks > 1:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sam = SAM(optimizer, rho=rho) if rho else None
    with dtrain.join(model, sam or optimizer, recipe=recipe, every=every, codec=codec, bucket_bytes=256, clip=0.5) as sync:
        for step in range(12):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(100 * sync.island + step)).chunk(ranks)[rank]

            def gradient(x: torch.Tensor = x) -> None:
                optimizer.zero_grad()
                (model(x) - x[:, :3].sin()).square().mean().backward()

            if sam is None:
                gradient()
            else:
                sam.gradient(gradient)
            optimizer.step()
        sync.merge()
    return [whole(p.detach()).flatten().tolist() for p in model.parameters()]


def short_loop(*, short: int) -> dict[str, Any]:
    """A loop over a sharded model, with a round after each of 6 steps, that is waited for; on one island one step less. Of a
    round's waves two fly."""
    torch.set_num_threads(1)
    waves.FLYING_BYTES = 0
    model = nn.Linear(256, 128, bias=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with dtrain.join(model, optimizer, recipe="diloco", every=1, codec="identity", bucket_bytes=16384) as sync:
        for step in range(6 - (sync.island == short)):
            optimizer.zero_grad()
            x = torch.randn(8, 256, generator=torch.Generator().manual_seed(100 * sync.island + step))
            (model(x) - x[:, :128]).square().mean().backward()
            optimizer.step()
        sent = sync.stats().wire_bytes_sent
    return {"x": [whole(p.detach()).flatten().tolist() for p in model.parameters()], "sent": sent}


def tensor_bytes() -> int:
    """Of all tensors that Python sees, each piece of memory once."""
    gc.collect()
    found: dict[int, int] = {}
    for x in gc.get_objects():
        if isinstance(x, torch.Tensor) and not x.is_meta:
            held = local(x.detach()).untyped_storage()
            found[held.data_ptr()] = held.nbytes()
    return sum(found.values())


def _train(job: Job, run: Path, resume_step: int, epoch: int, observe: Observe = unobserved) -> None:
    place = place_from_env()
    logs = run / "logs" / f"island{place.island}"
    if place.rank == 0:
        logs.mkdir(parents=True, exist_ok=True)
    if place.num_ranks > 1:
        dist.barrier()
    cpu = torch.device("cpu")
    inside = ranks_of(job.islands.engine, uneven=place.num_lanes > 0)
    connection = connect(place, settings_of(job.link), device=cpu, epoch=epoch, inside=inside)
    status = StatusFile(logs / "status.json", job.train.steps, job.link.timeout_s)
    train_island(job, connection, load_corpus(job.data.source), run, status, device=cpu, resume_step=resume_step, observe=observe)
    if place.num_ranks > 1:
        dist.barrier()


def _left(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """This island's weights before the merge, and its share of the summary."""
    island = place_from_env().island
    return checkpoint.load_weights(run / "islands" / f"island{island}.safetensors"), metrics.read_json(
        run / "logs" / f"island{island}" / "part.json"
    )

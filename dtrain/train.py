"""What does one island do from start to end? Build, align, train, checkpoint, merge, evaluate.

This is what torchrun runs on every rank (``dtrain train JOB.toml``) and what ``dtrain sim`` runs in a thread for each
virtual island."""

from __future__ import annotations

import functools
import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrain import checkpoint, engines, start
from dtrain.assemble import prepare_kernels
from dtrain.build import build_model, build_recipe, moved_bytes
from dtrain.clock import Clock
from dtrain.config import Job
from dtrain.connect import Connection, connect, settings_of
from dtrain.data.corpus import Corpus, corpus_of
from dtrain.data.sampler import heldout_sequences
from dtrain.engine import Sync
from dtrain.errors import NonFinite, Regroup
from dtrain.hf_model import save_config
from dtrain.inside import Batches, Inside
from dtrain.island.device import own_device
from dtrain.island.zero import Zero
from dtrain.loggers import loggers_of
from dtrain.looks import look
from dtrain.membership import Notice, Place
from dtrain.metrics import MetricsWriter, Part, State, StatusFile, write_part
from dtrain.optim import SAM, at_averages, cosine_lr
from dtrain.own_model import check_logits
from dtrain.profile_steps import Window
from dtrain.profiled import Observe, Profiled, unobserved
from dtrain.recipes import rho_of
from dtrain.saves import Saves
from dtrain.spans import span
from dtrain.updates import Updates
from dtrain.wait import Stats

_STATUS_EVERY_S = 0.5
_IN_STEP = timedelta(days=1)
"""An island's ranks wait for the one of them that waits for the link, as long as its bytes take, or hashes a checkpoint. NCCL
would end them after 10 minutes, gloo after 30; the link has its own limit, and a rank that dies ends its torchrun. Of an island
of several machines one that freezes, or whose network is cut, is noticed by nobody else: what this ends a day later, if no
round and its ``link.timeout_s`` come first."""


def cpu_threads(job: Job, island: int = 0) -> int:
    """Threads a rank. The number is part of a run's arithmetic, so live runs and the simulator take the same."""
    return job.islands.threads or max(1, (os.cpu_count() or 1) // job.ranks_beside(island))


def run_island(job: Job, place: Place, window: Window | None = None) -> None:
    """One rank of one island, under torchrun. Goes back to the last commit and on when a lost island has come
    back. The steps of ``window`` are profiled."""
    assert place.run is not None
    torch.set_num_threads(cpu_threads(job, place.island))
    device = own_device("islands.ranks" if job.islands.each is None else f"islands.each.{place.island}.ranks")
    job = job.seen_by(place.island)
    if place.num_ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_IN_STEP)
    corpus = corpus_of(job.data)
    status = StatusFile(
        place.run / "logs" / f"island{place.island}" / "status.json", job.train.steps, job.link.timeout_s
    )

    for level in build_recipe(job).levels:
        prepare_kernels(level, device, lambda: status.update("compiling", 0))

    def on_wait(missing: tuple[int, ...], waited_s: float, limit_s: float) -> None:
        # Whichever rank waits for the link: the others wait for it, inside a collective, and cannot say so.
        status.update("waiting", 0, waiting_for=missing, waited_s=waited_s)

    settings = settings_of(job.link, job.sync.level)
    epoch, resume_step, observe = place.epoch, place.resume_step, unobserved
    with ExitStack() as held:
        if window is not None:
            observe = held.enter_context(Profiled(window, place, device)).before_step
        while True:
            try:
                inside = engines.ranks_of(job.islands.engine, uneven=place.num_lanes > 0)
                connection = connect(place, settings, device=device, epoch=epoch, on_wait=on_wait, inside=inside)
                train_island(job, connection, corpus, place.run, status, device=device, resume_step=resume_step, observe=observe)
                break
            except Regroup as again:
                epoch, resume_step = again.epoch, again.step
            gc.collect()  # what trained so far lies in cycles, and a GPU may have no room for two
    if place.num_ranks > 1:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class _Island:
    """What one rank trains with."""

    job: Job
    corpus: Corpus
    run: Path
    status: StatusFile
    connection: Connection
    model: nn.Module
    """What this rank trains: all of the model, or its stage."""
    inside: Inside
    updates: Updates
    sam: SAM | None
    sync: Sync
    heldout: tuple[Tensor, Tensor]
    clock: Clock
    first_step: int
    """Where these islands began: 0, or where those before them, of another number, were merged."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.updates.optimizers

    @property
    def speaks(self) -> bool:
        """Whether this rank writes the island's files."""
        return self.connection.ranks.rank == 0


def train_island(
    job: Job,
    connection: Connection,
    corpus: Corpus,
    run: Path,
    status: StatusFile,
    *,
    device: torch.device,
    resume_step: int,
    observe: Observe = unobserved,
    computing: AbstractContextManager[object] | None = None,
) -> None:
    """Train from ``resume_step`` to the end over a ready connection. Raises Regroup and PeerLost from the link.

    ``computing`` is held while a model is computed: islands of one process take turns on the cores."""
    with _failure_announced(connection):
        computing = computing or nullcontext()
        island = _begin(
            job, connection, corpus, run, status, device=device, resume_step=resume_step, computing=computing
        )
    with island.sync:
        island.clock.begun = time.monotonic()
        _loop(island, observe)
        _finish(island)


@contextmanager
def _failure_announced(connection: Connection) -> Iterator[None]:
    """An island that cannot begin (a damaged checkpoint) is not waited for by those that could."""
    begun = False
    try:
        yield
        begun = True
    finally:
        if not begun:
            connection.membership.announce(Notice(0, 0, failed=True))


def _begin(
    job: Job,
    connection: Connection,
    corpus: Corpus,
    run: Path,
    status: StatusFile,
    *,
    device: torch.device,
    resume_step: int,
    computing: AbstractContextManager[object],
) -> _Island:
    """Model, optimizer and sync as they were at ``resume_step``."""
    wall_begun = time.monotonic()
    ranks, whole = connection.ranks, build_model(job, corpus, connection.node)
    shapes = {name: x.to("meta") for name, x in whole.state_dict().items()}
    begin = start.start(run, connection.node, resume_step, whole)
    if job.model.theirs and not ranks.whole:  # a forward pass without a backward one would leave parts gathered
        check_logits(whole, job.model, corpus.vocab)
    model = engines.trained(job, whole, ranks, device)
    if job.model.theirs and ranks.whole:
        check_logits(model, job.model, corpus.vocab)
    recipe = build_recipe(job)
    updates = engines.updates_of(job, recipe, model)
    saved = start.read(run, connection, begin.step, model) if begin.of_checkpoint else {}
    time_s, aside_s, wall_s = (float(saved.get(f"clock.{name}", 0.0)) for name in ("time_s", "aside_s", "wall_s"))
    if begin.step and not saved:  # islands of another number trained until here: their time is the run's, and not these islands'
        time_s = aside_s = checkpoint.weights_time_s(run / "init.safetensors")
    clock = Clock(time_s, 0.0, aside_s, wall_s, wall_begun)
    clip = None if isinstance(model, Zero) else job.train.clip  # DeepSpeed's step clips
    sync = Sync(model, updates.optimizers, recipe, connection, clip=clip, seed=job.job.seed, scaler=None)
    if saved:
        start.restore(run, connection, saved, begin.step, model, updates, sync)
    else:
        sync.begin_after(begin.step)
    inputs, targets = heldout_sequences(corpus, job.model.context)
    heldout, batches = (inputs.to(device), targets.to(device)), Batches(job, corpus, connection, device)
    inside = engines.inside_of(job, model, shapes, batches, heldout, connection, computing)
    first_step = int(saved.get("first_step", begin.step))
    rho = rho_of(recipe, job.train.sam_rho)
    return _Island(
        job=job, corpus=corpus, run=run, status=status, connection=connection, model=model, inside=inside, updates=updates,
        sam=SAM(updates.optimizers, rho=rho, joined=ranks.joined) if rho else None, sync=sync, heldout=heldout, clock=clock,
        first_step=first_step,
    )  # fmt: skip


def _metrics(island: _Island) -> MetricsWriter:
    node = island.connection.node
    return MetricsWriter(island.run / "metrics.jsonl", node, loggers_of(island.job, island.run, node, island.sync.step))


def _loop(island: _Island, observe: Observe) -> None:
    job, sync, clock = island.job, island.sync, island.clock
    metrics = _metrics(island) if island.speaks else None
    floor = 1.0 if job.train.optimizer == "schedule_free" else 0.1  # of the learning rate, which then stays after its warm-up
    saves = Saves([level.core for level in sync.levels], every=job.train.checkpoint_every, last=job.train.steps)
    said_at, began = 0.0, clock.train_s()
    for step in range(sync.step, job.train.steps):
        observe(step)
        if island.speaks and time.monotonic() - said_at > _STATUS_EVERY_S:
            island.status.update("training", step)
            said_at = time.monotonic()
        lr = cosine_lr(step, steps=job.train.steps, warmup=job.train.warmup, peak=job.train.lr, floor=floor)
        island.updates.set_lr(lr)
        loss, tokens = _step_or_idle(island, step)
        ended = clock.train_s()
        seen = look(job, sync, island.inside, island.optimizers, clock, step + 1, functools.partial(_say, island))
        if metrics is not None:
            stats, adapted = sync.stats(), sync.core.adapted(step + 1)
            metrics.line(
                step=step + 1, loss=loss,
                tokens=tokens, tokens_per_s=tokens / max(ended - began, 1e-9) if tokens else None,
                wire_bytes_sent=stats.wire_bytes_sent, wire_bytes_received=stats.wire_bytes_received, wait_s=stats.wait_s,
                lr=lr,
                time_s=clock.time_s(),
                eval_loss=seen.eval_loss,
                eval_loss_merged=seen.eval_loss_merged,
                consensus_distance=seen.consensus_distance,
                wire_bytes_sent_near=stats.wire_bytes_sent_near if sync.recipe.near is not None else None,
                rounds_joined=stats.rounds_joined, rounds_left_out=stats.rounds_left_out,
                every_steps=adapted.every_steps, rank_mean=adapted.rank_mean,
            )  # fmt: skip
        if saves.after(step + 1):
            _checkpoint_aside(island, step + 1)
        began = ended
    observe(job.train.steps)
    if metrics is not None:
        metrics.close()


def _step_or_idle(island: _Island, step: int) -> tuple[float | None, int]:
    """The loss, and how many tokens it is of. Batches and learning rates are those of the step's number, also where some are
    idle, so none comes twice."""
    if island.sync.idle:
        island.sync.sit_out()
        return None, 0
    return _step(island, step), island.job.train.batch * island.job.model.context


def _step(island: _Island, step: int) -> float:
    """One optimizer step; returns the island's mean loss in nats a token, where the model was."""
    if island.sam is None:
        total = _gradient(island, step)
    else:
        total = island.sam.gradient(lambda: _gradient(island, step))
    with span("optimizer", moved_bytes(island.optimizers)):
        island.updates.step(island.sync)
    return total


def _gradient(island: _Island, step: int) -> float:
    """Forward and backward over the island's batch; returns the island's mean loss."""
    ranks = island.connection.ranks
    island.updates.clear()
    total = ranks.total([island.inside.gradient(step)])[0]
    if not math.isfinite(total):
        raise NonFinite(f"step {step + 1}: the loss is {total}; lower train.lr, or set train.clip")
    return total


def _say(island: _Island, state: State, step: int) -> None:
    if island.speaks:
        island.status.update(state, step)


def _checkpoint_aside(island: _Island, step: int) -> None:
    island.sync.settle()  # waiting for the link is not put aside: stats() count it too
    with island.clock.aside():
        _say(island, "training", step)  # no longer "waiting", if that was said last
        _save(island, step)


def _save(island: _Island, step: int) -> None:
    rank, prefix, clock = island.connection.ranks.rank, island.connection.ranks.prefix, island.clock
    numbers = {"time_s": clock.time_s(), "aside_s": clock.aside_s, "wall_s": clock.wall_s()}
    tensors = (
        start.model_tensors(island.model, island.connection)
        | island.updates.tensors(prefix)
        | checkpoint.averaged_names(island.optimizers, island.model, prefix)
        | {f"{prefix}sync.{k}": v for k, v in island.sync.state_dict().items()}
        | {f"rng{rank}": torch.get_rng_state()}
        | {f"clock.{name}": torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        | {"first_step": torch.tensor(island.first_step)}
    )
    checkpoint.save_island(
        island.run, step, island.connection.node, tensors, rank=rank, num_ranks=island.connection.ranks.num_ranks
    )


def _finish(island: _Island) -> None:
    """Evaluate the single model, merge exactly, evaluate again, and leave the island's share of the summary."""
    job, node, sync, inside = island.job, island.connection.node, island.sync, island.inside
    steps = job.train.steps
    sync.settle()  # the last round's bytes are training's, also where it lands in the merge
    train_s = island.clock.train_s()
    stats = sync.stats()
    _say(island, "evaluating", steps)
    with at_averages(island.optimizers):
        own_loss, own_weights = inside.evaluate(), inside.weights()
        if island.speaks:
            checkpoint.save_weights(island.run / "islands" / f"island{node}.safetensors", own_weights, step=steps)
        del own_weights
    _say(island, "merging", steps)
    sync.drain()  # what lands moves parameters as they are trained
    with at_averages(island.optimizers):
        _merge(island, train_s, stats, own_loss)


def _merge(island: _Island, train_s: float, stats: Stats, own_loss: float) -> None:
    """The rest of ``_finish``: ``train_s``, ``stats`` and ``own_loss`` are of before the merge."""
    job, node, sync, inside = island.job, island.connection.node, island.sync, island.inside
    steps, pace, adapted = job.train.steps, sync.core.plan.pace, sync.core.adapted()
    distance = sync.merge() if job.train.merge == "mean" else sync.merge_corrected()
    merge_bytes = sync.stats().wire_bytes_merge - stats.wire_bytes_merge
    merged_loss = inside.evaluate()
    merged_weights = inside.weights() if node == 0 else {}
    if not island.speaks:
        return
    if node == 0:
        checkpoint.save_weights(island.run / "model.safetensors", merged_weights, step=steps)
        if job.model.hf:
            save_config(island.model.engine.module if isinstance(island.model, Zero) else island.model, island.run)
    part = Part(
        island=node,
        islands=island.connection.num_nodes,
        ranks=island.connection.ranks.num_ranks,
        recipe=sync.recipe.title,
        parameters=inside.parameters,
        steps=steps,
        first_step=island.first_step,
        tokens=(pace.trained(node, steps) - pace.trained(node, island.first_step)) * job.train.batch * job.model.context,
        wall_s=island.clock.wall_s(),
        train_s=train_s,
        compute_s=train_s - stats.wait_s,
        wait_s=stats.wait_s,
        wire_bytes_sent=stats.wire_bytes_sent, wire_bytes_received=stats.wire_bytes_received,
        wire_bytes_start=stats.wire_bytes_start, wire_bytes_merge=merge_bytes, wire_bytes_consensus=stats.wire_bytes_merge,
        eval_loss=merged_loss,
        eval_loss_island=own_loss,
        eval_tokens=island.heldout[1].numel(),
        bytes_per_token=island.corpus.bytes_per_token,
        consensus_distance=distance,
        corpus_hash=island.corpus.hash,
        meetings=sync.core.meetings,
        wire_bytes_sent_near=stats.wire_bytes_sent_near if sync.recipe.near is not None else None,
        rounds_joined=stats.rounds_joined, rounds_left_out=stats.rounds_left_out,
        every_steps=adapted.every_steps, rank_mean=adapted.rank_mean,
    )  # fmt: skip
    write_part(island.run / "logs" / f"island{node}", part)
    _say(island, "done", steps)

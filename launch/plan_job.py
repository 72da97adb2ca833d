"""What is a job planned with? Its model's shapes, how long its step takes, and what its link gives: measured here, or said."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import cast

import torch
from rich.console import Console
from torch import nn

from dtrain import metrics, units
from dtrain.build import model_of_shapes
from dtrain.config import Job, load_job
from dtrain.connect import settings_of
from dtrain.data.corpus import corpus_of
from dtrain.engine_fits import Shape, sharing_batch
from dtrain.island.stages import StagesOfRank
from dtrain.launch.checks import STEPS_ALONE
from dtrain.launch.local import run_local
from dtrain.launch.plan_room import check_room
from dtrain.launch.plan_shards import shards_of
from dtrain.launch.run_folder import Choice, open_run
from dtrain.models.gpt import GPT
from dtrain.models.gpt_stage import GPTStage
from dtrain.optim import hidden_matrices
from dtrain.plan import accelerators, unequal
from dtrain.plan.accelerators import Work
from dtrain.plan.company import LinkSpeed
from dtrain.plan.model import Carrying, Island
from dtrain.plan.plans import Setting, time_text
from dtrain.plan.sent import Shapes
from dtrain.recipes import of_section, optimizer_of
from dtrain.sections_each import PIPELINES

_WARM_STEPS, _STEPS = 10, 40
JITTER = 0.02
"""Standard deviation of a step that was not measured, as a part of it."""
_ASSUMED_MEMORY_BYTES_PER_S = 4e9
"""What one CPU core encodes int8 with; a step that was said may be any machine's."""
_ASSUMED_CARRYING = Carrying(0.2e-3, 1e-3, 0.5e-9)
"""CPU seconds of a phase, a wire and a byte: what probes found on cores of 2020s servers, 0 to 0.7 ms, 1.4 to 1.8 ms with others
at work on the machine, and 0.2 to 1.8 ms a megabyte. An order of magnitude, without which a thousand wires would be free."""
_ASSUMED_INTRA_BYTES_PER_S = 16e9
"""Half of what PCIe 4.0 x16 carries each way."""
_SPREAD = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations: steps that the system disturbed do not count."""


_SHARED = (
    ", which share its cores: while one waits by chance the others compute faster, so that such waits are neither added to a "
    "step nor counted; a run shows some, and --jitter counts them, as of islands with cores of their own"
)
"""Steps of speed.json's four islands on two cores, which were waited for 3 to 10 ms where no link was slow, took 75 to 79 ms, no
longer than the 81 to 87 that were planned without any waits: there is nothing to add. What would be waited for follows from how
the system shares its cores among threads, of which a step's spread says nothing."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the command line says; None is measured, or taken from the job."""

    step_s: float | None = None
    jitter_s: float | None = None
    bits_per_s: float | None = None
    rtt_s: float | None = None
    near_bits_per_s: float | None = None
    per_host: int = 1
    gpu: str | None = None
    mfu: float | None = None
    intra_bits_per_s: float | None = None

    @property
    def measures_steps(self) -> bool:
        return self.gpu is None and self.step_s is None


def setting_of(job_file: Path, overrides: Sequence[str], job: Job, said: Said, console: Console) -> tuple[Setting, list[str]]:
    """The setting, and a line for each of the things that it was made of."""
    notes: list[str] = []
    if said.measures_steps and job.sim.step_s:
        said = replace(said, step_s=job.sim.step_s)
    model, vocab = _model(job)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    stages, in_flight, shards = _stages(job, model), _in_flight(job), shards_of(job)
    if job.model.theirs:
        work = _own_work(job, model, vocab)
        notes.append(
            f"model.{job.model.theirs} is taken for {work.layers} layers (its longest nn.ModuleList) of width {work.width} (its "
            "embeddings')"
        )
    else:
        work = max((_work(job, of) for of in stages or [shapes]), key=lambda w: w.flop)
        work = replace(work, parameters=max(_numel(of) for of in stages or [shapes]))
    intra_bytes_per_s = _intra(job, said)
    step_s, jitter_s, island = _computes(job_file, overrides, job, said, work, console, notes)
    if stages:
        notes.append(
            f"an island's ranks are {_stages_said(job)}, busy {_busy(job):.0%} of a step where one is as long as another; what "
            "passes between them is not counted"
        )
    if len(stages) < job.islands.ranks > 1:
        notes.append(_intra_note(said, intra_bytes_per_s))
    link = unequal.with_links(job, _link(job, said, notes))
    notes += unequal.note(job)
    setting = Setting(
        shapes=shapes,
        work=work,
        vocab=vocab,
        tokens_per_step=job.train.batch * job.model.context,
        num_ranks=job.islands.ranks,
        micro_batches=job.train.accumulate,
        in_flight=in_flight,
        moments_every=job.train.moments_every,
        sam_rho=job.train.sam_rho,
        optimizer=job.train.optimizer,
        hidden=sum(p.numel() for p in hidden_matrices(model)) if not stages else _hidden(model, max(stages, key=_numel)),
        factors=lambda num_islands: unequal.factors_of(job, num_islands),
        number_bytes=2 if job.train.precision == "bf16" else shards.number_bytes,
        gpu=said.gpu,
        stages=stages,
        stages_per_rank=job.islands.stages_per_rank,
        gpu_bytes=None if said.gpu is None else accelerators.accelerator(said.gpu).memory_bytes,
        per_host=said.per_host,
        seed=job.job.seed,
        shards=shards,
        recomputes=job.islands.recompute,
        link=link,
        island=lambda codec: replace(
            island(codec), step_s=step_s, jitter_s=jitter_s, num_ranks=job.islands.ranks, intra_bytes_per_s=intra_bytes_per_s
        ),
    )
    return setting, notes


def _model(job: Job) -> tuple[nn.Module, int]:
    vocab = corpus_of(job.data).vocab
    return model_of_shapes(job, vocab), vocab


def _stages(job: Job, model: nn.Module) -> list[Shapes]:
    """What each rank has of the model, where they are stages of a pipeline."""
    if job.islands.engine not in PIPELINES:
        return []
    ranks = _stage_ranks(job)
    num_stages = ranks * job.islands.stages_per_rank
    cut = [GPTStage(cast(GPT, model), stage, num_stages) for stage in range(num_stages)]
    parts = [StagesOfRank({stage: cut[stage] for stage in range(rank, num_stages, ranks)}) for rank in range(ranks)]
    return [{name: tuple(p.shape) for name, p in part.named_parameters()} for part in parts]


def _stage_ranks(job: Job) -> int:
    """Ranks that pass a batch on, each of which has stages of its own; 1 without a pipeline."""
    return job.islands.ranks // job.islands.shards_of_stage if job.islands.engine in PIPELINES else 1


def _stages_said(job: Job) -> str:
    ranks, each, shards = _stage_ranks(job), job.islands.stages_per_rank, job.islands.shards_of_stage
    return f"{ranks * each} stages{f', {each} a rank' * (each > 1)}{f', each shared by {shards} ranks' * (shards > 1)}"


def _in_flight(job: Job) -> int:
    """Micro-batches of which the first rank holds the activations at once: 1F1B's are as many as there are stages; interleaved,
    where a stage is a part of what a rank has, those of the warm-up and one more (torch's ScheduleInterleaved1F1B)."""
    ranks, each, micro_batches = _stage_ranks(job), job.islands.stages_per_rank, job.train.accumulate
    if each == 1:
        return ranks
    a_round = micro_batches // (micro_batches // ranks)
    return min(micro_batches, math.ceil(((each - 1) * a_round + 2 * (ranks - 1) + 1) / each))


def _sharing(job: Job) -> int:
    """Ranks among which an island's batch is divided."""
    return sharing_batch(job.islands, Shape("", job.islands.ranks, job.islands.engine))[0]


def _work(job: Job, shapes: Shapes) -> Work:
    """Of a rank that has these parameters: of all tokens where it is a stage, else of its share."""
    m, total = job.model, _numel(shapes)
    layers = sum(name.endswith(".qkv.weight") for name in shapes)
    looked_up = math.prod(shapes.get("embedding.weight", (0,)))
    tokens = job.train.batch * m.context // _sharing(job)
    return Work(tokens, total, total - looked_up, layers, m.width, m.context)


def _own_work(job: Job, model: nn.Module, vocab: int) -> Work:
    """Of somebody's own model: its layers are the longest nn.ModuleList, its width that of its embeddings, which no token is
    multiplied with unless they are the head too, and then once."""
    total = sum(p.numel() for p in model.parameters())
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if any(p is table for table in tables)]
    tied = len(names) > len(tables)
    looked_up = sum(table.numel() for table in tables if not (tied and table.shape[0] == vocab))
    layers = max((len(m) for m in model.modules() if isinstance(m, nn.ModuleList)), default=0)
    width = max((table.shape[1] for table in tables), default=0)
    tokens = job.train.batch * job.model.context // job.islands.ranks
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return Work(tokens, total, total - looked_up, layers, width, job.model.context, frozen)


def _hidden(model: nn.Module, stage: Shapes) -> int:
    """Parameters of a stage that Muon would step."""
    matrices = {id(p) for p in hidden_matrices(model)}
    return sum(p.numel() for name, p in model.named_parameters() if name in stage and id(p) in matrices)


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _busy(job: Job) -> float:
    """Of a step, that a rank computes: the first stage has work before the last, and the last before the first is done."""
    return job.train.accumulate / (job.train.accumulate + (_stage_ranks(job) - 1) / job.islands.stages_per_rank)


def _computes(
    job_file: Path, overrides: Sequence[str], job: Job, said: Said, work: Work, console: Console, notes: list[str]
) -> tuple[float, float, Callable[[str], Island]]:
    """Seconds of a step, their standard deviation, and what a codec costs."""
    if said.step_s is not None:
        rate, whose = _ASSUMED_MEMORY_BYTES_PER_S, "assumed, as of one CPU core; --gpu names another"
        if said.gpu is not None:
            rate = accelerators.accelerator(said.gpu).memory_bytes_per_s * accelerators.MEMORY_SHARE
            whose = f"{accelerators.MEMORY_SHARE:.0%} of the memory's of {said.gpu}"
        step_s = said.step_s
        notes.append(
            f"a step takes {time_text(step_s)}, as was said{_without_sam(job)}, and carrying wires takes nothing from it; "
            f"encoding and landing move {rate / 1e9:.4g} GB/s, {whose}"
        )
        notes.append(_carrying_note(_ASSUMED_CARRYING, "assumed"))
        return step_s, _jitter(job, said, step_s, notes), lambda codec: Island(step_s, 0.0, rate, *_ASSUMED_CARRYING)
    if said.gpu is not None:
        gpu, mfu = accelerators.accelerator(said.gpu), said.mfu or accelerators.MFU
        flop_per_s = accelerators.peak(gpu, said.gpu, job.train.precision)
        step_s = accelerators.step_s(work, gpu, mfu * flop_per_s * _busy(job), _sharing(job), _intra(job, said))
        notes.append(
            f"a step takes {time_text(step_s)}{_without_sam(job)}, not measured: {said.gpu} at {mfu:.0%} of "
            f"{flop_per_s / 1e12:.4g} TFLOP/s in {job.train.precision} ({gpu.source}); small models reach less, --mfu says "
            "how much"
        )
        notes.append(_carrying_note(_ASSUMED_CARRYING, "assumed, and hidden where a round is, as its cores do nothing else"))
        rate = gpu.memory_bytes_per_s * accelerators.MEMORY_SHARE
        return step_s, _jitter(job, said, step_s, notes), lambda codec: Island(step_s, 0.0, rate, *_ASSUMED_CARRYING)
    from dtrain.plan.probe import memory_bytes_per_s, probe_carrying

    check_room(job, work)
    times = measure_steps(job_file, overrides, console)
    step_s = median(times)
    spread_s = _SPREAD * median(abs(t - step_s) for t in times)
    crowd = _crowd(job)
    shared = crowd > 1
    jitter_s = said.jitter_s if said.jitter_s is not None else 0.0 if shared else spread_s
    notes.append(
        f"a step takes {step_s * 1e3:.3g} ms, {spread_s * 1e3:.2g} ms more or less{_without_sam(job)}: the median of "
        f"{len(times)}, of {job.islands.count} islands at once on this machine"
        + (_SHARED if shared and said.jitter_s is None else "")
    )
    carrying = probe_carrying()
    notes.append(_carrying_note(carrying, "measured between islands of one process"))
    return step_s, jitter_s, lambda codec: Island(step_s, 0.0, memory_bytes_per_s(codec), *carrying, crowd)


def _without_sam(job: Job) -> str:
    return " without SAM, which doubles it" if job.train.sam_rho else ""


def _jitter(job: Job, said: Said, step_s: float, notes: list[str]) -> float:
    """Of a step that is not measured."""
    if said.jitter_s is not None:
        return said.jitter_s
    if (noise_s := unequal.jitter_of(job, step_s)) is not None:
        notes.append(f"its standard deviation is {noise_s * 1e3:.2g} ms, as sim.step_noise says")
        return noise_s
    jitter_s = JITTER * step_s
    notes.append(f"its standard deviation is {jitter_s * 1e3:.2g} ms, assumed as {JITTER:.0%} of it; --jitter says another")
    return jitter_s


def _carrying_note(carrying: Carrying, how: str) -> str:
    phase_ms, wire_ms, megabyte_ms = carrying.phase_s * 1e3, carrying.wire_s * 1e3, carrying.wire_s_per_byte * 1e9
    return (
        f"carrying takes CPU time: {phase_ms:.2g} ms a round of a bucket, {wire_ms:.2g} ms a wire, {megabyte_ms:.2g} ms a "
        f"megabyte, {how}"
    )


def _intra(job: Job, said: Said) -> float:
    """Bytes a second between an island's ranks."""
    if job.islands.ranks == 1:
        return math.inf
    if said.intra_bits_per_s is not None:
        return said.intra_bits_per_s / 8
    if said.gpu is not None:
        return accelerators.accelerator(said.gpu).intra_bytes_per_s * accelerators.INTRA_SHARE
    return _ASSUMED_INTRA_BYTES_PER_S


def _intra_note(said: Said, bytes_per_s: float) -> str:
    whose = "assumed, half of PCIe 4.0 x16; --intra says another"
    if said.intra_bits_per_s is not None:
        whose = "as was said"
    elif said.gpu is not None:
        whose = f"{accelerators.INTRA_SHARE:.0%} of what {said.gpu} has; --intra says another"
    return f"an island's ranks exchange {bytes_per_s / 1e9:.4g} GB/s: what has landed, {whose}"


def _crowd(job: Job) -> float:
    """Threads that compute, a core; 0 where a GPU does and the cores are free for what is carried."""
    from dtrain.train import cpu_threads

    if torch.cuda.is_available():
        return 0.0
    threads = job.islands.count * job.islands.ranks * cpu_threads(job)
    cores = len(os.sched_getaffinity(0))
    return threads / cores if threads >= cores else 0.0


def _link(job: Job, said: Said, notes: list[str]) -> LinkSpeed:
    near = said.near_bits_per_s
    if said.bits_per_s is not None:
        rtt_s = said.rtt_s if said.rtt_s is not None else units.seconds(job.link.rtt)
        found = LinkSpeed(said.bits_per_s, rtt_s)
        rate = f"{said.bits_per_s / 1e6:g} Mbit/s an island"
        whose = "as was said" if said.rtt_s is not None else "as was said, and the job's link.rtt"
        notes.append(f"the link carries {rate}, {rtt_s * 1e3:g} ms there and back, {whose}")
    else:
        from dtrain.plan.probe import probe_link

        found = probe_link(settings_of(job.link))
        assert found.far_bits_per_s is not None
        notes.append(
            f"the link carries {found.far_bits_per_s / 1e6:.4g} Mbit/s an island, {found.rtt_s * 1e3:.3g} ms there and back: "
            "measured between two islands on this machine, with the job's link settings"
        )
        if said.rtt_s is not None:
            found = replace(found, rtt_s=said.rtt_s)
    if near is not None:
        notes.append(f"{said.per_host} islands a host have {near / 1e6:g} Mbit/s among them")
        return replace(found, near_bits_per_s=near)
    return replace(found, near_bits_per_s=found.far_bits_per_s, near_rtt_s=found.rtt_s)


def measure_steps(job_file: Path, overrides: Sequence[str], console: Console) -> list[float]:
    """Seconds of the job's steps when its islands compute at once, as in a run, and never talk; without SAM, by the optimizer
    that the job says, or its recipe."""
    asked = load_job(job_file, overrides)
    recipe = of_section(asked.sync.model_dump(exclude_none=True), asked.islands.count)
    optimizer = optimizer_of(recipe, asked.train.optimizer, asked.train.moments_every)
    with tempfile.TemporaryDirectory(prefix="dtrain-plan-") as folder:
        other = [text for text in overrides if not text.startswith("sync.")]
        steps_by = () if optimizer == "sgd" else (f"train.optimizer={optimizer}",)  # AdamW's step is next to none of it either
        alone = ("sync.recipe=local", "train.sam_rho=0", *steps_by)
        changes = [*other, *alone, f"train.steps={_WARM_STEPS + _STEPS}", f"job.dir={folder}", *STEPS_ALONE]
        with open_run(job_file, changes, Choice()) as opened:
            outcome = run_local(opened.job, opened.run, resume_step=0, script=(), console=console)
            if outcome.exit_status:
                raise ValueError(f"the job's steps could not be measured: {outcome.message}")
            lines = metrics.newest(metrics.read(opened.run / "metrics.jsonl"))
    ended: dict[int, list[float]] = {}
    for line in lines:
        if line["step"] >= _WARM_STEPS:
            ended.setdefault(line["island"], []).append(line["time_s"])
    return [b - a for times in ended.values() for a, b in pairwise(sorted(times))]


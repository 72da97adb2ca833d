"""Would every island of this job fail at once? What can be known before anything is written is said here, in one line."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from dtrain import chosen, own, quorum, schedule, topology, units, zero_config
from dtrain.config import Job, load_job, parse_job
from dtrain.data import hf_rows
from dtrain.extras import require
from dtrain.launch import meeting
from dtrain.launch.elsewhere import check_hosts
from dtrain.loggers import check_loggers
from dtrain.matrices import check_rank
from dtrain.own_name import OWN_AXES, is_own
from dtrain.recipe_fits import check_ranks, check_trains
from dtrain.recipes import AXES, Recipe, answer_of, moments_of, of_section, optimizer_of, rho_of, with_speeds, with_start
from dtrain.sections_each import PIPELINES
from dtrain.sections_sync import Answers

How = Literal["run", "script", "sim"]
"""By torchrun, somebody's own script by torchrun, or in this process."""


STEPS_ALONE = (
    *("train.checkpoint_every=0", "train.eval_every=0", "train.eval_merged=false", "train.consensus_every=0"),
    "islands.max_restarts=0",
)
"""Of a run whose steps are measured: without what stands in some and is no part of them; and an island that is started again
would be measured from another step."""
_SOME_WORDS = 256
_SAYS_ITSELF = (
    ("islands", "start", 'dtrain.join(start="own")'),
    ("islands", "speeds", "dtrain.join(speeds=...)"),
    ("islands", "engine", "what it wraps its model in"),
    ("train", "merge", "sync.merge_corrected()"),
    ("train", "sam_rho", "dtrain.optim.SAM"),
    ("train", "optimizer", "dtrain.optim.muon_adamw"),
    ("log", "tensorboard", "a logger of its own"),
    ("log", "wandb", "a logger of its own"),
)
"""What of a job's answers about rounds a script's loop must give, as [sync] does not reach so far."""


def check_kernels(*, simulated: bool = False) -> None:
    """Raises ValueError where DTRAIN_KERNELS forces a backend that cannot run here; nothing is asked, or imported, without it.
    ``simulated``: on the CPU, whatever this machine has."""
    if not (forced := os.environ.get("DTRAIN_KERNELS")):
        return
    import torch

    from dtrain.kernels import backend

    backend(forced)
    gpu = torch.cuda.is_available() and not simulated
    if forced == "triton" and not gpu and not os.environ.get("TRITON_INTERPRET"):
        why = "dtrain sim computes on the CPU" if simulated else "this machine shows none"
        raise ValueError(f"DTRAIN_KERNELS = 'triton' needs a GPU, and {why}; leave it out, or use 'numba'")
    if forced == "numba" and gpu:
        raise ValueError(
            "DTRAIN_KERNELS = 'numba' is for CPUs, and jobs train on this machine's GPU; leave it out, use 'triton' or "
            "'reference', or hide the GPU with CUDA_VISIBLE_DEVICES="
        )


def read_job(path: Path, overrides: Sequence[str] = (), *, simulated: bool = False) -> Job:
    """``load_job``, with one line also for a path that the system refuses, and for kernels that cannot run here; "-" is what
    stands on stdin."""
    check_kernels(simulated=simulated)
    if path == Path("-"):
        return parse_job(tomllib.loads(sys.stdin.read()), overrides, where="the job on stdin")
    try:
        return load_job(path, overrides)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror or e}; name a job file that can") from None


def resolved(job: Job) -> Job:
    """The job with every answer of its recipe written out, so that a run stays what it is when a recipe's row changes.

    Raises ValueError for answers that do not fit together."""
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count, job.train.steps)
    with_speeds(with_start(recipe, job.islands.start), job.islands.speeds, job.islands.count)
    rho_of(recipe, job.train.sam_rho)
    moments_of(recipe, job.train.moments_every)
    optimizer_of(recipe, job.train.optimizer, job.train.moments_every)
    if job.train.merge != "mean" and job.islands.start != "own":
        raise ValueError(
            f'train.merge = "{job.train.merge}" stretches the mean of models that were never in sync, and with islands.start = '
            f'"{job.islands.start}" they were; leave it out, or use islands.start=own'
        )
    if job.train.eval_merged and job.train.merge != "mean":
        raise ValueError(
            f'train.eval_merged = true is of the mean, and train.merge = "{job.train.merge}" ends with another; leave it out'
        )
    if job.train.eval_merged and not job.train.eval_every:
        raise ValueError(
            "train.eval_merged = true has no effect with train.eval_every = 0: at the end the islands' mean is evaluated anyway; "
            "leave it out, or say how often, train.eval_every=250"
        )
    _refuse_shaded(job)
    levels = job.sync.level or [job.sync]
    out = [
        said.model_copy(update={"recipe": level.name} | {axis: answer_of(level, axis) for axis in AXES})
        for said, level in zip(levels, recipe.levels, strict=True)
    ]
    return _with_levels(job, out)


def _refuse_shaded(job: Job) -> None:
    """Raises ValueError for what [link] says of a link where each level says that of its own."""
    for key in ("rate", "rtt"):
        if job.sync.level and all(getattr(level, key) is not None for level in job.sync.level):
            _refuse_changed(job, "link", key, f"where each level has its {key}", f"change sync.level.1.{key}")


def roundless(job: Job) -> tuple[str, ...]:
    """A line where the run ends before its islands, or groups of them, have had a round: its result is that of their merge."""
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    # Of fragments that take turns the second is the first to start.
    first = recipe.every if recipe.fragments == 1 else recipe.every // recipe.fragments
    silent = recipe.payload == "none" or schedule.parse(recipe.schedule) is not None
    if silent or job.train.steps >= first or job.sim.clock == "poisson":
        return ()
    key, who = ("every", "islands") if recipe.near is None else ("level.1.every", "groups")
    talk = f"the {who} talk only in the last merge" if job.sim.problem == "gpt" else f"the {who} never talk"
    return (f"train.steps = {job.train.steps} ends before the first round (sync.{key} = {recipe.every}): {talk}",)


def with_absolute_paths(job: Job) -> Job:
    """The job as a run keeps it: its text, graph, model, own recipe and DeepSpeed's file are found again from any working
    directory."""
    if is_own(job.model.factory):
        model = job.model.model_copy(update={"factory": own.absolute(job.model.factory)})
        job = job.model_copy(update={"model": model})
    if os.path.exists(job.model.hf):  # else a name on the hub
        job = job.model_copy(update={"model": job.model.model_copy(update={"hf": os.path.abspath(job.model.hf)})})
    source, tokenizer = job.data.source, job.data.tokenizer
    if source.startswith(hf_rows.PREFIX):
        source = hf_rows.absolute(source)
    elif source != "stdlib":
        source = os.path.abspath(source)
    tokenizer = tokenizer if tokenizer == "bytes" else os.path.abspath(tokenizer)
    job = job.model_copy(update={"data": job.data.model_copy(update={"source": source, "tokenizer": tokenizer})})
    if job.islands.deepspeed is not None:
        file = os.path.abspath(job.islands.deepspeed)
        job = job.model_copy(update={"islands": job.islands.model_copy(update={"deepspeed": file})})
    levels = [level.model_copy(update=_absolute(level)) for level in job.sync.level or [job.sync]]
    return _with_levels(job, levels)


def _absolute(level: Answers) -> dict[str, str]:
    named = {axis: getattr(level, axis) for axis in OWN_AXES}
    found = {axis: own.absolute(name) for axis, name in named.items() if name is not None and is_own(name)}
    if level.graph is not None and topology.is_file(level.graph):
        found["graph"] = os.path.abspath(level.graph)
    return found


def _with_levels(job: Job, levels: Sequence[Answers]) -> Job:
    """Those of a job that has some, or its [sync] alone."""
    sync = levels[0] if job.sync.level is None else job.sync.model_copy(update={"level": list(levels)})
    return job.model_copy(update={"sync": sync})


def check_input(job: Job, how: How, part: int | None = None) -> str:
    """The hash of what is trained on, empty where a script reads data of its own. Raises ValueError for what would make every
    island fail; writes nothing. ``part``: the one island that is started here, of a launcher elsewhere."""
    check_answers(job, how, part)
    if how != "sim":
        _check_link(job, part)
    return check_text(job) if how != "script" and job.sim.problem == "gpt" else ""


def check_answers(job: Job, how: How, part: int | None = None) -> None:
    """``check_input`` but for what is trained on, which takes longest to look at, and for the network and GPUs of this machine,
    which may not be where the job runs."""
    if not (how == "sim" and job.sim.clock == "poisson"):
        check_trains(of_section(job.sync.model_dump(exclude_none=True), job.islands.count))
    if how != "sim" or not job.sim.has_clock:
        _refuse_barriers(job)
    if how == "sim":
        _check_sim(job)
        for k in range(job.islands.count):
            key, plan = "islands.ranks" if job.islands.each is None else f"islands.each.{k}.ranks", job.island(k)
            if plan.ranks != 1:
                more = " and islands.engine=ddp" if job.islands.engine != "ddp" else ""
                said = f"{key} = {plan.ranks}: dtrain sim gives every virtual island one rank"
                raise ValueError(f"{said}; use {key}=1{more}")
    else:
        recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
        plans = [job.island(k) for k in range(job.islands.count)]
        for plan in plans:
            check_ranks(recipe, plan.ranks)
        staged = next((plan.engine for plan in plans if plan.engine in PIPELINES), None)
        if staged is not None and (recipe.include or recipe.exclude):
            raise ValueError(
                f'sync.recipe = "{recipe.name}" says which parameters islands share, and a stage of islands.engine = "{staged}" '
                "may have none of them; use islands.engine=ddp"
            )
        quorum.check_grace(units.seconds(recipe.grace), job.link.timeout_s)
        if how == "run":
            for k, plan in enumerate(plans):
                if plan.engine == "deepspeed" and (plan.here if part is None else k == part):
                    _check_deepspeed(job.seen_by(k), recipe)
        refuse_sim(job)
        if part is None:
            check_hosts(job)
    if how != "script" and job.sim.problem == "gpt":
        check_loggers(job)
        if job.model.factory:
            _check_factory(job)
        elif not job.model.hf:
            _check_parameters(job)
    if how == "script":
        for section, key, instead in _SAYS_ITSELF:
            _refuse_changed(job, section, key, f"on a script, which says it itself by {instead}")
        for k, own in enumerate(job.islands.each or ()):
            if own.engine not in (None, "ddp"):
                said = f"islands.each.{k}.engine = {own.engine!r} has no effect on a script"
                raise ValueError(f"{said}, which says it itself by what it wraps its model in; leave it out")


def _check_parameters(job: Job) -> None:
    """Raises ValueError where no parameter of the job's model is shared as its recipe says, or sent by its rank; how many words
    the model knows is nothing to that."""
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    by_rank = recipe.rank if recipe.reduce == "low_rank" else None
    if by_rank is None and recipe.include is None and recipe.exclude is None:
        return
    from dtrain.build import model_of_shapes  # torch

    shapes = {name: p.shape for name, p in model_of_shapes(job, _SOME_WORDS).named_parameters()}
    shared = chosen.shared(list(shapes), recipe.include, recipe.exclude)
    if by_rank is not None:
        check_rank({name: shape for name, shape in shapes.items() if name in shared}, by_rank)


def _check_factory(job: Job) -> None:
    """Raises ValueError where there is nothing to make the model with; what it makes is looked at by each rank, on its device."""
    from dtrain.own_model import factory_of  # torch

    factory_of(job.model)


def check_text(job: Job) -> str:
    """The hash of what is trained on, which takes long to make; raises ValueError where that does not fit the job."""
    from dtrain.data.corpus import check_fits, corpus_of

    corpus = corpus_of(job.data)
    check_fits(corpus, context=job.model.context, num_islands=job.islands.count, shard=job.islands.shard)
    if job.model.hf:
        from dtrain.hf_model import check_config  # torch

        check_config(job.model.hf, corpus, job.model.context)
    return corpus.hash


def _refuse_barriers(job: Job) -> None:
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    every, merged = job.train.consensus_every, job.train.eval_every and job.train.eval_merged
    if recipe.schedule == schedule.READY and (every or merged):
        asked = f"train.consensus_every = {every}" if every else "train.eval_merged = true"
        raise ValueError(
            f"{asked}: all islands wait for each other in each exact average, and with sync.schedule = "
            f'"{schedule.READY}" nobody is to wait for a slow one; leave it out, or use sync.schedule=every'
        )


def _check_sim(job: Job) -> None:
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    if recipe.near is not None and job.sim.has_clock:
        key = f'problem = "{job.sim.problem}"' if job.sim.problem != "gpt" else f"step_s = {job.sim.step_s:g}"
        raise ValueError(
            f"sim.{key} starts a virtual clock, which has one level of rounds and no [[sync.level]]; leave it out, or use "
            "sync.recipe"
        )
    if recipe.schedule == schedule.READY and job.sim.has_clock and job.sim.clock != "poisson":
        raise ValueError(
            f'sync.schedule = "{schedule.READY}" is of islands that meet when both are ready, and a clock of steps has none; '
            'use sim.clock=poisson, whose pairs meet at random times, or sync.schedule=every'
        )
    if job.sim.has_clock and quorum.size(recipe.quorum, job.islands.count) < job.islands.count:
        raise ValueError(
            f"sync.quorum = {recipe.quorum!r}: on a virtual clock each round waits for all islands; use "
            'sync.quorum = "100%", or sim.step_s=0 with sim.problem=gpt'
        )
    if job.sim.problem == "gpt":
        return
    for axis in ("include", "exclude"):
        _refuse_changed(job, "sync", axis, f'with sim.problem = "{job.sim.problem}", whose parameters have no names')
    sim = f'sim.problem = "{job.sim.problem}"'
    for section, key in (("islands", "start"), ("train", "merge"), ("train", "eval_merged")):
        _refuse_changed(job, section, key, f"with {sim}, which starts its islands itself and merges none")
    for key in ("tensorboard", "wandb"):
        _refuse_changed(job, "log", key, f"with {sim}, which writes no metrics")
    for key in ("optimizer", "moments_every", "sam_rho"):
        _refuse_changed(job, "train", key, f"with {sim}, which steps by plain SGD")
    adam = recipe.moments_every or recipe.moments
    needs = {"AdamW": adam, "SAM": recipe.sam_rho, "Muon": recipe.optimizer}
    defined_with = next((name for name, value in needs.items() if value is not None), None)
    if defined_with is not None:
        raise ValueError(
            f'{sim} steps by plain SGD, and sync.recipe = "{recipe.name}" is defined with {defined_with}; use sync.recipe = '
            f'"{"fedavg" if recipe.moments is not None else recipe.algorithm}"'
        )
    if job.sim.clock == "poisson":
        _refuse_changed(job, "islands", "speeds", 'with sim.clock = "poisson", whose steps come at random times')
        from dtrain.event_run import check_events  # torch

        check_events(job, recipe)
        return
    if job.sim.problem == "consensus" and recipe.payload in ("none", "gradients"):
        raise ValueError(
            f'sim.problem = "consensus" has no gradients, and sync.recipe = "{recipe.name}" moves parameters by nothing else; '
            'use another recipe, "dpsgd" say, or sim.problem = "quadratic"'
        )


def _refuse_changed(job: Job, section: str, key: str, where: str, remedy: str = "leave it out") -> None:
    answers = getattr(job, section)
    value = getattr(answers, key)
    if value != type(answers).model_fields[key].default:
        raise ValueError(f"{section}.{key} = {value!r} has no effect {where}; {remedy}")


def refuse_sim(job: Job, read: Collection[str] = ()) -> None:
    """Raises ValueError for keys of [sim] that differ from their defaults, but for those that are ``read``: whoever asks
    simulates nothing."""
    fields = type(job.sim).model_fields.items()
    changed = [key for key, field in fields if key not in read and getattr(job.sim, key) != field.default]
    if changed:
        key = changed[0]
        raise ValueError(
            f"sim.{key} = {getattr(job.sim, key)!r} has no effect with dtrain run, profile and plan; use dtrain sim, or leave it "
            "out"
        )


def refuse_speeds(job: Job) -> None:
    """Raises ValueError where islands are of unequal speed: the planner compares recipes of which few have idle steps."""
    _refuse_changed(job, "islands", "speeds", "with dtrain plan, whose slow islands are those of sim.stragglers")


def refuse_uneven(job: Job) -> None:
    """Raises ValueError where islands have different engines or numbers of ranks: the planner knows one kind."""
    if job.uneven:
        raise ValueError(
            "dtrain plan knows islands of one kind, and tables [[islands.each]] say another engine or number of ranks; leave "
            "them out, and say islands.ranks and islands.engine of the slowest"
        )


def _check_deepspeed(job: Job, recipe: Recipe) -> None:
    require("deepspeed", asked='islands.engine = "deepspeed"', extra="deepspeed")
    zero_config.check(job, recipe)


def _check_link(job: Job, part: int | None) -> None:
    if part is None:
        listener, _ = meeting.listen(job.link)
        listener.close()
    elif job.island(part).interface:
        meeting.interface_address(job.island(part).interface)
    if job.link.transport == "nccl":
        import torch  # 2 s, which only this transport is worth

        if not torch.cuda.is_available():
            raise ValueError('link.transport = "nccl" needs CUDA GPUs, and this machine shows none; use "c10d"')

"""Can this machine start the islands that a job leaves to it, and reach for the others? By their tables [[islands.each]]."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from dtrain import zero_config
from dtrain.launch.doctor import Answer, Asked, Finding, package
from dtrain.launch.doctor_net import gloo_on_loopback, interfaces, outward
from dtrain.recipes import of_section
from dtrain.sections_each import IslandPlan

_HOW = {"local": "here", "ssh": "over ssh", "slurm": "by Slurm", "manual": "at its site"}


def needs_deepspeed(asked: Asked) -> bool:
    """Whether an island here does, so that it is worth the seconds of its import."""
    return any(plan.engine == "deepspeed" for plan in asked.here.values())


def of_islands(asked: Asked, deepspeed: Answer | None) -> Iterator[Finding]:
    """``deepspeed``: what a process said that has imported it, where an island here needs it."""
    if asked.job.islands.each is not None:
        plans = [asked.job.island(k) for k in range(asked.job.islands.count)]
        yield Finding("islands", "ok", "; ".join(f"{k}: {_said(plan)}" for k, plan in enumerate(plans)))
    if deepspeed is not None:
        yield from _deepspeed(asked, deepspeed)
    yield from _launchers(asked)
    yield from _interfaces(asked)


def _said(plan: IslandPlan) -> str:
    ranks = f"{plan.ranks} rank{'s' * (plan.ranks != 1)}"
    return f"{ranks}, {plan.engine}, {_HOW[plan.launcher]}{f' at {plan.host}' if plan.host else ''}"


def _deepspeed(asked: Asked, said: Answer) -> Iterator[Finding]:
    yield package("deepspeed", said, why='islands.engine = "deepspeed"')
    path = asked.job.islands.deepspeed
    assert path is not None, "a job of that engine names its file"
    jobs = [asked.job.seen_by(k) for k, plan in asked.here.items() if plan.engine == "deepspeed"]
    try:
        (stage,) = {zero_config.of_job(job)[zero_config.ZERO]["stage"] for job in jobs}
    except ValueError as e:
        new = json.dumps({zero_config.ZERO: {"stage": 2}})
        mend = f"${{EDITOR:-vi}} {shlex.quote(path)}" if Path(path).exists() else f"echo {shlex.quote(new)} > {shlex.quote(path)}"
        yield Finding("islands.deepspeed", "fail", str(e).removeprefix("islands.deepspeed: "), mend)
        return
    yield Finding("islands.deepspeed", "ok", f"{path}, stage {stage} of ZeRO")
    try:
        zero_config.check(jobs[0], of_section(asked.job.sync.model_dump(exclude_none=True), asked.job.islands.count))
    except ValueError as e:
        yield Finding("deepspeed's step", "fail", str(e), "dtrain recipes")


def _launchers(asked: Asked) -> Iterator[Finding]:
    """Of islands elsewhere: what starts them from here."""
    job = asked.job
    by = {name: [k for k in job.elsewhere if job.island(k).launcher == name] for name in ("ssh", "slurm")}
    if by["ssh"]:
        found, whose = shutil.which("ssh"), f"island{'s' * (len(by['ssh']) > 1)} {', '.join(map(str, by['ssh']))}"
        yield Finding("ssh", "ok", f"{found}, for {whose}") if found else Finding(
            "ssh", "fail", f"not installed, and {whose} would be started over it", "apt-get install openssh-client"
        )
        nowhere = [k for k in by["ssh"] if job.island(k).host is None]
        if nowhere:
            hosts = ",".join(f"HOST{k}" for k in nowhere)
            what = f"no host for island {', '.join(map(str, nowhere))}"
            yield Finding("hosts", "warn", what, f"dtrain run {shlex.join(asked.words)} --hosts {hosts}")
    if by["slurm"]:
        gone = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
        k = by["slurm"][0]
        there = f"dtrain slurm {shlex.join(asked.words)} --island {k} --meet HOST:PORT --submit  # where Slurm is"
        yield Finding("slurm", "warn", f"no {' and no '.join(gone)} here, for island {k}", there) if gone else Finding(
            "slurm", "ok", "sbatch and srun are here"
        )


def _interfaces(asked: Asked) -> Iterator[Finding]:
    link, known = asked.job.link, interfaces()
    if asked.job.elsewhere and not link.interface and not link.advertise:
        yield gloo_on_loopback(asked, "fail")
    for k, plan in asked.here.items():
        key = f"islands.each.{k}.interface"
        if plan.interface != link.interface and not known.get(plan.interface):
            what = "has no IPv4 address" if plan.interface in known else "is no interface of this machine"
            yield Finding(key, "fail", f"{plan.interface} {what}", asked.again(f"{key}={outward(known) or 'lo'}"))

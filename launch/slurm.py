"""What does Slurm have to be told so that it runs the islands of a job? A script that a person can read and change.

The launcher runs on the first of all nodes, where Slurm starts the script, and islands meet at it: each joins by ``dtrain run
--island K``, on its own node, or beside the launcher where it has several nodes, with a torchrun on each. Islands in one
partition are groups of the nodes of one allocation, and those in different partitions the components of a heterogeneous job.
Islands of launcher ssh or manual are not Slurm's: the launcher starts them from there, or waits for them.

Slurm's words: https://slurm.schedmd.com/sbatch.html, srun.html, heterogeneous_jobs.html.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from pathlib import Path
from typing import Any

from dtrain.config import Job
from dtrain.launch.checks import check_answers, read_job, resolved
from dtrain.launch.outside import MEET, each_override, nodes_of, tables_of
from dtrain.launch.slurm_parts import (
    AGAIN,
    ALONE,
    COMMITS,
    COMMITS_NONE,
    END,
    GO_ON,
    JOIN,
    LAUNCHER,
    NEVER_AGAIN,
    NEWEST,
    NODES,
    STOP,
    TORCHRUNS,
)
from dtrain.sections_each import IslandPlan

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*")  # of a partition, several of them, or an account
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")  # minutes, hours:minutes:seconds, days-hours and so on


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of the command, None or empty where they were left out."""

    partitions: tuple[str, ...] = ()
    nodes_per_island: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    account: str | None = None
    meet: str | None = None
    island: int | None = None
    setup: tuple[str, ...] = ()
    ssh_config: Path | None = None
    script: tuple[str, ...] = ()
    """Somebody's own, and its arguments: what each rank runs instead of the job's model."""


@dataclass(frozen=True, slots=True)
class Where:
    """The nodes of one island."""

    island: int
    nodes: int
    ranks_per_node: int
    interface: str
    partition: str | None


def script(job: Job, job_file: Path, overrides: Sequence[str], asked: Asked) -> str:
    """The whole sbatch script; raises ValueError for what no cluster could run."""
    _check_words(job, job_file, overrides, asked)
    islands = layout(job, tables_of(job), asked)
    apart = len({where.partition for where in islands}) > 1
    lines = ["#!/usr/bin/env bash", *_about(job, job_file, overrides, asked, islands)]
    for k, component in enumerate(islands if apart else [None]):
        lines += _component(job, asked, [component] if component else islands, first=k == 0)
    lines += ["", "set -euo pipefail", "", *_surroundings(job, asked)]
    lines += ["", *_places(job, asked, job.link.interface or islands[0].interface)]
    kept = '"$run"' if asked.island is None else f'"$run-island{asked.island}"'
    every = job.train.checkpoint_every
    newest = NEWEST.replace("@kept", kept) if _goes_on(job, asked) else ""
    lines += [*_job(job, job_file, overrides, asked), "", f"{STOP}{newest}{GO_ON}"]
    if asked.island is None:
        config = "" if asked.ssh_config is None else f" --ssh-config {shlex.quote(str(asked.ssh_config))}"
        does = COMMITS.replace("@every", str(every)) if _goes_on(job, asked) else COMMITS_NONE
        lines += ["", LAUNCHER.replace("@does", does).replace("@config", config)]
    lines += ["", *_starts(job, asked, islands, apart=apart)]
    if asked.island is not None:
        lines.append(ALONE)
    what = "a script" if asked.script else "a job with train.checkpoint_every = 0"
    again = AGAIN.replace("@every", str(every)) if _goes_on(job, asked) else NEVER_AGAIN.replace("@what", what)
    return "\n".join([*lines, "", f"{END}{again}"])


def _goes_on(job: Job, asked: Asked) -> bool:
    """Is there a checkpoint to go on from when the job starts again?"""
    return not asked.script and job.train.checkpoint_every > 0


def layout(job: Job, tables: Sequence[Mapping[str, Any]], asked: Asked) -> list[Where]:
    """The nodes of the islands that the script is for; raises ValueError where ranks and nodes do not divide."""
    count = job.islands.count
    if asked.island is not None and asked.island >= count:
        raise ValueError(f"--island {asked.island}: the last of {count} islands is island {count - 1}")
    numbers = _of_slurm(job, asked)
    partitions = asked.partitions
    if len(partitions) not in (0, 1, len(numbers)):
        raise ValueError(
            f"{len(partitions)} times --partition for {len(numbers)} islands; name one for all, or one for each, in their order"
        )
    found: list[Where] = []
    for place, island in enumerate(numbers):
        ranks = tables[island].get("ranks", job.islands.ranks)
        nodes = nodes_of(island, ranks, asked.nodes_per_island, asked.gpus_per_node)
        interface = tables[island].get("interface") or job.link.interface
        partition = partitions[place if len(partitions) > 1 else 0] if partitions else None
        found.append(Where(island, nodes, ranks // nodes, interface, partition))
    alone = asked.island is None and count == sum(where.nodes for where in found) == 1
    for where in found:
        if not where.interface and not alone:
            raise ValueError(
                f"link.interface is empty, which is loopback, and island {where.island} is not on one node with all others; name "
                "the network interface that carries the link there, as link.interface=ib0 (ip -brief address shows them)"
            )
    return found


def _of_slurm(job: Job, asked: Asked) -> list[int]:
    """The islands that the script starts; raises ValueError where the tables leave none to Slurm, or not this one."""
    launchers = {k: job.island(k).launcher for k in range(job.islands.count)}
    if asked.island is not None:
        if launchers[asked.island] == "ssh":
            raise ValueError(
                f'--island {asked.island}: its table says launcher = "ssh", so the launcher starts it; use launcher = "slurm"'
            )
        return [asked.island]
    found = [k for k, launcher in launchers.items() if launcher in ("local", "slurm")]
    if not found:
        raise ValueError('no table [[islands.each]] leaves its island to Slurm; use launcher = "slurm" there, or dtrain run')
    return found


def check_rewritten(job_file: Path, overrides: Sequence[str], asked: Asked) -> None:
    """Raises ValueError for what each ``dtrain run`` of the script would refuse, once the nodes are there."""
    how, job = "script" if asked.script else "run", read_job(job_file, overrides)
    parts: list[int | None] = [asked.island]
    if asked.island is None:
        numbers = _of_slurm(job, asked)
        job = read_job(job_file, (*overrides, _tables(job, numbers), "link.advertise=head"))
        parts += numbers
    if not asked.script:  # which may choose a recipe of its own
        job = resolved(job)
    for part in parts:
        check_answers(job, how, part)


def check_sbatch() -> None:
    if shutil.which("sbatch") is None:
        raise ValueError("--submit: this machine has no sbatch; write the script with --output FILE, and submit it where one is")


def sbatch(text: str) -> str:
    """Submit it and return the job's number; raises ValueError with sbatch's word."""
    done = subprocess.run(["sbatch", "--parsable"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ValueError(f"sbatch refused the script: {said[-1] if said else f'exit status {done.returncode}'}")
    return done.stdout.strip().partition(";")[0]  # a cluster's name may follow


def _check_words(job: Job, job_file: Path, overrides: Sequence[str], asked: Asked) -> None:
    for option, values in (("--partition", asked.partitions), ("--account", (asked.account,))):
        for value in values:
            if value is not None and not _NAME.fullmatch(value):
                raise ValueError(f"{option} {value}: Slurm has no such names; use letters, digits and _.,@+-")
    if asked.time is not None and not _TIME.fullmatch(asked.time):
        raise ValueError(f'--time {asked.time}: write "12:00:00", or "2-12:00:00" with days before the dash')
    if asked.meet is not None and not MEET.fullmatch(asked.meet):
        raise ValueError(f"--meet {asked.meet}: write HOST:PORT, as login1:29400")
    if asked.meet is not None and not 0 < int(asked.meet.rpartition(":")[2]) < 65535:  # with the port after it, torchrun's
        raise ValueError(f"--meet {asked.meet}: use a port from 1 to 65534")
    if asked.island is not None and asked.meet is None:
        raise ValueError(f"--island {asked.island} joins a launcher that runs elsewhere; say where with --meet HOST:PORT")
    others = [] if asked.island is not None else job.elsewhere
    over_ssh = [k for k in others if job.island(k).launcher == "ssh"]
    for k in over_ssh:
        if job.island(k).host is None:
            raise ValueError(f'islands.each.{k}.launcher = "ssh" without a host; say islands.each.{k}.host')
    if asked.ssh_config is not None and not over_ssh:
        raise ValueError(f"--ssh-config {asked.ssh_config} has no effect: nothing here starts an island over ssh; leave it out")
    words = (str(job_file), str(asked.ssh_config), _run(job), os.getcwd(), *overrides, *asked.setup, *asked.script)
    for text in words:
        if not text.isprintable():
            raise ValueError(f"{text!r} has characters that cannot stand in a line of a script; use others")
    if job.link.port == 65535:
        raise ValueError("link.port = 65535: torchrun takes the port after it; use a lower one")
    if set("%\\") & set(_run(job)):
        raise ValueError(f"the run folder {_run(job)} has % or \\ in its name, by which Slurm names logs; use another job.dir")


def _run(job: Job) -> str:
    return os.path.abspath(Path(job.job.dir, job.job.name))


def _about(job: Job, job_file: Path, overrides: Sequence[str], asked: Asked, islands: Sequence[Where]) -> Iterator[str]:
    words = ["dtrain", "slurm", str(job_file), *overrides, *_typed(asked), *_script(asked)]
    yield f"# Written by: {shlex.join(words)}"
    yield "#"
    alike = len({(where.nodes, where.ranks_per_node, where.partition) for where in islands}) == 1
    alike = alike and len(islands) == job.islands.count
    for where in islands[:1] if alike else islands:
        who = f"each of {len(islands)} islands" if alike and len(islands) > 1 else f"island {where.island}"
        nodes, ranks = _number(where.nodes, "node"), _number(where.ranks_per_node, "rank")
        yield f"# {who}: {nodes} with {ranks}{f', in partition {where.partition}' if where.partition else ''}"
    if asked.island is None:
        yield from (f"# island {k}: {_elsewhere(job.island(k))}" for k in job.elsewhere if job.island(k).launcher != "slurm")
    yield "#"
    if asked.island is None:
        yield f"# The run is kept in {_run(job)}, and what is island K's own beside it, in"
        yield f"# {job.job.name}-islandK: all nodes must see these folders under these names."
        anew = "every rank runs the script anew: dtrain has no checkpoint of it" if asked.script else "it begins anew"
        yield f"# Submitted again, {'it goes on from the newest checkpoint' if _goes_on(job, asked) else anew}."
    else:
        yield f"# The launcher runs elsewhere, and is met at {asked.meet}. What is this island's own is kept in"
        again = "goes on with that" if _goes_on(job, asked) else "begins anew"
        yield f"# {_run(job)}-island{asked.island}. Submitted again, it {again}."
    yield ""


def _tables(job: Job, numbers: Sequence[int]) -> str:
    """An override that leaves these islands to Slurm."""
    return each_override(job, "slurm", [k for k in range(job.islands.count) if k not in numbers])


def _elsewhere(plan: IslandPlan) -> str:
    return f"over ssh on {plan.host}" if plan.launcher == "ssh" else "at its site, by what the launcher prints into the log"


def _script(asked: Asked) -> list[str]:
    return ["--", *asked.script] if asked.script else []


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _typed(asked: Asked) -> list[str]:
    named = {
        "--nodes-per-island": asked.nodes_per_island,
        "--gpus-per-node": asked.gpus_per_node,
        "--time": asked.time,
        "--account": asked.account,
        "--meet": asked.meet,
        "--island": asked.island,
        "--ssh-config": asked.ssh_config,
    }
    many = {"--partition": asked.partitions, "--setup": asked.setup}
    words = [word for option, values in many.items() for value in values for word in (option, value)]
    return words + [word for option, value in named.items() if value is not None for word in (option, str(value))]


def _component(job: Job, asked: Asked, islands: Sequence[Where], *, first: bool) -> Iterator[str]:
    """The #SBATCH lines of a job, or of one component of it."""
    if first:
        name = job.job.name if asked.island is None else f"{job.job.name}-island{asked.island}"
        yield f"#SBATCH --job-name={name}"
        yield f"#SBATCH --output={name}-%j.log"
        yield "#SBATCH --open-mode=append"
        yield f"# A signal 120 s before the time limit, and {'back' if _goes_on(job, asked) else 'never'} into the queue:"
        yield "#SBATCH --signal=B:USR1@120"
        yield f"#SBATCH --{'requeue' if _goes_on(job, asked) else 'no-requeue'}"
    else:
        yield "#SBATCH hetjob"
    if islands[0].partition:
        yield f"#SBATCH --partition={islands[0].partition}"
    if asked.account:
        yield f"#SBATCH --account={asked.account}"
    if asked.time:
        yield f"#SBATCH --time={asked.time}"
    yield f"#SBATCH --nodes={sum(where.nodes for where in islands)}"
    yield "#SBATCH --ntasks-per-node=1"
    if first:
        yield "# Whole nodes, with all their cores and all their memory:"
    yield "#SBATCH --exclusive"
    yield "#SBATCH --mem=0"
    if asked.gpus_per_node:
        yield f"#SBATCH --gpus-per-node={asked.gpus_per_node}"


def _surroundings(job: Job, asked: Asked) -> Iterator[str]:
    yield f"cd -- {shlex.quote(os.getcwd())}"
    yield f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:\"$PATH\"  # where dtrain is"
    if job.islands.threads:
        yield f"export OMP_NUM_THREADS={job.islands.threads}"
    yield from asked.setup


def _places(job: Job, asked: Asked, interface: str) -> Iterator[str]:
    yield f"run={shlex.quote(_run(job))}"
    yield 'logs=$run-slurm/$SLURM_JOB_ID    # a file for each island and node'
    yield 'mkdir -p -- "$logs"'
    host, _, port = (asked.meet or "").rpartition(":")
    host = host or job.link.advertise or ("" if interface else "127.0.0.1")
    if host:
        yield f"head={shlex.quote(host)}"
    else:  # and not its name, which may be that of its address on another network
        yield "# Islands meet at this node, by its address on the network that carries the link."
        yield f"read -r _ _ _ head _ < <(ip -4 -oneline address show dev {shlex.quote(interface)})"
        yield "head=${head%/*}"
    yield f"port={port or job.link.port or '$((20000 + SLURM_JOB_ID % 10000))'}"
    yield "meet=$head:$port"


def _job(job: Job, job_file: Path, overrides: Sequence[str], asked: Asked) -> Iterator[str]:
    """What ``dtrain run`` is given."""
    words = list(overrides)
    if asked.island is None:
        words.append(_tables(job, _of_slurm(job, asked)))
    text = job_file.read_text(encoding="utf-8").rstrip("\n")
    end = next(word for k in count() if (word := f"END_OF_JOB{k or ''}") not in text.split("\n"))
    yield "# The job file as it was when this was written. An edit of it since then is another experiment's."
    yield f"cat >\"$logs/job.toml\" <<'{end}'"
    yield text
    yield end
    yield "job=("
    yield '    "$logs/job.toml"'
    yield from (f"    {shlex.quote(word)}" for word in words)
    if asked.island is None:
        yield '    "link.advertise=$head"'
        yield '    "link.port=$port"'
    yield ")"
    yield f"script=({shlex.join(_script(asked))})    # what each rank runs; empty: the job's own model"


def _starts(job: Job, asked: Asked, islands: Sequence[Where], *, apart: bool) -> Iterator[str]:
    options = ["--export=ALL", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"]
    if asked.gpus_per_node:
        options.append(f"--gpus-per-node={asked.gpus_per_node}")
    yield f"options=({' '.join(options)})    # of srun, for every island"
    yield ""
    if any(where.nodes == 1 for where in islands):
        yield JOIN + "\n"
    if any(where.nodes > 1 for where in islands):
        yield TORCHRUNS + "\n"
    if not apart:
        yield NODES + "\n"
    first = [0, *accumulate(where.nodes for where in islands)]
    for k, where in enumerate(islands):
        n = where.nodes
        placed = f"--het-group={k}" if apart else f'--nodelist="$(nodes {first[k]} {n})"'
        if n == 1:
            yield f"join {where.island} {placed}"
        elif apart:
            yield f'read -r first < <(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_{k}")'
            yield f'torchruns {where.island} "$first" {n} {where.ranks_per_node} {placed}'
        else:
            at = f'"$(nodes {first[k]} 1)"'
            yield f"torchruns {where.island} {at} {n} {where.ranks_per_node} {placed}"


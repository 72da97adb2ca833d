"""What can a person type after ``dtrain slurm``?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer


def slurm(
    context: typer.Context,
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="the job file", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="keys that differ from the file", show_default=False),
    ] = None,
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="where it is written; -: standard output")] = "-",
    force: Annotated[bool, typer.Option("--force", help="overwrite FILE")] = False,
    submit: Annotated[bool, typer.Option("--submit", help="give it to sbatch, and print the job's number")] = False,
    partition: Annotated[
        list[str] | None,
        typer.Option("--partition", metavar="P", help="once for all islands, or once an island, in order", show_default=False),
    ] = None,
    nodes_per_island: Annotated[
        int | None, typer.Option("--nodes-per-island", metavar="N", help="left out: as its ranks need", min=1, show_default=False)
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", metavar="G", help="left out: none", min=1, show_default=False)
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="LIMIT", help='"12:00:00"; left out: the partition\'s', show_default=False)
    ] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="A", show_default=False)] = None,
    meet: Annotated[
        str | None,
        typer.Option(
            "--meet", metavar="HOST:PORT", help="where islands meet; left out: island 0's first node", show_default=False
        ),
    ] = None,
    island: Annotated[
        int | None,
        typer.Option("--island", metavar="K", help="this one only; a launcher elsewhere is at --meet", min=0, show_default=False),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option("--setup", metavar="LINE", help='shell to run first, "module load cuda"', show_default=False),
    ] = None,
    ssh_config: Annotated[
        Path | None, typer.Option("--ssh-config", metavar="FILE", help="in place of ~/.ssh/config", show_default=False)
    ] = None,
) -> None:
    """Write the sbatch script that runs a job on a Slurm cluster.

    One torchrun a node; islands lie in one partition, or each in its own. Submitted
    again, or requeued at its time limit, it goes on from the newest checkpoint.
    Islands of launcher ssh are started from there, on their hosts. With "-- SCRIPT
    ARGS" at the end every rank runs that script, as with dtrain run; of it dtrain has
    no checkpoint, and it is not requeued.

    Example: dtrain slurm JOB.toml link.interface=ib0 --gpus-per-node 8 --submit
    """
    from dtrain.launch.checks import read_job, refuse_sim
    from dtrain.launch.output_file import STDOUT, check_output, put
    from dtrain.launch.slurm import Asked, check_rewritten, check_sbatch, sbatch, script

    asked = Asked(
        partitions=tuple(partition or ()),
        nodes_per_island=nodes_per_island,
        gpus_per_node=gpus_per_node,
        time=time,
        account=account,
        meet=meet,
        island=island,
        setup=tuple(setup or ()),
        ssh_config=ssh_config,
        script=context.obj or (),
    )
    if job_file == Path("-"):
        raise ValueError("dtrain slurm reads its job file twice; name a file in place of -")
    if asked.script and not Path(asked.script[0]).is_file():
        raise ValueError(f"no script at {asked.script[0]}")
    if ssh_config is not None and not ssh_config.is_file():
        raise ValueError(f"--ssh-config {ssh_config} is no file")
    job = read_job(job_file, overrides or ())
    refuse_sim(job)
    text = script(job, job_file, tuple(overrides or ()), asked)
    check_rewritten(job_file, tuple(overrides or ()), asked)
    check_output(output, force=force)
    if submit:
        check_sbatch()
    if output != STDOUT or not submit:
        put(output, text)
    if submit:
        print(sbatch(text))
    elif output != STDOUT:
        print(f"written: {output}; submit it with: sbatch {shlex.quote(output)}")

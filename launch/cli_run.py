"""What can a person type after ``dtrain run``? A job, and for a job of several sites who starts which island of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from dtrain.config import toml_value
from dtrain.launch.closing import complain
from dtrain.launch.run_folder import Choice, open_part
from dtrain.launch.typed import Fresh, FreshName, JobFile, Overrides, Resume


def run(
    context: typer.Context,
    job_file: JobFile,
    overrides: Overrides = None,
    resume: Resume = False,
    fresh: Fresh = False,
    fresh_name: FreshName = False,
    max_restarts: Annotated[
        int | None, typer.Option("--max-restarts", help="islands.max_restarts", min=0, show_default=False)
    ] = None,
    hosts: Annotated[
        str | None, typer.Option("--hosts", metavar="A,B,...", help="where islands start, over ssh", show_default=False)
    ] = None,
    ssh_config: Annotated[
        Path | None, typer.Option("--ssh-config", metavar="FILE", help="in place of ~/.ssh/config", show_default=False)
    ] = None,
    island: Annotated[
        int | None, typer.Option("--island", metavar="K", help="this one, of a launcher elsewhere", min=0, show_default=False)
    ] = None,
    meet: Annotated[
        str | None, typer.Option("--meet", metavar="HOST:PORT", help="where that launcher is", show_default=False)
    ] = None,
) -> None:
    """Run a job: every island of it, on this machine or where its tables say.

    Each island gets its own torchrun. With "-- SCRIPT ARGS" at the end every rank
    runs that script instead, which calls dtrain.join. Islands of launcher ssh are
    started on their hosts; for others this prints what their sites have to type.
    Islands meet over plain TCP, which anybody can join who reaches it.

    Example: dtrain run launch/jobs/quickstart.toml train.steps=500 sync.every=50
    """
    script: tuple[str, ...] = context.obj or ()
    if script and not Path(script[0]).is_file():
        raise ValueError(f"no script at {script[0]}")
    choice, changes = Choice(resume, fresh, fresh_name), tuple(overrides or ())
    if (island is None) != (meet is None):
        raise ValueError("--island and --meet go together: which island, and where its launcher is, as that one printed")
    if island is not None and meet is not None:
        for option, value in (("--hosts", hosts), ("--max-restarts", max_restarts), ("--ssh-config", ssh_config)):
            if value is not None:
                raise ValueError(f"{option} is the launcher's to say; leave it out beside --island")
        return _part(job_file, changes, choice, island, meet, script)
    if ssh_config is not None and not ssh_config.is_file():
        raise ValueError(f"--ssh-config {ssh_config} is no file")
    own = () if max_restarts is None else (f"islands.max_restarts={max_restarts}",)
    return _all(job_file, changes, own, choice, script, hosts, ssh_config)


def _all(
    job_file: Path, changes: tuple[str, ...], own: tuple[str, ...], choice: Choice, script: tuple[str, ...], hosts: str | None,
    ssh_config: Path | None,
) -> None:  # fmt: skip
    """The launcher. ``own``: changes that are of no concern to other sites."""
    from dtrain.launch.elsewhere import Call
    from dtrain.launch.shown import run_shown

    if hosts is not None:
        own = (*own, _hosts(job_file, changes, hosts))
    call = Call(job_file, changes, choice.fresh, choice.resume, choice.fresh_name, ssh_config)
    run_shown(job_file, (*changes, *own), choice, script=script, command="run", call=call)


def _part(
    job_file: Path, changes: tuple[str, ...], choice: Choice, island: int, meet: str, script: tuple[str, ...]
) -> None:
    from dtrain.launch.part import address, run_part

    address(meet)  # before anything is written
    console = Console()
    with open_part(job_file, changes, choice, island, how="script" if script else "run") as opened:
        outcome = run_part(opened.job, opened.run, island, meet, script=script, console=console, text=opened.text)
    if outcome.exit_status:
        raise typer.Exit(complain(outcome.exit_status, outcome.message))
    console.print(Text(f"\nwhat is island {island}'s own is in {opened.run}"), soft_wrap=True)


def _hosts(job_file: Path, changes: tuple[str, ...], hosts: str) -> str:
    """The tables [[islands.each]] with the hosts in them, as an override."""
    from dtrain.launch.checks import read_job
    from dtrain.sections_each import with_hosts

    job = read_job(job_file, changes)
    tables = with_hosts(job.islands.each, job.islands.count, hosts.split(","))
    said = (", ".join(f"{k} = {toml_value(v)}" for k, v in table.model_dump(exclude_none=True).items()) for table in tables)
    return f"islands.each=[{', '.join(f'{{{table}}}' for table in said)}]"

"""What can a person type after ``dtrain lab``?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from dtrain.launch.run_folder import Choice
from dtrain.launch.tables import table

_ABOUT = """Lay real slow links on this machine, and run jobs over them.

Each island gets a network namespace, and the kernel holds its link to a rate. Where
the kernel gives ordinary users namespaces it needs no root.
DTRAIN_LAB=NAME in the environment is a lab beside others; left out: "lab".
"""

lab_app = typer.Typer(help="Real slow links on this machine.", rich_markup_mode=None)

Island = Annotated[int, typer.Argument(metavar="A", help="an island", show_default=False)]
Other = Annotated[int, typer.Argument(metavar="B", help="another", show_default=False)]


@lab_app.callback(help=_ABOUT)
def lab_commands() -> None:
    """Their help is above."""


@lab_app.command()
def up(
    islands: Annotated[int, typer.Option("--islands", help="how many", show_default=False)],
    rate: Annotated[str, typer.Option("--rate", help='of an island\'s link, each way: "100mbit"', show_default=False)],
    rtt: Annotated[str, typer.Option("--rtt", help='round trip between islands: "40ms"')] = "0ms",
    loss: Annotated[str, typer.Option("--loss", help='share of packets that are lost, each way: "0.1%"')] = "0%",
    near: Annotated[
        str | None, typer.Option("--near", metavar="N:RATE", help="groups of N, and the rate within one", show_default=False)
    ] = None,
) -> None:
    """Lay the links.

    With --near the islands of a group talk to each other at that rate, and to those of
    other groups at --rate.

    Example: dtrain lab up --islands 4 --rate 10mbit --near 2:1gbit
    """
    from dtrain.launch import lab

    asked = lab.parse(islands, rate, near, rtt, loss)
    for note in lab.up(asked):
        print(note)
    print(f"{asked.title}; dtrain lab run JOB.toml runs over it, dtrain lab down removes it")


@lab_app.command()
def run(
    context: typer.Context,
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="the job file", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="keys that differ", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="replace a run of the same name")] = False,
    fresh_name: Annotated[bool, typer.Option("--fresh-name", help="keep a run of the same name, take NAME-2")] = False,
) -> None:
    """Run a job over the lab's links, as dtrain run does.

    link.rate is none then, as the link has one; and the bytes that the kernel counted,
    headers and all, are shown beside those that the run says it sent.

    Example: dtrain lab run launch/jobs/quickstart.toml train.steps=500
    """
    from dtrain.launch import lab, lab_run
    from dtrain.launch.shown import run_shown

    there = lab.read()
    job, keys = lab_run.enter(there, job_file, overrides or ())
    console = Console()
    if job.link.rate != "none":
        console.print(Text(f"the lab's link in place of link.rate = {job.link.rate}: {there.title}"), soft_wrap=True)
    before = lab.counted(there)
    opened = run_shown(
        job_file,
        (*keys, *(overrides or ())),
        Choice(resume, fresh, fresh_name),
        script=context.obj or (),
        command="lab run",
        sites=lab_run.sites(job.islands.count),
    )
    after = lab.counted(there)
    said = lab_run.said(opened, scripted=bool(context.obj))
    console.print()
    console.print(table(lab_run.HEADER, lab_run.rows(before, after, said)))


@lab_app.command()
def cut(a: Island, b: Other) -> None:
    """Drop all packets of two islands to each other.

    Example: dtrain lab cut 0 1
    """
    from dtrain.launch import lab

    lab.cut(a, b)
    print(f"islands {a} and {b} are cut from each other; dtrain lab heal {a} {b} joins them again")


@lab_app.command()
def heal(
    a: Annotated[int | None, typer.Argument(metavar="[A", show_default=False)] = None,
    b: Annotated[int | None, typer.Argument(metavar="B]", show_default=False)] = None,
) -> None:
    """Let packets through again: of two islands, or of all.

    Example: dtrain lab heal
    """
    from dtrain.launch import lab

    if a is not None and b is None:
        raise ValueError(f"dtrain lab heal {a}: name two islands, or none to heal all cuts")
    pairs = lab.cuts(lab.read()) if a is None or b is None else [(a, b)]
    for one, other in pairs:
        lab.heal(one, other)
        print(f"islands {one} and {other} hear each other")
    if not pairs:
        print("nothing was cut")


@lab_app.command()
def slow(
    a: Island,
    rate: Annotated[str, typer.Argument(metavar="RATE", help='"10mbit"', show_default=False)],
) -> None:
    """Hold one island's link to another rate, up and down.

    What it has with islands of its own group (--near) stays as it is.

    Example: dtrain lab slow 1 1mbit
    """
    from dtrain.launch import lab

    lab.slow(a, rate)
    print(f"island {a}: {rate} each way")


@lab_app.command()
def kill(a: Island) -> None:
    """End all processes of an island, by SIGKILL.

    Example: dtrain lab kill 1
    """
    from dtrain.launch import lab

    print(f"island {a}: {lab.kill(a)} processes ended")


@lab_app.command()
def status() -> None:
    """Show what is up, and what the kernel counted.

    Example: dtrain lab status
    """
    from dtrain.launch import lab, lab_status

    there = lab.read()
    print(there.title)
    Console().print(table(lab_status.HEADER, lab_status.rows(there)))


@lab_app.command()
def down() -> None:
    """End what runs in the lab, and remove it.

    Example: dtrain lab down
    """
    from dtrain.launch import lab

    for line in lab.down():
        print(line)

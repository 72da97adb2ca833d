"""What can a person type after ``dtrain plan``?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from dtrain.config import Job
    from dtrain.recipes import Recipe

MOST_ISLANDS = 1000


def plan(
    job_file: Annotated[Path, typer.Argument(metavar="JOB.toml", help="the job file", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value ...]", help="keys that differ from the file", show_default=False),
    ] = None,
    islands: Annotated[
        str | None, typer.Option("--islands", metavar="N,N,...", help="how many; left out: the job's", show_default=False)
    ] = None,
    link: Annotated[
        str | None, typer.Option("--link", help='an island\'s uplink, "100mbit"; left out: measured', show_default=False)
    ] = None,
    rtt: Annotated[
        str | None, typer.Option("--rtt", help='"40ms"; left out: measured, with --link the job\'s', show_default=False)
    ] = None,
    step_time: Annotated[
        str | None, typer.Option("--step-time", help='a step without exchange, "30ms"; left out: measured', show_default=False)
    ] = None,
    jitter: Annotated[str | None, typer.Option("--jitter", help="standard deviation of a step", show_default=False)] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", metavar="NAME", help='reckon a step for a GPU, "h100"; with --step-time its memory alone', show_default=False
        ),
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option("--mfu", help="of the GPU's FLOP/s that a step reaches; 0.4", min=0.01, max=1.0, show_default=False),
    ] = None,
    near: Annotated[
        str | None, typer.Option("--near", help="rate between islands of one host", show_default=False)
    ] = None,
    per_host: Annotated[int, typer.Option("--per-host", help="islands a host", min=1)] = 1,
    intra: Annotated[
        str | None, typer.Option("--intra", help='rate between the ranks of an island, "3600gbit"', show_default=False)
    ] = None,
    show_all: Annotated[bool, typer.Option("--all", help="every variant, not the best of each recipe")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="write every variant there", show_default=False)
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="write the recommended recipe into JOB.toml")] = False,
) -> None:
    """Predict what each recipe would cost this job, and recommend one.

    Measures a step and the link for some seconds, unless they are said: for links and
    GPUs that you have not got, say them.

    Example: dtrain plan JOB.toml --link 100mbit --rtt 40ms --gpu h100 --islands 2,64
    """
    from dtrain import units
    from dtrain.launch.checks import read_job, refuse_sim, refuse_speeds, refuse_uneven
    from dtrain.launch.plan_job import Said, setting_of
    from dtrain.launch.plan_rows import as_sentences, check_json, other_sizes, planned, write_json
    from dtrain.launch.plan_table import foot, table_lines
    from dtrain.plan.unequal import READ
    from dtrain.plan.write import answers
    from dtrain.plan.write import write as write_answers

    said = Said(
        step_s=None if step_time is None else _positive("--step-time", units.seconds(step_time)),
        jitter_s=None if jitter is None else units.seconds(jitter),
        bits_per_s=_rate("--link", link),
        rtt_s=None if rtt is None else units.seconds(rtt),
        near_bits_per_s=_rate("--near", near),
        per_host=per_host,
        gpu=gpu,
        mfu=mfu,
        intra_bits_per_s=_rate("--intra", intra),
    )
    if mfu is not None and (gpu is None or step_time is not None):
        raise ValueError(f"--mfu {mfu:g} is for a step that is reckoned: it needs --gpu, and no --step-time")
    if near is not None and per_host == 1:
        raise ValueError("--near is the rate between islands of one host: say how many there are with --per-host")
    if near is None and per_host > 1:
        raise ValueError(f"--per-host {per_host}: say the rate between islands of one host with --near")
    job = read_job(job_file, overrides or ())
    if job.sync.level is not None:
        raise ValueError(
            f"{job_file}: a plan is of recipes with one level of rounds, and the job has [[sync.level]]; say one of its recipes, "
            "sync.recipe=dilocox for instance, to see what that would cost alone"
        )
    sizes = _sizes(islands, job.islands.count)
    if per_host >= min(sizes):
        raise ValueError(
            f"--per-host {per_host} of {min(sizes)} islands: all are on one host, and --link and --rtt would say nothing; name "
            "fewer, or plan with the rate between them as --link and without --near"
        )
    if link is not None and rtt is None and "rtt" not in job.link.model_fields_set:
        raise ValueError(f'--link {link}: the round trip is not known, as the job has no link.rtt; say --rtt 40ms, or --rtt 0ms')
    if write:
        _check_write(job_file, read_job(job_file), job, sizes, islands)
    if json_file is not None:
        check_json(json_file)
    refuse_sim(job, READ)
    refuse_speeds(job)
    refuse_uneven(job)
    console = Console()
    setting, notes = setting_of(job_file, overrides or (), job.seen_by(0), said, console)
    notes += other_sizes(sizes, job.islands.count, measured=said.measures_steps)
    plans = [planned(setting, job, size) for size in sizes]
    width = console.width if console.is_terminal else None
    for one in plans:
        for line in (f"\n{one.num_islands} islands", *table_lines(one, width, show_all=show_all)):
            console.print(Text(line), soft_wrap=True)
    for line in foot(plans, show_all=show_all):
        console.print(Text(line), soft_wrap=True)
    console.print()
    for line in (*notes, *(sentence for one in plans for sentence in as_sentences(one))):
        console.print(Text(line), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, plans, notes)
        console.print(Text(f"written: {json_file}"), soft_wrap=True)
    if write:
        if plans[0].chosen is None:
            raise ValueError(f"--write: nothing is written, as no recipe should be taken for {job_file}: the reason is above")
        chosen = plans[0].chosen.recipe
        write_answers(job_file, answers(chosen, sizes[0], job.sync.recipe), lambda text: check_text(text, job_file, chosen))
        console.print(Text(f"written into [sync] of {job_file}: dtrain run {job_file}"), soft_wrap=True)


def check_text(text: str, job_file: Path, recipe: Recipe) -> None:
    """Raises ValueError where a job file of this text would not run, or not by that recipe."""
    import tomllib

    from dtrain.config import parse_job
    from dtrain.launch.checks import resolved
    from dtrain.recipes import of_section

    job = parse_job(tomllib.loads(text), where=str(job_file))
    resolved(job)
    if of_section(job.sync.model_dump(exclude_none=True), job.islands.count) != recipe:
        raise ValueError(f"{job_file}: its [sync] would say another recipe than the recommended one; write it by hand")


def _positive(option: str, value: float) -> float:
    if value <= 0:
        raise ValueError(f'{option} 0: a step takes some time; write "30ms"')
    return value


def _rate(option: str, text: str | None) -> float | None:
    from dtrain import units

    if text is None:
        return None
    rate = units.bits_per_s(text)
    if rate is None:
        raise ValueError(f'{option} {text}: name a rate, as "100mbit"; leave {option} out where there is no limit')
    return rate


def _sizes(text: str | None, own: int) -> list[int]:
    if text is None:
        if not 2 <= own <= MOST_ISLANDS:
            raise ValueError(f"islands.count = {own}: a plan is for 2 to {MOST_ISLANDS} islands; say how many with --islands")
        return [own]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 2 <= int(part) <= MOST_ISLANDS for part in parts):
        raise ValueError(f"--islands {text}: write numbers from 2 to {MOST_ISLANDS} with commas between, as 2,8,64")
    return [int(part) for part in parts]


def _check_write(job_file: Path, own: Job, planned: Job, sizes: Sequence[int], islands: str | None) -> None:
    """Raises ValueError where the answer would be to another question than the file's: only its [sync] may differ."""
    if len(sizes) > 1:
        raise ValueError(f"--write with --islands {islands}: a job has one number of islands; name one")
    if sizes[0] != own.islands.count:
        raise ValueError(
            f"--write for {sizes[0]} islands: {job_file} is a job of {own.islands.count}, where this recipe may not fit; "
            f"write islands.count = {sizes[0]} there first, or leave --write out"
        )
    ours, theirs = own.model_dump(exclude={"sync"}), planned.model_dump(exclude={"sync"})
    changed = [
        f"{name}.{key}={value}" for name, keys in theirs.items() for key, value in keys.items() if ours[name][key] != value
    ]
    if changed:
        raise ValueError(
            f"--write with {' '.join(changed)}: the recipe would be one for another job than {job_file}; write that there first, "
            "or leave --write out (keys of sync may differ)"
        )

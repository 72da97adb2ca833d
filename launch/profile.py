"""How is a job profiled? It runs for some steps, in a folder of its own, and what its ranks noted is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dtrain.launch import ncu
from dtrain.launch.checks import STEPS_ALONE, read_job, resolved
from dtrain.launch.islands import folder
from dtrain.launch.local import Outcome, run_local
from dtrain.launch.run_folder import Choice, open_run
from dtrain.metrics import read_part
from dtrain.profile_steps import warning, window_of
from dtrain.recipes import of_section


@dataclass(frozen=True, slots=True)
class Tables:
    parts: list[list[str]]
    kernels: list[list[str]]
    shares: list[list[str]]
    lines: list[str]
    trace: Path
    dram: list[list[str]] = field(default_factory=list)


def profile_job(
    job_file: Path, overrides: Sequence[str], *, steps: int | None, with_ncu: bool, console: Console
) -> tuple[Outcome, Tables | None]:
    """Run a job's first steps in RUN-profile (or RUN-profile-2, and so on: no run is written over) and look at them."""
    for override in overrides:
        if override.partition("=")[0] == "train.steps":
            raise ValueError(f"{override}: dtrain profile ends after the steps that it looks at; say how many with --steps")
    job = resolved(read_job(job_file, overrides))
    if job.elsewhere:
        raise ValueError(f"island {job.elsewhere[0]} runs elsewhere, and dtrain profile looks at islands here; profile it there")
    recipe = of_section(job.sync.model_dump(exclude_none=True), job.islands.count)
    window = window_of(recipe, steps)
    if with_ncu:
        ncu.check()
    changes = [*overrides, f"job.name={job.job.name}-profile", f"train.steps={window.end}", *STEPS_ALONE]
    with open_run(job_file, changes, Choice(fresh_name=True)) as opened:
        plain, traced = window.traced - window.plain, window.steps + 1
        counts = f"{window.plain} to warm up, {plain} noted by spans, {traced} traced by torch.profiler"
        console.print(Text(f"{window.end} steps: {counts}"), soft_wrap=True)
        if said := warning(recipe, window):
            console.print(Text(said), soft_wrap=True)
        options = ("--profile", str(window))
        outcome = run_local(opened.job, opened.run, resume_step=0, script=(), console=console, options=options)
        if outcome.exit_status:
            return outcome, None
        found = tables(opened.run, [opened.job.island(k).ranks for k in range(opened.job.islands.count)])
        if with_ncu:
            numel = read_part(folder(opened.run, 0)).parameters
            found = replace(found, dram=ncu.rows(ncu.collect(recipe.codec, numel)))
        return outcome, found


def tables(run: Path, num_ranks: Sequence[int]) -> Tables:
    """Merge what the ranks of a profiled run left, and count. ``num_ranks``: of each island."""
    from dtrain.chrome import read_rank, write_merged
    from dtrain.profile_table import kernel_rows, link_line, ours_line, part_rows, see, share_line, share_rows, traced_line
    from dtrain.profiled import written

    ranks = [read_rank(path) for path in written(run, num_ranks)]
    write_merged(run / "trace.json", ranks)
    seen = [see(rank) for rank, _ in ranks]
    lines = [traced_line(seen), link_line(seen), ours_line(seen), share_line(seen)]
    return Tables(part_rows(seen), kernel_rows(seen), share_rows(seen), lines, run / "trace.json")

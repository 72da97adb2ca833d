"""What does a person see of a run: its last screen, or one line that says why it ended and how to go on?"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.text import Text

from dtrain.launch.islands import Site
from dtrain.launch.run_folder import Choice, Opened, open_run
from dtrain.launch.tables import table

EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
EXIT_INTERRUPTED = 130


def run_shown(
    job_file: Path,
    overrides: Sequence[str],
    choice: Choice,
    *,
    script: tuple[str, ...],
    command: str,
    sites: tuple[Site, ...] = (),
) -> Opened:
    """Run a job and show what came out. ``command``: that of dtrain which resumes it; ``sites``: where its islands run.

    Raises typer.Exit, after a line that says why, where the job did not come to its end."""
    from dtrain.launch.local import Outcome, run_local

    if script and not Path(script[0]).is_file():
        raise ValueError(f"no script at {script[0]}")
    console = Console()
    with open_run(job_file, overrides, choice, how="script" if script else "run") as opened:
        for note in opened.notes:
            console.print(Text(note), soft_wrap=True)
        outcome = Outcome(0)
        if not opened.finished:
            outcome = run_local(
                opened.job, opened.run, resume_step=opened.resume_step, script=script, console=console, sites=sites
            )
        if outcome.exit_status == 0:
            close(console, opened.run, opened.job.islands.count, summary=not script)
    if outcome.exit_status:
        for line in outcome.log:
            print(line, file=sys.stderr)
        message = outcome.message
        if outcome.exit_status not in (1, EXIT_USER_ERROR):
            message = resumable(message, command, opened.run, script)
        raise typer.Exit(complain(outcome.exit_status, message))
    return opened


def complain(exit_status: int, message: str) -> int:
    print(f"dtrain: {' '.join(message.split())}", file=sys.stderr)
    return exit_status


def resumable(message: str, command: str, run_folder: Path, script: tuple[str, ...] = ()) -> str:
    again = ["dtrain", *command.split(), str(run_folder / "job.toml"), "--resume", *(["--", *script] if script else [])]
    return f"{message}; resume with: {shlex.join(again)}"


def close(
    console: Console, run_folder: Path, num_islands: int, *, summary: bool, virtual: list[list[str]] | None = None
) -> None:
    """The last screen: what came out, what it cost, and where to go from here."""
    if summary:
        from dtrain.report import closing_rows, write_summary

        rows = closing_rows(write_summary(run_folder, num_islands))
        console.print()
        console.print(table(["", "", "what this means"], [list(row) for row in rows]))
    if virtual:
        console.print()
        console.print(table(["", "on the virtual clock", "what this means"], virtual))
    console.print(Text(f"\neverything is in {run_folder}"), soft_wrap=True)
    if summary:
        console.print(Text(f"  dtrain report {run_folder}    beside other runs: name them too"), soft_wrap=True)
        console.print(Text(f"  dtrain eval {run_folder}      its models, evaluated again"), soft_wrap=True)

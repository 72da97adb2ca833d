"""How does a command run a job in front of a person, to its last screen or the line that says why it ended?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.text import Text

from dtrain.launch.closing import EXIT_USER_ERROR, close, complain, resumable
from dtrain.launch.run_folder import Choice, Opened, open_run

if TYPE_CHECKING:
    from dtrain.launch.elsewhere import Call
    from dtrain.launch.islands import Site


def run_shown(
    job_file: Path,
    overrides: Sequence[str],
    choice: Choice,
    *,
    script: tuple[str, ...],
    command: str,
    sites: tuple[Site, ...] = (),
    call: Call | None = None,
) -> Opened:
    """Run a job and show what came out. ``command``: that of dtrain which resumes it; ``sites``: where its islands run on this
    machine; ``call``: how those elsewhere are called.

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
                opened.job,
                opened.run,
                resume_step=opened.resume_step,
                script=script,
                console=console,
                sites=sites,
                call=call,
                text=opened.text,
            )
        if outcome.exit_status == 0:
            close(console, opened.run, opened.job.islands.count, summary=not script, elsewhere=opened.job.elsewhere)
    if outcome.exit_status:
        for line in outcome.log:
            print(line, file=sys.stderr)
        message = outcome.message
        if outcome.exit_status not in (1, EXIT_USER_ERROR):
            message = resumable(message, command, opened.run, script)
        raise typer.Exit(complain(outcome.exit_status, message))
    return opened

"""How does a command end? With one line and an exit status, or with what came out of a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dtrain.launch.status import newest_commit
from dtrain.launch.tables import table

EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: trying again may help
EXIT_INTERRUPTED = 130


def complain(exit_status: int, message: str) -> int:
    print(f"dtrain: {' '.join(message.split())}", file=sys.stderr)
    return exit_status


def resumable(message: str, command: str, run_folder: Path, script: tuple[str, ...] = ()) -> str:
    """Of a script nobody here knows what it has kept."""
    again = ["dtrain", *command.split(), str(run_folder / "job.toml"), "--resume", *(["--", *script] if script else [])]
    if not script:
        kept = newest_commit(run_folder)
        message += f", kept up to step {kept}" if kept is not None else ", and nothing is kept, as no checkpoint was due"
    return f"{message}; resume with: {shlex.join(again)}"


def close(
    console: Console, run_folder: Path, num_islands: int, *, summary: bool, virtual: list[list[str]] | None = None,
    elsewhere: Sequence[int] = (),
) -> None:  # fmt: skip
    """The last screen: what came out, what it cost, and where to go from here. ``elsewhere``: islands on other hosts."""
    if summary:
        from dtrain.report import closing_rows, write_summary

        rows = closing_rows(write_summary(run_folder, num_islands))
        console.print()
        console.print(table(["", "", "what this means"], [list(row) for row in rows]))
    if virtual:
        console.print()
        console.print(table(["", "on the virtual clock", "what this means"], virtual))
    but = f" but what is island {', '.join(map(str, elsewhere))}'s own" if elsewhere else ""
    console.print(Text(f"\neverything{but} is in {run_folder}"), soft_wrap=True)
    if summary:
        console.print(Text(f"  dtrain report {run_folder}    beside other runs: name them too"), soft_wrap=True)
    if summary and 0 not in elsewhere:  # whose model it is
        console.print(Text(f"  dtrain eval {run_folder}      its models, evaluated again"), soft_wrap=True)

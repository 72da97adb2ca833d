"""What do several commands ask for on the command line?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="the job file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="keys that differ from the file", show_default=False)
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the run's newest checkpoint")]
Fresh = Annotated[bool, typer.Option("--fresh", help="replace a run of the same name")]
FreshName = Annotated[bool, typer.Option("--fresh-name", help="keep a run of the same name, take NAME-2")]

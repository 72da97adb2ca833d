"""May a command write this file, and how does it get there?"""

from __future__ import annotations

import sys
from pathlib import Path

from dtrain.metrics import write_whole

STDOUT = "-"


def check_output(output: str, *, force: bool) -> None:
    """Raises ValueError where nothing may, or can, be written there."""
    if output == STDOUT:
        if force:
            raise ValueError("--force has no effect without --output FILE: nothing is overwritten; leave it out")
        return
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output {output}: that is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {path.parent}; make it first")
    if path.exists() and not force:
        raise ValueError(f"--output {output}: the file is there already; overwrite it with --force, or name another")


def put(output: str, text: str) -> None:
    """Whole or not at all; raises OSError with the path."""
    if output == STDOUT:
        sys.stdout.write(text)
    else:
        write_whole(Path(output), text.encode())

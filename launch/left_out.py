"""What of a job file, or of its command line, has no effect on this run? A line each, as nothing is left out in silence."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

from dtrain.launch.checks import How

_OF_A_SCRIPT = ("model", "data", "train")


def left_out(job_path: Path, overrides: Sequence[str], how: How) -> tuple[str, ...]:
    """Of a job that was read and is right."""
    typed = [text.partition("=")[0].strip() for text in overrides]
    return (*_by_a_recipe(job_path, typed), *(_by_a_script(typed) if how == "script" else ()))


def _by_a_recipe(job_path: Path, typed: Sequence[str]) -> tuple[str, ...]:
    """``sync.recipe`` on the command line is a new row of answers: the file's others were made for its own."""
    if "sync.recipe" not in typed or not job_path.is_file():
        return ()
    said = tomllib.loads(job_path.read_text(encoding="utf-8")).get("sync", {})
    gone = [key for key in said if key != "recipe" and f"sync.{key}" not in typed]
    if not gone:
        return ()
    keys = ", ".join("[[sync.level]]" if key == "level" else f"sync.{key}" for key in gone)
    links = "; the levels' links go with it, and [link] says what this run's is" if "level" in gone else ""
    return (f"sync.recipe on the command line takes the place of what the job file says of [sync]: {keys}{links}",)


def _by_a_script(typed: Sequence[str]) -> tuple[str, ...]:
    keys = [key for key in typed if key.partition(".")[0] in _OF_A_SCRIPT]
    return (f"no effect on a script, which says it itself: {', '.join(keys)}",) if keys else ()

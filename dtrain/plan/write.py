"""How do a plan's answers get into a job file, so that all else in it, comments too, stays as it was?

Only the keys of [sync] change, a line each; the new text is parsed and compared before it takes the old one's place."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

from dtrain import own
from dtrain.config import toml_value
from dtrain.own_name import is_own
from dtrain.recipes import AXES, RECIPES, Recipe, answer_of, resolve

_HEADER = re.compile(r"\s*\[\s*sync\s*\]\s*(#.*)?$")
_ANY_HEADER = re.compile(r"\s*\[")
_KEY = re.compile(r"\s*(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')\s*=")


def answers(recipe: Recipe, num_islands: int, called: str | None = None) -> Mapping[str, object]:
    """The keys of [sync] that say a recipe: its row's name, and every axis that differs from the row.

    ``called``: how the job file names its row, kept where that is the recipe's, so that a relative path stays one. Raises
    ValueError where a job file has no words for the recipe."""
    row = own.load(recipe.name) if is_own(recipe.name) else RECIPES[recipe.name]
    name = called if called is not None and is_own(called) and own.load(called).name == recipe.name else recipe.name
    changed = {axis: answer_of(recipe, axis) for axis in AXES if answer_of(recipe, axis) != answer_of(row, axis)}
    if resolve(name, changed, num_islands) != recipe:
        raise ValueError(f'a job file has no words for "{recipe.name}" with {changed}: one of them takes a key away from its row')
    return {"recipe": name} | changed


def write(job_file: Path, sync: Mapping[str, object], check: Callable[[str], object]) -> None:
    """Put ``sync`` in the place of the file's [sync], at once or not at all; raises ValueError where that cannot be done, and
    what ``check`` raises for the new text."""
    file = job_file.resolve()  # a link stays one
    old = file.read_text(encoding="utf-8")
    new = replaced(old, sync, str(job_file))
    check(new)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(new, encoding="utf-8")
        shutil.copymode(file, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def replaced(text: str, sync: Mapping[str, object], where: str) -> str:
    """The text of a job file with other answers; comment lines within [sync] stay behind them."""
    lines = [f"{key} = {toml_value(value)}" for key, value in sync.items()]
    old = text.splitlines()
    headers = [k for k, line in enumerate(old) if _HEADER.match(line)]
    if not headers:
        new = [*old, *([""] if old and old[-1].strip() else []), "[sync]", *lines]
    else:
        at = headers[0]
        end = next((k for k in range(at + 1, len(old)) if _ANY_HEADER.match(old[k])), len(old))
        kept = [line for line in old[at + 1 : end] if not _KEY.match(line)]
        new = [*old[: at + 1], *lines, *kept, *old[end:]]
    out = "\n".join(new) + "\n"
    expected = tomllib.loads(text) | {"sync": dict(sync)}
    try:
        same = tomllib.loads(out) == expected
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise ValueError(
            f"{where}: [sync] is not written as one section with a key a line, so --write leaves it alone; write it so, or put "
            f"there by hand: {'; '.join(lines)}"
        )
    return out

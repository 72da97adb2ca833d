"""What can a job file say? Its keys with their defaults and meanings, read from where they are defined."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from dtrain.config import Job
from dtrain.recipes import DEFAULT_RECIPE
from dtrain.section import Section
from dtrain.sections_each import Each
from dtrain.sections_sync import Level
from dtrain.units import LINK_KEYS

_OWN_DEFAULTS = {("sync", "recipe"): f'"{DEFAULT_RECIPE}"', ("sync", "level"): "(none)", ("islands", "each"): "(none)"}
_PLACES = {"islands": "0", "rate": "N", "rtt": "N"}
"""Which levels say it."""
_EACH_DEFAULTS = {"host": "(--hosts)", "workdir": "(here)", "python": "(here)", "interface": "link.interface"}


def key_rows(section: str | None = None) -> list[list[str]]:
    """(key, default, meaning) of every key, or of one section's; raises ValueError for a section that is none."""
    if section is not None and section not in Job.model_fields:
        close = difflib.get_close_matches(section, list(Job.model_fields), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{section!r} is no section of a job file; use one of {', '.join(Job.model_fields)}{hint}")
    job = Job()
    names = Job.model_fields if section is None else [section]
    return [row for name in names for row in _section_rows(name, getattr(job, name))]


def _section_rows(name: str, section: Section) -> Iterator[list[str]]:
    for key, field in type(section).model_fields.items():
        default = _OWN_DEFAULTS.get((name, key)) or _default(field)
        yield [f"{name}.{key}", default, _meaning(field)]
    if name == "sync":
        for key in LINK_KEYS:
            field = Level.model_fields[key]
            yield [f"sync.level.{_PLACES[key]}.{key}", f"link.{key}" if key != "islands" else "(none)", _meaning(field)]
    if name == "islands":
        for key, field in Each.model_fields.items():
            default = _EACH_DEFAULTS.get(key) or (f"islands.{key}" if field.default is None else _default(field))
            yield [f"islands.each.K.{key}", default, _meaning(field)]


def _default(field: FieldInfo) -> str:
    if field.default is None:
        return "(recipe's)"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    return f'"{field.default}"' if isinstance(field.default, str) else str(field.default)


def _meaning(field: FieldInfo) -> str:
    words = [f'"{word}"' for word in _words(field.annotation)]
    missing = [word for word in words if word.strip('"') not in (field.description or "")]
    return f"{field.description} ({', '.join(words)})" if missing else field.description or ""


def _words(annotation: Any) -> Iterator[str]:
    """Those of a Literal, also inside a union."""
    if get_origin(annotation) is Literal:
        yield from (str(word) for word in get_args(annotation))
    else:
        for part in get_args(annotation):
            yield from _words(part)

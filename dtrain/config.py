"""How is a job file read, changed on a command line, and written?

A job is a TOML file of eight sections (``sections.py``, ``sections_sync.py``); an unknown key or a wrong type is one clear line.
Pure: no torch, no clock, no environment."""

from __future__ import annotations

import difflib
import re
import shlex
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from dtrain import units
from dtrain.section import Section
from dtrain.sections import Data, Islands, JobSection, LinkSection, ModelSection, Sim, Train
from dtrain.sections_sync import Level, Sync
from dtrain.units import LINK_KEYS

Whose = Callable[[str, str], str]
"""(section, key) -> where somebody wrote it: the job file's path, or that it was typed."""
_TYPED = "on the command line"
_USE = {
    "string_type": "text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "list_type": "a list", "finite_number": "a finite number", "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more", "greater_than": "more than {gt}", "less_than": "less than {lt}",
    "less_than_equal": "{le} or less", "too_short": "a list of {min_length} or more",
}  # fmt: skip
"""What pydantic's errors mean for a person who has to write something else."""


class Job(Section):
    job: JobSection = JobSection()  # pyright: ignore[reportCallIssue]
    islands: Islands = Islands()  # pyright: ignore[reportCallIssue]
    model: ModelSection = ModelSection()  # pyright: ignore[reportCallIssue]
    data: Data = Data()  # pyright: ignore[reportCallIssue]
    train: Train = Train()  # pyright: ignore[reportCallIssue]
    sync: Sync = Sync()  # pyright: ignore[reportCallIssue]
    link: LinkSection = LinkSection()  # pyright: ignore[reportCallIssue]
    sim: Sim = Sim()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _islands_of_sim_exist(self) -> Job:
        sim, count = self.sim, self.islands.count
        if sim.stragglers > count or (sim.stragglers >= 1 and sim.stragglers % 1) or 0 < sim.stragglers * count <= 0.5:
            said = f"use a whole number up to {count}, or a share below 1 that is more than half an island"
            raise ValueError(f"sim.stragglers = {sim.stragglers:g} of {count} islands; {said}")
        if sim.processes > count:
            raise ValueError(f"sim.processes = {sim.processes} of {count} islands; use as many as there are islands, or fewer")
        beyond = max((high for _, high in units.links(sim.links)), default=0)
        if beyond >= count:
            raise ValueError(f"sim.links = {sim.links!r} names island {beyond}; the last of {count} is island {count - 1}")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Job:
        shared = self.islands.engine != "pipeline"  # all of it passes through each stage of a pipeline
        parts = (self.islands.ranks if shared else 1) * self.train.accumulate
        if self.train.batch % parts:
            by = "islands.ranks x train.accumulate" if shared else "train.accumulate"
            raise ValueError(f"train.batch = {self.train.batch} does not divide by {by} = {parts}; use a multiple of {parts}")
        return self

    @model_validator(mode="after")
    def _shards_fit(self) -> Job:
        islands = self.islands
        sharded = islands.engine == "fsdp"
        for key, said in (("shards", islands.shards is not None), ("recompute", islands.recompute)):
            if said and not sharded:
                raise ValueError(
                    f'islands.{key} is of islands.engine = "fsdp", and it is {islands.engine!r}; leave it out, or use '
                    "islands.engine=fsdp"
                )
        if sharded and islands.shards is not None and islands.ranks % islands.shards:
            raise ValueError(
                f"islands.shards = {islands.shards} does not divide islands.ranks = {islands.ranks}; use a divisor of it, as "
                f"{islands.ranks}"
            )
        if sharded and self.train.merge == "variance_corrected" and islands.ranks > 1:
            raise ValueError(
                'train.merge = "variance_corrected" needs each tensor whole on a rank, and islands.engine = "fsdp" shards them; '
                "use train.merge=mean, or islands.engine=ddp"
            )
        return self

    @model_validator(mode="after")
    def _zero_fits(self) -> Job:
        islands = self.islands
        if islands.engine != "deepspeed":
            if islands.deepspeed is not None:
                raise ValueError(
                    f'islands.deepspeed is of islands.engine = "deepspeed", and it is {islands.engine!r}; leave it out, or use '
                    "islands.engine=deepspeed"
                )
            return self
        if islands.deepspeed is None:
            raise ValueError(
                'islands.engine = "deepspeed" without islands.deepspeed: its JSON file says the stage of ZeRO; name it, as '
                "islands.deepspeed=zero2.json"
            )
        if islands.ranks < 2:
            raise ValueError(
                'islands.engine = "deepspeed" with islands.ranks = 1 has nobody to share with; use islands.ranks=2 or more, or '
                "islands.engine=ddp"
            )
        if self.train.precision != "fp32":
            raise ValueError(
                f'train.precision = "{self.train.precision}" is autocast, and islands.engine = "deepspeed" has bf16 by its file: '
                '{"bf16": {"enabled": true}}; leave it out'
            )
        if self.train.merge == "variance_corrected":
            raise ValueError(
                'train.merge = "variance_corrected" needs each tensor whole on a rank, and islands.engine = "deepspeed" shards '
                "them; use train.merge=mean, or islands.engine=ddp"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> Job:
        ranks, layers, micro_batches = self.islands.ranks, self.model.layers, self.train.accumulate
        if self.islands.engine != "pipeline":
            return self
        if ranks < 2:
            raise ValueError(
                'islands.engine = "pipeline" with islands.ranks = 1 is one stage, which is no pipeline; use islands.ranks=2 or '
                "more, or islands.engine=ddp"
            )
        if self.sync.include is not None or self.sync.exclude is not None:
            axis = "include" if self.sync.include is not None else "exclude"
            raise ValueError(
                f'sync.{axis} with islands.engine = "pipeline": a stage may have none of those parameters; leave it out, or use '
                "islands.engine=ddp"
            )
        if ranks > layers:
            raise ValueError(
                f"islands.ranks = {ranks} stages of a pipeline need a block each, and there are model.layers = {layers}; use "
                "fewer ranks, or more layers"
            )
        if micro_batches < ranks:
            raise ValueError(
                f"train.accumulate = {micro_batches} micro-batches leave some of islands.ranks = {ranks} stages of a pipeline "
                f"without work all the time; use train.accumulate={ranks} or more"
            )
        return self


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file and apply ``section.key=value`` overrides; raises ValueError with one line that says what to
    do."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no job file at {path}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; name the job file in it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid TOML: {e}") from None
    return parse_job(raw, overrides, where=str(path))


def parse_job(raw: dict[str, Any], overrides: Sequence[str] = (), where: str = "the job") -> Job:
    """Build a Job from nested dicts; the recipe on the command line drops the file's other recipe axes."""
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in raw.items()}
    changes = [_split_override(text) for text in overrides]
    if any(section == "sync" and key == "recipe" for section, key, _ in changes):
        tree["sync"] = {}
    levels = _copied_levels(tree)
    for k, level in enumerate(levels):
        if any(section == "sync" and key == f"level.{k}.recipe" for section, key, _ in changes):
            levels[k] = {name: value for name, value in level.items() if name in LINK_KEYS}
    for section, key, value in changes:
        branch = tree.setdefault(section, {})
        if section == "sync" and key.startswith("level."):
            branch, key = _level_of(levels, key)
        if isinstance(branch, dict):
            branch[key] = value
    if levels:
        tree["sync"]["level"] = levels
    typed = {(section, key) for section, key, _ in changes} | {(section, "") for section, _, _ in changes if section not in raw}

    def whose(section: str, key: str) -> str:
        return _TYPED if (section, key) in typed else where

    _refuse_unknown(tree, whose)
    try:
        return Job.model_validate(_ints_to_floats(tree))
    except ValidationError as e:
        raise ValueError(_refusal(e, whose)) from None


def _refusal(refused: ValidationError, whose: Whose) -> str:
    """The first of its errors as a line that says what is wrong where, and what to write instead."""
    errors = refused.errors()
    first = errors[0]
    place = _place(first)
    name = ".".join(map(str, place))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and "=" in message:
        key = str(place[-1]) if place else ""
        message = name + message.removeprefix(key) if key and message.startswith(f"{key} =") else message
        keys = re.findall(r"\b([a-z]+)\.((?:level\.\d\.)?[a-z_]+)", message)
        return f"{next((by for pair in keys if (by := whose(*pair)) == _TYPED), whose('', ''))}: {message}"
    section, _, key = name.partition(".")
    where = whose(section, re.sub(r"\.\d+$", "", key))
    said = message
    if first["type"] in _USE:
        both = (e for e in errors if _place(e) == place and e["type"] in _USE)  # of a key that may be a number or text
        words = [_USE[e["type"]].format(**e.get("ctx", {})) for e in both]
        said = f"use {' or '.join(dict.fromkeys(words))}{_example(place, typed=where == _TYPED)}"
    return f"{where}: {name} = {first['input']!r} is not allowed{'; ' if said is not message else ': '}{said}"


def _place(error: ErrorDetails) -> list[int | str]:
    """Section, key, and what may follow of a level or a list."""
    return [part for part in error["loc"] if part not in ("int", "str", "literal['round']")]


def _example(place: Sequence[int | str], *, typed: bool) -> str:
    """As the key's own answer shows it, where it has an example; a shell wants a list in quotes."""
    (section, key, *below), length = place, 2
    model = type(getattr(Job(), str(section)))
    if key == "level" and len(below) > 1:
        model, key, length = Level, below[1], 4
    field = model.model_fields.get(str(key))
    if field is None or not field.examples:
        return ""
    (value,) = field.examples
    if not typed:
        return f", as {key} = {toml_value(value)}"
    said = value if isinstance(value, str) else toml_value(value).replace(", ", ",")
    return f", as {shlex.quote('.'.join(map(str, place[:length])) + '=' + said)}"


def runs_a_script(job: Job) -> bool:
    """Whether this is the job.toml of a run of somebody's own script: only there the recipe's answers are not written out."""
    always = ("recipe", "algorithm", "every", "codec", "reduce", "topology", "delay", "fragments")
    return any(getattr(level, key) is None for level in job.sync.level or [job.sync] for key in always)


def dump_job(job: Job) -> str:
    """The job as TOML, every key written out that has a value."""
    lines: list[str] = []
    for name in Job.model_fields:
        section: Section = getattr(job, name)
        lines.append(f"[{name}]")
        said = section.model_dump(exclude_none=True)
        levels = said.pop("level", [])
        lines += [f"{key} = {toml_value(value)}" for key, value in said.items()]
        for level in levels:
            lines += [f"[[{name}.level]]", *(f"{key} = {toml_value(value)}" for key, value in level.items())]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """As it stands behind a key's equals sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)


def _split_override(text: str) -> tuple[str, str, object]:
    name, equals, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and section and key):
        piece = text.endswith((",", "]"))  # of a list with blanks, which a shell took apart
        hint = "; a list goes in quotes, without blanks: 'islands.speeds=[1,0.5]'" if piece else ""
        raise ValueError(f"{text!r} is not an override; write section.key=value, as in sync.every=50{hint}")
    try:
        return section, key, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return section, key, value


def _copied_levels(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that tables [[sync.level]] gave, to be changed; none where they are something else, which is refused later."""
    sync = tree.get("sync")
    levels = sync.get("level") if isinstance(sync, dict) else None
    return [dict(level) for level in levels] if isinstance(levels, list) and all(isinstance(v, dict) for v in levels) else []


def _level_of(levels: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], str]:
    """``level.1.every`` -> the second level, ``every``."""
    _, number, inner = (*key.split(".", 2), "", "")[:3]
    if not inner or not number.isdecimal() or int(number) >= len(levels):
        known = f"level.0 to level.{len(levels) - 1}" if levels else "no [[sync.level]]"
        raise ValueError(f"sync.{key} names no key of a level; the job has {known}, and sync.level.0.every is a key of the first")
    return levels[int(number)], inner


def _refuse_unknown(tree: dict[str, Any], whose: Whose) -> None:
    for section, content in tree.items():
        if section not in Job.model_fields:
            raise ValueError(f"{whose(section, '')}: unknown section [{section}]{_did_you_mean(section, list(Job.model_fields))}")
        if not isinstance(content, dict):
            raise ValueError(
                f"{whose(section, '')}: {section} = {content!r} is not a section; write [{section}] and its keys below"
            )
        model = type(getattr(Job(), section))
        for key in content:
            if key not in model.model_fields:
                homes = [name for name, field in Job.model_fields.items() if key in field.default.__class__.model_fields]
                hint = f"; did you mean {homes[0]}.{key}?" if homes else _did_you_mean(key, list(model.model_fields))
                raise ValueError(f"{whose(section, key)}: unknown key {section}.{key}{hint}")
        for k, level in enumerate(_copied_levels(tree) if section == "sync" else ()):
            for key in level:
                if key not in Level.model_fields:
                    hint = _did_you_mean(key, list(Level.model_fields))
                    raise ValueError(f"{whose('sync', f'level.{k}.{key}')}: unknown key sync.level.{k}.{key}{hint}")


def _did_you_mean(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(known)}"


def _ints_to_floats(tree: dict[str, Any]) -> dict[str, Any]:
    """TOML writes 1 for 1.0; strict validation would refuse it."""
    floats = {
        (name, key)
        for name, field in Job.model_fields.items()
        for key, inner in field.default.__class__.model_fields.items()
        if inner.annotation in (float, float | None, list[float])
    }

    def with_floats(name: str, section: dict[str, Any]) -> dict[str, Any]:
        return {k: _float(v) if (name, k) in floats else v for k, v in section.items()}

    out = {name: with_floats(name, section) for name, section in tree.items()}
    if levels := _copied_levels(tree):
        out["sync"]["level"] = [with_floats("sync", level) for level in levels]
    return out


def _float(value: object) -> object:
    if isinstance(value, list):
        return [_float(item) for item in value]
    return float(value) if type(value) is int else value

"""How is a job file read, changed on a command line, and written?

A job is a TOML file of nine sections (``sections*.py``); an unknown key or a wrong type is one clear line.
Pure: no torch, no clock, no environment."""

from __future__ import annotations

import difflib
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator
from pydantic_core import ErrorDetails

from dtrain import units
from dtrain.engine_fits import Shape, check_deepspeed, check_fsdp, check_stages, check_uneven, sharing_batch
from dtrain.section import Section
from dtrain.sections import Data, Islands, JobSection, LinkSection, ModelSection, Sim, Train
from dtrain.sections_each import Each, IslandPlan
from dtrain.sections_log import Log
from dtrain.sections_sync import Level, Sync
from dtrain.units import LINK_KEYS

Whose = Callable[[str, str], str]
"""(section, key) -> where somebody wrote it: the job file's path, or that it was typed."""
_TYPED = "on the command line"
_USE = {
    "string_type": "text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "list_type": "a list", "finite_number": "a finite number", "literal_error": "{expected}",
    "dict_type": "a table",
    "greater_than_equal": "{ge} or more", "greater_than": "more than {gt}", "less_than": "less than {lt}",
    "less_than_equal": "{le} or less", "too_short": "a list of {min_length} or more",
}  # fmt: skip
"""What pydantic's errors mean for a person who has to write something else."""
_TABLES: dict[str, tuple[str, type[Section]]] = {"sync": ("level", Level), "islands": ("each", Each)}
"""Of which sections there are tables, [[sync.level]] and [[islands.each]], and what each may say."""


class Job(Section):
    job: JobSection = JobSection()  # pyright: ignore[reportCallIssue]
    islands: Islands = Islands()  # pyright: ignore[reportCallIssue]
    model: ModelSection = ModelSection()  # pyright: ignore[reportCallIssue]
    data: Data = Data()  # pyright: ignore[reportCallIssue]
    train: Train = Train()  # pyright: ignore[reportCallIssue]
    sync: Sync = Sync()  # pyright: ignore[reportCallIssue]
    link: LinkSection = LinkSection()  # pyright: ignore[reportCallIssue]
    log: Log = Log()  # pyright: ignore[reportCallIssue]
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
    def _streams_are_dealt(self) -> Job:
        if self.data.streaming and self.islands.shard != "iid":
            raise ValueError(
                f'islands.shard = "{self.islands.shard}" has no effect with data.streaming, which deals rows to islands; leave '
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Job:
        for shape in self._shapes():
            sharing, keys = sharing_batch(self.islands, shape)
            parts = sharing * self.train.accumulate
            if self.train.batch % parts:
                by = " x ".join((*keys, "train.accumulate"))
                raise ValueError(f"train.batch = {self.train.batch} does not divide by {by} = {parts}; use a multiple of {parts}")
        return self

    @model_validator(mode="after")
    def _engines_fit(self) -> Job:
        shapes = list(self._shapes())
        check_fsdp(self.islands, self.train, shapes)
        check_deepspeed(self.islands, self.train, shapes)
        check_uneven(self.train, shapes)
        check_stages(self.islands, self.model, self.train, self.sync, shapes)
        return self

    def island(self, k: int) -> IslandPlan:
        """What is said of one island: by its table [[islands.each]], else by [islands] and [link]."""
        own = Each() if self.islands.each is None else self.islands.each[k]  # pyright: ignore[reportCallIssue]
        return IslandPlan(
            own.ranks or self.islands.ranks, own.engine or self.islands.engine, own.launcher, own.host, own.workdir, own.python,
            own.interface or self.link.interface,
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        """Of all islands together."""
        return sum(self.island(k).ranks for k in range(self.islands.count))

    def ranks_beside(self, k: int) -> int:
        """Ranks that share the machine of island k, its own among them."""
        return self._ranks_at(self._machine(k), range(self.islands.count))

    def ranks_before(self, k: int) -> int:
        """Of those that share the machine of island k the ones of earlier islands."""
        return self._ranks_at(self._machine(k), range(k))

    def _ranks_at(self, machine: str | int, islands: range) -> int:
        return sum(self.island(n).ranks for n in islands if self._machine(n) == machine)

    def _machine(self, k: int) -> str | int:
        """The launcher's, or the host that the job names; one that somebody starts elsewhere is taken to be alone."""
        plan = self.island(k)
        return "" if plan.here else plan.host or k

    @property
    def uneven(self) -> bool:
        """Whether islands have different engines or numbers of ranks, so that ranks have no counterparts."""
        return len({(ranks, engine) for _, ranks, engine in self._shapes()}) > 1

    def seen_by(self, k: int) -> Job:
        """The job as if all islands were like this one: what trains asks [islands] for its ranks and engine."""
        plan = self.island(k)
        own = {"ranks": plan.ranks, "engine": plan.engine, "each": None}
        return self.model_copy(update={"islands": self.islands.model_copy(update=own)})

    @property
    def elsewhere(self) -> list[int]:
        """The islands that are not the launcher's own children."""
        return [k for k in range(self.islands.count) if not self.island(k).here]

    def _shapes(self) -> Iterator[Shape]:
        """(the key that says the ranks, ranks, engine) of every island whose table says some, and of those that take [islands]'
        answers."""
        if self.islands.each is None:
            yield Shape("islands.ranks", self.islands.ranks, self.islands.engine)
        for k, own in enumerate(self.islands.each or ()):
            plan = self.island(k)
            key = "islands.ranks" if own.ranks is None and own.engine is None else f"islands.each.{k}.ranks"
            yield Shape(key, plan.ranks, plan.engine)


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
    tables = {section: _copied_tables(tree, section) for section in _TABLES}
    for k, level in enumerate(tables["sync"]):
        if any(section == "sync" and key == f"level.{k}.recipe" for section, key, _ in changes):
            tables["sync"][k] = {name: value for name, value in level.items() if name in LINK_KEYS}
    for section, key, value in changes:
        branch = tree.setdefault(section, {})
        name, _ = _TABLES.get(section, ("", None))
        if key.startswith(f"{name}.") and name:
            branch, key = _table_of(section, tables[section], key)
        if isinstance(branch, dict):
            branch[key] = value
    for section, copied in tables.items():
        name = _TABLES[section][0]
        if copied and not any((section, name) == (typed, key) for typed, key, _ in changes):
            tree[section][name] = copied
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
        if place and isinstance(place[-1], int):  # a table, which does not know its number
            message = f"{name}.{message}"
        key = str(place[-1]) if place else ""
        message = name + message.removeprefix(key) if key and message.startswith(f"{key} =") else message
        keys = re.findall(r"\b([a-z]+)\.((?:(?:level|each)\.\d+\.)?[a-z_]+)", message)
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
        of_tables = _TABLES[name][0] if name in _TABLES else ""
        tables = said.pop(of_tables, [])
        lines += [f"{key} = {toml_value(value)}" for key, value in said.items()]
        for table in tables:
            lines += [f"[[{name}.{of_tables}]]", *(f"{key} = {toml_value(value)}" for key, value in table.items())]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: object) -> str:
    """As it stands behind a key's equals sign."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        pairs = (f"{_toml_key(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml_value(key)


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


def _copied_tables(tree: dict[str, Any], section: str) -> list[dict[str, Any]]:
    """Those that [[sync.level]] or [[islands.each]] gave, to be changed; none where they are something else, which is refused
    later."""
    said = tree.get(section)
    tables = said.get(_TABLES[section][0]) if isinstance(said, dict) else None
    return [dict(table) for table in tables] if isinstance(tables, list) and all(isinstance(v, dict) for v in tables) else []


def _table_of(section: str, tables: list[dict[str, Any]], key: str) -> tuple[dict[str, Any], str]:
    """Of section sync, ``level.1.every`` -> the second level, ``every``; of islands likewise ``each.1.host``."""
    name, number, inner = (*key.split(".", 2), "", "")[:3]
    if not inner or not number.isdecimal() or int(number) >= len(tables):
        what, example = ("a level", "every") if section == "sync" else ("an island's table", "host")
        known = f"{name}.0 to {name}.{len(tables) - 1}" if tables else f"no [[{section}.{name}]]"
        raise ValueError(
            f"{section}.{key} names no key of {what}; the job has {known}, and {section}.{name}.0.{example} is a key of the first"
        )
    return tables[int(number)], inner


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
        name, model = _TABLES.get(section, ("", Section))
        for k, key in ((k, key) for k, table in enumerate(_copied_tables(tree, section) if name else ()) for key in table):
            if key not in model.model_fields:
                hint = _did_you_mean(key, list(model.model_fields))
                raise ValueError(f"{whose(section, f'{name}.{k}.{key}')}: unknown key {section}.{name}.{k}.{key}{hint}")


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
    if levels := _copied_tables(tree, "sync"):
        out["sync"]["level"] = [with_floats("sync", level) for level in levels]
    return out


def _float(value: object) -> object:
    if isinstance(value, list):
        return [_float(item) for item in value]
    return float(value) if type(value) is int else value

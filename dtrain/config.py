"""How is a job file read, changed on a command line, and written?

A job is a TOML file of eight sections (``sections.py``); an unknown key or a wrong type is one clear line. Pure: no torch, no
clock, no environment."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from dtrain import units
from dtrain.sections import Data, Islands, JobSection, Level, LinkSection, ModelSection, Section, Sim, Sync, Train
from dtrain.units import LINK_KEYS


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
        shared = self.islands.engine == "ddp"  # all of it passes through each stage of a pipeline
        parts = (self.islands.ranks if shared else 1) * self.train.accumulate
        if self.train.batch % parts:
            by = "islands.ranks x train.accumulate" if shared else "train.accumulate"
            raise ValueError(f"train.batch = {self.train.batch} does not divide by {by} = {parts}; use a multiple of {parts}")
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
    _refuse_unknown(tree, where)
    try:
        return Job.model_validate(_ints_to_floats(tree))
    except ValidationError as e:
        first = e.errors()[0]
        name = ".".join(str(part) for part in first["loc"] if part not in ("int", "literal['round']"))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "value_error" and "=" in message:
            key = str(first["loc"][-1]) if first["loc"] else ""
            said = message.removeprefix(key) if key and message.startswith(f"{key} =") else None
            raise ValueError(f"{where}: {message if said is None else name + said}") from None
        raise ValueError(f"{where}: {name} = {first['input']!r} is not allowed: {message}") from None


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
        raise ValueError(f"{text!r} is not an override; write section.key=value, as in sync.every=50")
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


def _refuse_unknown(tree: dict[str, Any], where: str) -> None:
    for section, content in tree.items():
        if section not in Job.model_fields:
            raise ValueError(f"{where}: unknown section [{section}]{_did_you_mean(section, list(Job.model_fields))}")
        if not isinstance(content, dict):
            raise ValueError(f"{where}: {section} = {content!r} is not a section; write [{section}] and its keys below")
        model = type(getattr(Job(), section))
        for key in content:
            if key not in model.model_fields:
                homes = [name for name, field in Job.model_fields.items() if key in field.default.__class__.model_fields]
                hint = f"; did you mean {homes[0]}.{key}?" if homes else _did_you_mean(key, list(model.model_fields))
                raise ValueError(f"{where}: unknown key {section}.{key}{hint}")
        for k, level in enumerate(_copied_levels(tree) if section == "sync" else ()):
            for key in level:
                if key not in Level.model_fields:
                    hint = _did_you_mean(key, list(Level.model_fields))
                    raise ValueError(f"{where}: unknown key sync.level.{k}.{key}{hint}")


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

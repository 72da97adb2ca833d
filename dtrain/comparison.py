"""How do recipes compare? Entries, the rows that their runs leave in a file, and what paired seeds say.

A row is one finished run. Its key is the entry, the job and the files that the job names, so a run that is in the file is not
repeated, and rows of another job are not mixed in; a file of rows is of one version of dtrain. Two entries are compared seed by
seed: a seed fixes the initial weights and all batches, so the difference of a pair is the recipe's, and the interval is
Student's for the mean of those differences."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev

BASELINE = "allreduce"

# Student's 0.975 quantile for 1 to 30 degrees of freedom, and the normal one.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z975 = 1.959964


@dataclass(frozen=True, slots=True)
class Entry:
    """A recipe with overrides, as ``choco+codec=int4:64``; a key without a section is one of sync's. Keys of sync and train only:
    entries differ in how they train, and share islands, model, data and steps."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    """section.key=value."""


@dataclass(frozen=True, slots=True)
class Row:
    """One finished run."""

    entry: str
    budget: float
    seed: int
    islands: int
    steps: int
    job: str
    """Digest of the job file, and of the files that the run's job names, where there are any."""
    parameters: int
    bits_per_byte: float | None
    """Of the exact mean of the islands' models, on text held out; None where it is not finite."""
    bits_per_byte_islands: float | None
    """Mean over the islands' own models, just before the merge."""
    consensus_distance: float | None
    sent_bytes: float
    """By one island, in all rounds; the start and the merge are not counted."""
    date: str
    cpu: str

    @property
    def key(self) -> tuple[str, float, int, int, str]:
        return self.entry, self.budget, self.seed, self.islands, self.job


@dataclass(frozen=True, slots=True)
class Behind:
    """An entry beside a baseline, in percent of its bits a byte; positive is worse."""

    seeds: int
    percent: float | None
    """None where a run of these seeds did not end finite: what is left would be a mean of those that went well."""
    half_width: float | None
    """Of the 95 % interval of the mean; None with a single seed, and without a mean."""


def parse_entry(text: str) -> Entry:
    recipe, *changes = text.split("+")
    overrides = []
    for change in changes:
        key, equals, value = change.partition("=")
        if not (equals and key and value):
            raise ValueError(f"{change!r} in {text!r} is no override; write RECIPE+key=value, as in choco+codec=int4:64")
        where = key if "." in key else f"sync.{key}"
        if where.partition(".")[0] not in ("sync", "train") or where in ("sync.recipe", "train.steps"):
            raise ValueError(
                f"{change!r} in {text!r} is not for an entry to say: it may change keys of sync, but not recipe, and of "
                "train, but not steps; put it into the job file, or use --islands, --seeds, --budgets"
            )
        overrides.append(f"{where}={value}")
    return Entry(text, recipe, tuple(overrides))


def digest(job_text: str) -> str:
    """Of what a job file says, without its comments."""
    return hashlib.sha256(json.dumps(tomllib.loads(job_text), sort_keys=True).encode()).hexdigest()[:12]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, the first of each key, as two commands may have done the same run; none where it is not there.
    ValueError names the line that is none."""
    if not path.exists():
        return []
    rows = dict[object, Row]()
    names = {field.name for field in fields(Row)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            content = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}, line {number} is no row ({e}); take it out, or name another file") from None
        if not isinstance(content, dict) or set(content) != names:
            raise ValueError(f"{path}, line {number} is no row of this command; take it out, or name another file")
        row = Row(**content)
        rows.setdefault(row.key, row)
    return list(rows.values())


def append_row(path: Path, row: Row) -> None:
    """In a single write at the file's end, so that rows of two commands do not mix. Raises OSError where it did not fit; then
    the part that did is taken away again, unless another command has already written behind it."""
    line = (json.dumps(asdict(row)) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        written = os.write(descriptor, line)
        if written != len(line):
            end = os.lseek(descriptor, 0, os.SEEK_CUR)  # an appending write leaves the position behind what it wrote
            if os.fstat(descriptor).st_size == end:
                os.ftruncate(descriptor, end - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def behind(rows: Sequence[Row], baseline: Sequence[Row]) -> Behind | None:
    """Over the seeds that both have finished, at one budget; None where there are none."""
    theirs = {row.seed: row.bits_per_byte for row in baseline}
    pairs = [(row.bits_per_byte, theirs[row.seed]) for row in rows if row.seed in theirs]
    percents = [100 * (ours / base - 1) for ours, base in pairs if ours is not None and base is not None]
    n = len(pairs)
    if not pairs:
        return None
    if len(percents) < n:
        return Behind(n, None, None)
    half = t975(n - 1) * stdev(percents) / math.sqrt(n) if n > 1 else None
    return Behind(n, mean(percents), half)


def t975(freedom: int) -> float:
    """Student's 0.975 quantile; above 30 degrees of freedom by Cornish and Fisher's expansion in 1 / n, whose next term, (3 z^7 +
    19 z^5 + 17 z^3 - 15 z) / (384 n^3), is below 1e-4 there."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, n = _Z975, freedom
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def table(rows: Sequence[Row], entries: Iterable[str], baseline: str = BASELINE) -> list[list[str]]:
    """(entry, budget, seeds, bits a byte, behind the baseline, islands alone, MB an island), an entry and budget a row."""
    shown = []
    for entry in entries:
        for budget in sorted({row.budget for row in rows if row.entry == entry}):
            ours = [row for row in rows if row.entry == entry and row.budget == budget]
            shown.append(
                [
                    *(entry, f"{budget:g}x", str(len(ours))),
                    _mean([row.bits_per_byte for row in ours]),
                    _percent(behind(ours, [row for row in rows if row.entry == baseline and row.budget == budget])),
                    _mean([row.bits_per_byte_islands for row in ours]),
                    f"{mean(row.sent_bytes for row in ours) / 1e6:,.1f}",
                ]
            )
    return shown


def points(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(bytes an island sent, bits a byte) of an entry, in the mean of its seeds, at each budget where all ended finite."""
    found = []
    for budget in sorted({row.budget for row in rows}):
        ours = [row for row in rows if row.budget == budget]
        bits = [row.bits_per_byte for row in ours if row.bits_per_byte is not None]
        if len(bits) == len(ours):
            found.append((mean(row.sent_bytes for row in ours), mean(bits)))
    return found


def _mean(values: Sequence[float | None]) -> str:
    finite = [value for value in values if value is not None]
    return f"{mean(finite):.4f}" if len(finite) == len(values) else "not finite"


def _percent(found: Behind | None) -> str:
    if found is None:
        return "-"
    if found.percent is None:
        return "not finite"
    return f"{found.percent:+.2f} %" + ("" if found.half_width is None else f" +- {found.half_width:.2f}")

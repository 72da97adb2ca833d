"""What can a person type after ``dtrain bench``? Each command measures on this machine, and prints rows as they come."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from dtrain.launch.tables import check_picture, table

if TYPE_CHECKING:
    from dtrain.kernels.bench import Options, Row

Number = TypeVar("Number", int, float)

ROWS = Path("runs/bench-recipes.jsonl")

bench_app = typer.Typer(help="Measure on this machine.", rich_markup_mode=None)

COLUMNS = (
    *(("operation", -44), ("backend", -9), ("x", -5), ("size", 5), ("time", 9), ("+-", 4), ("GB/s", 6)),
    *(("of", 5), ("", -5), ("eager", 6), ("compile", 7)),
)
LEGEND = """+- is (75 % - 25 %) / median. GB/s counts the floor, the fewest bytes that the operation must move; "of" is its
share of the bandwidth of a copy, or of an in-place scale, timed in turns with it. eager, compile and names below a row: their
time / ours."""


@bench_app.callback()
def bench() -> None:
    """Measure on this machine."""


@bench_app.command()
def kernels(
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write all rows there")] = None,
    op: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="only this operation; repeatable")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", metavar="NAME", help="reference, numba, triton")] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="cpu|cuda", help="cuda where there is one")] = None,
    numel: Annotated[
        list[str] | None, typer.Option("--numel", metavar="N", help="elements, as 2^24, 16M, or full: 1 GiB an operand")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option("--dtype", metavar="fp32|bf16", help="of x and its gradient")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one small size, short timings, no torch.compile")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="without torch.compile, which takes longest")] = False,
) -> None:
    """Time every kernel beside the bytes it must move.

    Also beside eager torch and torch.compile. A kernel whose result differs from the
    specification gets no speed, and the command ends with status 1.

    Example: dtrain bench kernels --op accum_adam --op gossip_adam --json speeds.json
    """
    from dtrain.kernels.bench import find_backends, machine, run, write_rows

    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ValueError(f"--json {json_file}: name a file in a folder that is there")
    options = _options(op or (), device, numel or (), dtype or (), quick=quick, compile_too=not (quick or no_compile))
    options.cases()  # refuses a wrong name before anything is printed
    console = Console(width=120, highlight=False)
    notes: list[str] = []
    backends = find_backends(backend or (), options.device, notes.append)
    console.print(Text(f"{machine(options.device)}\n{LEGEND}\n"), soft_wrap=True)
    console.print(Text(_line([name for name, _ in COLUMNS])), style="bold")
    rows: list[Row] = []
    try:
        for row in run(options, backends, notes.append):
            rows.append(row)
            console.print(Text(show(row)), style="" if row.equal else "red", soft_wrap=True)
    finally:
        if json_file is not None:
            write_rows(json_file, rows)
    for note in notes:
        console.print(Text(note), soft_wrap=True)
    unequal = sorted({f"{row.backend}'s {row.op}" for row in rows if not row.equal})
    if unequal:
        console.print(Text(f"no speed, as the result differs from the specification: {', '.join(unequal)}"), soft_wrap=True)
        raise typer.Exit(1)


@bench_app.command()
def recipes(
    job_file: Annotated[Path | None, typer.Argument(metavar="[JOB.toml]", help="left out: launch/jobs/bench*.toml")] = None,
    names: Annotated[
        str | None, typer.Option("--recipes", metavar="A,B,...", help="names, FILE.py:ROW, with keys: choco+codec=int4:64")
    ] = None,
    family: Annotated[str | None, typer.Option("--family", metavar="gossip|diloco", help="all of one, and its job")] = None,
    baseline: Annotated[str, typer.Option("--baseline", metavar="ENTRY", help="what the others are compared with")] = "allreduce",
    seeds: Annotated[str, typer.Option("--seeds", metavar="0,1,...", help="of weights and batches")] = "0",
    budgets: Annotated[str, typer.Option("--budgets", metavar="1,2,...", help="times the job's steps")] = "1",
    num_islands: Annotated[int | None, typer.Option("--islands", help="islands.count", min=1, show_default=False)] = None,
    rows_file: Annotated[Path, typer.Option("--rows", metavar="FILE.jsonl", help="finished runs; none is run again")] = ROWS,
    at_once: Annotated[int, typer.Option("--at-once", help="runs side by side; 0: one a core", min=0)] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.png", help="draw them")] = None,
) -> None:
    """Train the same model by several recipes, and compare.

    Each run is a "dtrain sim"; its result is a line of the rows file as soon as it is
    there, so the command goes on where it was stopped. The baseline with the same seeds is
    what the others are compared with; it is always run.

    Example: dtrain bench recipes --recipes mine.py:row,dpsgd,choco --seeds 0,1 --out both.png
    """
    from dtrain import comparison
    from dtrain.launch import bench_recipes as bench

    if out is not None:
        check_picture(out)
    if (names is None) == (family is None):
        raise ValueError("say which recipes: --recipes A,B,... or --family gossip|diloco, and not both")
    listed = names.split(",") if names is not None else bench.family(family or "")
    entries = [comparison.parse_entry(name) for name in dict.fromkeys([baseline, *listed])]
    job = job_file or bench.JOBS.get(family or "", bench.JOB)
    done = comparison.read_rows(rows_file)
    each = _numbers("--budgets", budgets, float, 0.0), _numbers("--seeds", seeds, int, -1)
    digest_of = bench.digests(job, entries, num_islands)
    runs = bench.wanted(job, entries, *each, num_islands, done)
    rows_file.parent.mkdir(parents=True, exist_ok=True)
    console, failed = Console(width=140, highlight=False), 0
    for found in bench.run_all(runs, rows_file, at_once or os.cpu_count() or 1, _say):
        if isinstance(found, bench.Failed):
            failed += 1
            console.print(Text(f"FAILED {found.wanted.entry.name}, seed {found.wanted.seed}: {found.said}"), soft_wrap=True)
    count = num_islands or bench.read_job(job, simulated=True).islands.count
    read = comparison.read_rows(rows_file)
    rows = [row for row in read if row.job == digest_of.get(row.entry) and row.islands == count]
    header = ["recipe", "budget", "seeds", "bits a byte", f"against {baseline}", "islands alone", "MB an island"]
    console.print(table(header, comparison.table(rows, [entry.name for entry in entries], baseline)))
    if out is not None:
        from dtrain.comparison_plot import plot_rows

        plot_rows(rows, [entry.name for entry in entries], out, baseline)
        console.print(Text(f"drawn: {out}"), soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _say(line: str) -> None:
    """In one piece, as runs side by side speak from threads; print() writes the end of its line by itself."""
    sys.stdout.write(f"{line}\n")


def _numbers(option: str, text: str, kind: type[Number], above: float) -> list[Number]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: write numbers with commas between them") from None
    if not all(math.isfinite(n) and n > above for n in numbers):
        raise ValueError(f"{option} {text}: all must be above {above:g}")
    return list(dict.fromkeys(numbers))


def _options(
    ops: Sequence[str], device: str | None, numels: Sequence[str], dtypes: Sequence[str], *, quick: bool, compile_too: bool
) -> Options:
    import torch

    from dtrain.kernels.bench import CPU_SIZES, CUDA_SIZES, QUICK_SIZES, Options, parse_numel

    there = torch.cuda.is_available()
    device = device or ("cuda" if there else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: measure on cpu or cuda")
    if device == "cuda" and not there:
        raise ValueError(f"--device cuda: torch {torch.__version__} sees no CUDA device; use --device cpu")
    on_cuda = device == "cuda"
    usual = QUICK_SIZES if quick else CUDA_SIZES if on_cuda else CPU_SIZES
    return Options(
        torch.device(device),
        tuple(ops),
        tuple(map(parse_numel, numels)) or usual,
        tuple(dtypes) or (("fp32", "bf16") if on_cuda and not quick else ("fp32",)),
        compile=compile_too,
        least_s=0.02 if quick else 0.2,
    )


def show(row: Row) -> str:
    """One line of the table, and behind it what only some operations are compared with."""
    from dtrain.kernels.bench import show_numel

    name = f"{row.op} {row.variant}".strip()
    start = [name, row.backend, row.dtype, show_numel(row.numel)]
    if not row.equal or row.median_s is None or row.spread is None:
        return _line(start) + f"  NOT EQUAL, no speed: {row.message}"
    cells = [
        *start,
        _time(row.median_s),
        f"{min(row.spread, 9.99):.0%}",
        f"{row.gb_s:.4g}"[:6],
        f"{row.copy_fraction:.0%}",
        row.bandwidth,
        _ratio(row.vs_eager),
        _ratio(row.vs_compile),
    ]
    more = {"parts": row.vs_parts, "bitsandbytes": row.vs_bitsandbytes, "deepspeed": row.vs_deepspeed}
    said = [f"{what} {_ratio(value)}" for what, value in more.items() if value is not None]
    if row.vs_parts is not None:
        said[0] += f" (at most {row.parts_bound:.2f})"
    if row.vs_adamw_fused is not None:
        said.append(f"AdamW {1 / row.vs_adamw_fused:.2f}")
    return "\n    ".join([_line(cells), *([", ".join(said)] if said else [])])


def _line(cells: Sequence[str]) -> str:
    padded = [f"{cell:<{-width}}" if width < 0 else f"{cell:>{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=False)]
    return " ".join(padded).rstrip()


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if value >= 0.1 else 3}f}"


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.4g} {unit}"
    raise AssertionError

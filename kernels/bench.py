"""How fast is each operation, beside the floor that its bytes set, and beside what one would run in its place?

A row is one operation, backend, dtype and size. All that a row compares was timed in turns in one run. Before that, the backend's
result is compared with the specification's; where they differ there is no speed."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dtrain.kernels import bench_baselines, reference
from dtrain.kernels.bench_cases import IN_PLACE, Case, default_cases, in_parts, operands, pieces_of
from dtrain.kernels.bench_timing import Timing, available_bytes, bandwidths, interleaved
from dtrain.kernels.dispatch import BACKENDS, OPERATIONS, backend
from dtrain.kernels.equal import copies, difference, tensors
from dtrain.kernels.floors import floor_bytes, parts_bound
from dtrain.kernels.operands import Format

FULL = 0
"""The size at which an operation's largest operand has FULL_BYTES."""
FULL_BYTES = 1 << 30
CPU_SIZES = (1 << 16, 1 << 20, 1 << 24, FULL)
CUDA_SIZES = (1 << 20, 1 << 24, FULL)
QUICK_SIZES = (1 << 16,)
COMPILE_AT_MOST = 1 << 24
"""torch.compile takes seconds a size; it is timed at the largest size up to this one."""
COPY_AT_MOST = 2 << 30
"""Bytes that the bandwidth is measured with: those of the row, up to here, where it no longer depends on them."""
SLOW_S = 2.0
"""A call that is expected to take longer is left out."""
TEMPORARIES = 48
"""Bytes an element that the specification makes on its way (int64 random bits, keys and indices)."""
DEFAULT_FORMAT = Format("int4", 64)
"""The default recipe's."""
EQUAL_SIZES = (1, 67, 4_099, 70_001)


@dataclass(frozen=True, slots=True)
class Options:
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ops: tuple[str, ...] = ()
    """All where empty."""
    numels: tuple[int, ...] = CPU_SIZES
    dtypes: tuple[str, ...] = ("fp32",)
    fmt: Format = DEFAULT_FORMAT
    compile: bool = True
    least_s: float = 0.2

    def cases(self) -> list[Case]:
        for op in self.ops:
            if op not in OPERATIONS:
                raise ValueError(f"--op {op}: there is no such operation; there are {', '.join(OPERATIONS)}")
        for dtype in self.dtypes:
            if dtype not in ("fp32", "bf16"):
                raise ValueError(f"--dtype {dtype}: x is fp32 or bf16")
        return [case for case in default_cases(self.dtypes, self.fmt) if not self.ops or case.op in self.ops]


@dataclass(frozen=True, slots=True)
class Row:
    op: str
    variant: str
    backend: str
    device: str
    dtype: str
    numel: int
    equal: bool
    message: str = ""
    """Why there is no speed, or why one of the baselines has none."""
    median_s: float | None = None
    spread: float | None = None
    repetitions: int = 0
    floor_bytes: int = 0
    gb_s: float | None = None
    bandwidth: str = ""
    """What copy_fraction is a share of: an out-of-place ``copy``, or an in-place ``scale`` for operations in place."""
    bandwidth_gb_s: float | None = None
    copy_fraction: float | None = None
    vs_eager: float | None = None
    """Its time / ours, as vs_compile, vs_parts, vs_bitsandbytes and vs_deepspeed: above 1 we are faster."""
    vs_compile: float | None = None
    vs_parts: float | None = None
    parts_bound: float | None = None
    vs_adamw_fused: float | None = None
    """Our time / torch's fused AdamW's: below 1 we are faster."""
    vs_bitsandbytes: float | None = None
    vs_deepspeed: float | None = None
    machine: str = ""


def parse_numel(text: str) -> int:
    """``2^24``, ``16M`` (powers of 1024), ``65536``, or ``full``."""
    if text == "full":
        return FULL
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "K", "M", "G") else (text, "")
    base, caret, exponent = number.partition("^")
    try:
        numel = int(base) ** int(exponent) if caret else int(number) << {"": 0, "k": 10, "K": 10, "M": 20, "G": 30}[unit]
    except ValueError:
        numel = 0
    if not 0 < numel <= 1 << 34:
        raise ValueError(f"--numel {text}: write elements as 2^24, 16M, 65536, or full (1 GiB an operand); at most 2^34")
    return numel


def find_backends(names: Sequence[str], device: torch.device, say: Callable[[str], None]) -> dict[str, ModuleType]:
    """Those that are named, or else those that can run on the device; raises ValueError where a named one cannot."""
    found = {}
    if forced := os.environ.get("DTRAIN_KERNELS"):
        if names and forced not in names:
            raise ValueError(f"DTRAIN_KERNELS = {forced!r} forces a backend, and --backend names another; leave one of them out")
        names = (forced,)
    for name in names or ("reference", "triton" if device.type == "cuda" else "numba"):
        try:
            if name not in BACKENDS:
                raise ValueError(f"there are {', '.join(sorted(BACKENDS))}")
            if importlib.util.find_spec(BACKENDS[name]) is None:
                raise ValueError(f"there are no {name} kernels in this installation of dtrain")
            if name == "numba" and device.type != "cpu":
                raise ValueError(f"numba kernels run on a CPU, not on {device.type}; leave --device or --backend out")
            if name == "triton" and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
                raise ValueError("triton kernels need a GPU; add --device cuda, or set TRITON_INTERPRET=1, which is slow")
            found[name] = backend(name)
        except ValueError as e:
            if names:
                raise ValueError(f"{'DTRAIN_KERNELS =' if forced else '--backend'} {name}: {e}") from e
            say(f"left out: {e}")
    return found


def run(options: Options, backends: Mapping[str, ModuleType], say: Callable[[str], None]) -> Iterator[Row]:
    """Rows as they are measured, size by size; what is left out is said once."""
    bench = _Bench(options, backends, say)
    for case in options.cases():
        unequal = {name: unequal_to_reference(case, ops, options.device) for name, ops in backends.items()}
        numels = sorted({numel or full_numel(case) for numel in options.numels})
        for numel in numels:
            yield from bench.measure(case, numel, unequal, compile_here=numel == _compile_at(numels))
    for what, ops in bench.left_out.items():
        say(f"left out, {what}: {', '.join(dict.fromkeys(ops))}")


def unequal_to_reference(case: Case, ops: ModuleType, device: torch.device) -> str | None:
    """How a backend's result differs from the specification's, or None: odd sizes, and several parameters where it takes them."""
    if ops is reference and device.type == "cpu":
        return None
    cpu = torch.device("cpu")
    for numel in EQUAL_SIZES:
        before = operands(case, numel, cpu, weight=1 / 3)
        if case.op.endswith("adam"):
            before = pieces_of(case, [numel, 1, 65], cpu, weight=1 / 3)
        expected, got = copies(before, cpu), copies(before, device)
        getattr(reference, case.op)(*expected)
        try:
            getattr(ops, case.op)(*got)
        except (AttributeError, RuntimeError, ValueError) as e:
            return f"{case.op}, {numel} elements: {type(e).__name__}: {str(e).partition(chr(10))[0]}"
        if found := difference(case.op, before, expected, got):
            return f"{case.op}, {numel} elements: {found}"
    return None


def full_numel(case: Case) -> int:
    """Elements at which the largest operand has FULL_BYTES."""
    small = 1 << 16
    largest = max(t.nbytes for t in tensors(operands(case, small, torch.device("cpu"))))
    return FULL_BYTES // (largest // small)


def _compile_at(numels: Sequence[int]) -> int:
    return max((n for n in numels if n <= COMPILE_AT_MOST), default=numels[0])


class _Bench:
    """What is remembered between rows: how slow a contender was at a smaller size, and what has been said."""

    def __init__(self, options: Options, backends: Mapping[str, ModuleType], say: Callable[[str], None]) -> None:
        self.options, self.backends, self.device = options, backends, options.device
        self.machine = machine(options.device)
        self.left_out: dict[str, list[str]] = {}
        self._say, self._said = say, set[str]()
        self._last: dict[tuple[Case, str], float] = {}
        """Seconds an element."""

    def say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def measure(self, case: Case, numel: int, unequal: Mapping[str, str | None], *, compile_here: bool) -> Iterator[Row]:
        blank = {
            name: Row(case.op, case.variant, name, self.device.type, case.dtype, numel, not unequal[name],
                      unequal[name] or "", machine=self.machine)
            for name in self.backends
        }  # fmt: skip
        yield from (blank[name] for name in self.backends if unequal[name])
        sizes = case.sizes(numel)
        floor = floor_bytes(case.op, sizes)
        need, spare = self._needs(case, numel, floor), int(0.85 * available_bytes(self.device))
        if need > spare:
            self._leave_out(case, f"{show_numel(numel)} elements need more than the {gib(spare)} that can be used")
            return
        arguments = operands(case, numel, self.device)
        reasons: list[str] = []
        calls = self._contenders(case, numel, arguments, unequal, reasons, room=spare - need, compile_here=compile_here)
        if not any(name in calls for name in self.backends):
            return
        which = "scale" if case.op in IN_PLACE else "copy"
        moved = min(floor, COPY_AT_MOST)
        timed = interleaved({which: bandwidths(moved, self.device)[which], **calls}, self.device, least_s=self.options.least_s)
        self._last |= {(case, name): timing.median_s / numel for name, timing in timed.items()}
        bandwidth = moved / timed[which].median_s
        for name in self.backends:
            if name in timed:
                speed = _speed(name, timed, floor)
                yield replace(
                    blank[name],
                    **speed,
                    message="; ".join(reasons),
                    floor_bytes=floor,
                    bandwidth=which,
                    bandwidth_gb_s=bandwidth / 1e9,
                    copy_fraction=floor / timed[name].median_s / bandwidth,
                    parts_bound=parts_bound(case.op, sizes),
                )

    def _leave_out(self, case: Case, why: str) -> None:
        self.left_out.setdefault(why, []).append(case.op)

    def _needs(self, case: Case, numel: int, floor: int) -> int:
        small = 1 << 16
        own = sum(t.nbytes for t in tensors(operands(case, small, torch.device("cpu")))) * numel // small
        return own + min(floor, COPY_AT_MOST) + (16 * numel if case.op == "accum_adam" else 0)

    def _contenders(
        self, case: Case, numel: int, arguments: tuple[Any, ...], unequal: Mapping[str, str | None], reasons: list[str], *,
        room: int, compile_here: bool,
    ) -> dict[str, Callable[[], object]]:  # fmt: skip
        calls: dict[str, Callable[[], object]] = {}

        def add(name: str, make: Callable[[], Callable[[], object] | str | None], temporaries: int = 0) -> None:
            expected_s = self._last.get((case, name), 0.0) * numel
            if expected_s > SLOW_S:
                reasons.append(f"{name} would take {expected_s:.1f} s a call")
                self._leave_out(case, f"{name} at {show_numel(numel)} would take more than {SLOW_S:g} s a call")
            elif temporaries > room:
                reasons.append(f"{name} would need {gib(temporaries)} more")
                self._leave_out(case, f"{name} at {show_numel(numel)} needs more memory than can be used")
            elif isinstance(call := make(), str):
                reasons.append(call)
                self.say(f"no number: {call}")
            elif call is not None:
                calls[name] = call

        plain, eager = TEMPORARIES * numel, bench_baselines.eager(case)
        for name, ops in self.backends.items():
            if unequal[name]:
                continue
            function = getattr(ops, case.op)
            add(name, lambda function=function: lambda: function(*arguments), plain if ops is reference else 0)
            if name in calls:
                add(f"parts of {name}", lambda ops=ops: in_parts(case, arguments, ops))
        if "reference" not in calls or eager is not reference.__dict__[case.op]:
            add("eager", lambda: lambda: eager(*arguments), plain)
        if self.options.compile and compile_here:
            add("compile", lambda: bench_baselines.compiled(case, arguments), plain)
        if any(name in calls for name in self.backends):
            add("adamw", lambda: bench_baselines.adamw_fused(case, arguments))
            add("bitsandbytes", lambda: bench_baselines.bitsandbytes(case, arguments))
            add("deepspeed", lambda: bench_baselines.deepspeed(case, arguments))
        return calls


def _speed(name: str, timed: Mapping[str, Timing], floor: int) -> dict[str, Any]:
    own = timed[name]

    def times_slower(other: str) -> float | None:
        return timed[other].median_s / own.median_s if other in timed else None

    adamw = times_slower("adamw")
    return {
        "median_s": own.median_s,
        "spread": own.spread,
        "repetitions": own.repetitions,
        "gb_s": floor / own.median_s / 1e9,
        "vs_eager": times_slower("eager" if "eager" in timed else "reference"),
        "vs_compile": times_slower("compile"),
        "vs_parts": times_slower(f"parts of {name}"),
        "vs_adamw_fused": 1 / adamw if adamw else None,
        "vs_bitsandbytes": times_slower("bitsandbytes"),
        "vs_deepspeed": times_slower("deepspeed"),
    }


def machine(device: torch.device) -> str:
    """Hardware, versions, threads and date in a line."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {gib(torch.cuda.get_device_properties(device).total_memory)}"
    else:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
        name = f"{model}, {len(os.sched_getaffinity(0))} cores, {gib(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"
    versions = [f"{package} {_version(package)}" for package in ("torch", "numba", "triton")]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    threads = torch.get_num_threads()
    return f"{name}; {', '.join(versions)}; {threads} thread{'s' * (threads != 1)}; {today}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A list of rows as JSON; a reader sees all of it or what was there before."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def show_numel(numel: int) -> str:
    return f"2^{numel.bit_length() - 1}" if numel & (numel - 1) == 0 else str(numel)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"

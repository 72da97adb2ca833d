"""What does every kernel cost on every target? Compiles them all, on a machine without a GPU, and reads registers and spills.

    python -m dtrain.kernels._triton.compile [--few] [--jobs N] [--json FILE]

--few compiles every kernel for every target, and every constant and type that a kernel is launched with for one of them:
``specializations.dealt``, the dearest forms to sm_90."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.knobs import nvidia

from dtrain.kernels._triton.launch import Launch, options
from dtrain.kernels._triton.specializations import dealt, few, launches

TARGETS = (
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)
MOST_TELLING = TARGETS[1]
"""sm_100 needs ptxas-blackwell, which triton brings beside ptxas."""

CUDA_FORBIDS = (r"\.ftz", r"\.approx", r"div\.full", r"fma\.rn\.f32")
HIP_FORBIDS = (r"\bcontract\b", r"\bfast\b", r"\barcp\b", r"llvm\.fmuladd", r"llvm\.fma\.f32", r"preserve-sign")
FUSED = ("outer_kernel",)
"""Kernels that say tl.fma."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel on one target. On hip registers are vector registers; spills are bytes of stack on cuda, where nothing else
    uses it, and spilled registers of both kinds on hip."""

    launch: str
    kernel: str
    target: str
    registers: int
    shared_bytes: int
    spills: int
    num_warps: int
    operation: str
    faults: tuple[str, ...]
    """What the machine's code does though the specification forbids it."""


@cache
def wanted(small: bool) -> tuple[tuple[Launch, str, GPUTarget], ...]:
    """What is compiled, with the operation that launches it, always in one order: processes name it by number."""
    found = launches((64,), (4096,))
    if small:
        targets = sorted(TARGETS, key=lambda target: target != MOST_TELLING)
        some = list(zip(dealt(found, len(targets)), targets, strict=True))
    else:
        more = few(launches((32, 4096), (64,)))
        some = [(found | more if target == MOST_TELLING else found, target) for target in TARGETS]
    return tuple((launch, operation, target) for kernels, target in some for launch, operation in kernels.items())


def compile_one(task: tuple[bool, int]) -> Row:
    small, number = task
    launch, operation, target = wanted(small)[number]
    signature = dict(launch.signature) | {name: "constexpr" for name, _ in launch.constants}
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=dict(launch.constants))
    built = triton.compile(source, target=target, options=options(launch.name, launch.num_warps, target.backend))
    registers, spills = _cuda_resources(built.asm["cubin"]) if target.backend == "cuda" else _hip_resources(built.asm["amdgcn"])
    return Row(
        str(launch), launch.name, f"{target.backend}:{target.arch}", registers, built.metadata.shared, spills, launch.num_warps,
        operation, tuple(_faults(launch, target, built)),
    )  # fmt: skip


def _faults(launch: Launch, target: GPUTarget, built: Any) -> list[str]:
    code, forbidden = (built.asm["ptx"], CUDA_FORBIDS) if target.backend == "cuda" else (built.asm["llir"], HIP_FORBIDS)
    faults = [p for p in forbidden if re.search(p, code) and not ("fma" in p and launch.name in FUSED)]
    return faults + [f"32-bit offsets: {line}" for line in narrow_offsets(built.asm["ttir"])]


def narrow_offsets(ttir: str) -> list[str]:
    """Uses of a program's number, other than its widening to 64 bits."""
    ids = re.findall(r"(%\S+) = tt.get_program_id", ttir)
    lines = [line.partition(" loc(")[0].strip() for line in ttir.splitlines()]
    used = [line for line in lines for i in ids if re.search(rf"{re.escape(i)}\b", line.partition("=")[2])]
    return [line for line in used if not re.search(r"arith\.extsi .* to i64", line)]


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def _hip_resources(assembly: str) -> tuple[int, int]:
    found = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", assembly)}
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]


def compile_all(small: bool, jobs: int, cache_dir: str) -> list[Row]:
    """Cold: the cache is ``cache_dir`` alone."""
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    tasks = [(small, number) for number in range(len(wanted(small)))]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_one, tasks, chunksize=4))


def main() -> None:
    parser = argparse.ArgumentParser(description="compile every kernel for every target, without a GPU")
    parser.add_argument("--few", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began, date = time.perf_counter(), time.strftime("%Y-%m-%d")
    with tempfile.TemporaryDirectory() as cache_dir:
        rows = compile_all(args.few, args.jobs, cache_dir)
    seconds = time.perf_counter() - began
    for target in sorted({row.target for row in rows}):
        here = [row for row in rows if row.target == target]
        top = max(here, key=lambda row: row.registers)
        print(f"{target}: {len(here)} kernels, at most {top.registers} registers: {top.launch}")
        print(f"    spills {sum(row.spills for row in here)}, shared at most {max(row.shared_bytes for row in here)} bytes")
    print(f"{len(rows)} compiled in {seconds:.0f} s; faults: {dict(Counter(f for row in rows for f in row.faults))}")
    if args.json:
        found = {"triton": triton.__version__, "torch": torch.__version__, "date": date, "seconds": round(seconds)}
        text = ",\n".join(json.dumps(asdict(row)) for row in rows)
        args.json.write_text(f'{json.dumps(found)[:-1]}, "kernels": [\n{text}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()

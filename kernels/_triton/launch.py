"""How is a kernel launched, and what decides how it is compiled?

Only the constexpr arguments and the types of the pointers decide: integers are always int64 and floats fp32, and neither values
nor alignment specialize. So ``compile.py`` can compile, without a GPU, exactly what the operations launch: ``recording`` collects
it. Whether 16-byte loads are allowed is a run-time flag, that each program branches on (``memory.py``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.knobs import runtime

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

TILE = 1024
"""Elements of a program, or one block where that is larger. A literal and never @triton.autotune, whose trial runs would change
operands that are updated in place. Swept on an H200 (tests/gpu/sweep.py, 2026-11-27: 2^27 elements, seven pairs of 512 to 4096
elements and 128 to 512 of a warp): of 18 operations these are the fastest, or within 1 %, but for encode (4096 elements: 9 %
faster) and mix of bf16 (2048: 3 %)."""
ELEMENTS_PER_WARP = 512
"""16 a thread: four 16-byte loads of fp32, two of bf16. 256 are slower there: encode by 9 %, of int8 by 30 %, AccumAdam by 7 %,
its gossip step by 3 to 11 %; but choco's, which hold two more states, are faster with them, by 4 to 10 %."""
ELEMENTS_PER_WARP_OF_CHOCO = 256


MOST_REGISTERS = {"step_kernel": 168, "encode_kernel": 128, "topk_encode_kernel": 128, "topk_mix_kernel": 128}
"""A thread's, on cuda. Left to itself ptxas spills two registers of some of these to seat one more program on an SM; told a
limit, none. 168 seats 3 programs of 4 warps."""
MOST_REGISTERS_OF_2_WARPS = MOST_REGISTERS | {"step_kernel": 176}
"""With 168 one of these spills two."""
LEAST_WAVES = {"encode_kernel": 2}
"""On hip, of a SIMD. Left to itself LLVM spills four scalar registers of one of these to seat more waves than a tile's reads keep
busy."""
REGISTERS_OF_SM = 65536
"""A program that needs more does not start. Told a limit of registers, ptxas compiles it all the same; 16 warps have 128 a
thread."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One compiled kernel: what the pointers point to, the constexpr arguments and the warps of a program."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def __str__(self) -> str:
        shown = [f"{k}={v}" for k, v in self.constants] + [t for _, t in self.signature if t.startswith("*")]
        return f"{self.name}({', '.join(shown)})"


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it nothing runs: every launch is noted instead. For CPU tensors too, and for the main thread only."""
    global _recorded  # noqa: PLW0603 - a switch of compile.py, which owns its process
    _recorded = launches = []
    try:
        yield launches
    finally:
        _recorded = None


def kernel(fn: Callable[..., None]) -> Any:
    """``triton.jit``, specialized on the constexpr arguments and the types of pointers alone."""
    given = [name for name, p in inspect.signature(fn).parameters.items() if "constexpr" not in str(p.annotation)]
    return triton.jit(do_not_specialize=given, do_not_specialize_on_alignment=given)(fn)


def launch(kernel: Any, programs: int, num_warps: int, *arguments: Tensor | float, **constants: Any) -> None:
    """Run ``programs`` programs."""
    if _recorded is not None:
        signature = tuple(zip(kernel.arg_names, map(_type, arguments), strict=False))
        _recorded.append(Launch(kernel, signature, tuple(constants.items()), num_warps))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cpu" and not runtime.interpret:
        raise ValueError("the triton kernels got CPU tensors; use a GPU, or DTRAIN_KERNELS=numba, or TRITON_INTERPRET=1 to debug")
    if programs:
        backend = "hip" if torch.version.hip else "cuda"
        # Triton launches on the thread's current GPU, wherever the tensors lie, and a link may have threads of its own.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*arguments, **constants, **options(kernel.fn.__name__, num_warps, backend))


def options(name: str, num_warps: int, backend: str) -> dict[str, Any]:
    """What a kernel is compiled with, besides its constants. Multiply-adds are never fused unless a kernel says ``tl.fma``."""
    most = MOST_REGISTERS_OF_2_WARPS if num_warps == 2 else MOST_REGISTERS
    limit = dict[str, int]()
    if backend == "cuda" and name in most:
        limit = {"maxnreg": min(most[name], REGISTERS_OF_SM // (32 * num_warps))}
    if backend == "hip" and name in LEAST_WAVES:
        limit = {"waves_per_eu": LEAST_WAVES[name]}
    return {"num_warps": num_warps, "enable_fp_fusion": False, **limit}


def aligned(*tensors: Tensor) -> bool:
    """Whether 16-byte loads may start at element 0 of all of them."""
    return not any(x.data_ptr() % 16 for x in tensors)


def _type(argument: Tensor | float) -> str:
    if isinstance(argument, Tensor):
        return TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i64"

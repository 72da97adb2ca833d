"""How is a kernel compiled, once for all processes? By numba's cache on disk, with a stamp that covers all of this package."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from numba import float32, float64, int64, njit, void
from numba.core.ccallback import CFunc

from dtrain.kernels._numba import formats, topk
from dtrain.kernels.cpu_cache import note_compiled, source_stamp
from dtrain.kernels.operands import Kind

KERNELS: dict[str, Any] = {}
_FORMATS = {
    "identity": (formats.encode_identity, formats.decode_identity),
    "bf16": (formats.encode_bf16, formats.decode_bf16),
    "int8": (formats.encode_int8, formats.decode_int8),
    "int4": (formats.encode_int4, formats.decode_int4),
    "e3m0": (formats.encode_e3m0, formats.decode_e3m0),
    "lut4": (formats.encode_lut4, formats.decode_lut4),
    "sign": (formats.encode_sign, formats.decode_sign),
    "topk": (topk.encode_topk, topk.decode_topk),
}


def kernel(function: Callable[..., None]) -> Any:
    """Jit a function that Python calls without the interpreter's lock; it is compiled or loaded at its first call."""
    jitted: Any = njit(nogil=True, error_model="numpy")(function)
    _keep_on_disk(jitted)
    KERNELS[function.__name__] = jitted
    return jitted


def _keep_on_disk(compiled: Any) -> None:
    try:
        compiled.enable_caching()
    except RuntimeError:  # numba found no folder that it may write to: every process compiles
        return
    compiled._cache._cache_file._source_stamp = source_stamp()


def _signature(function: Callable[..., None], floating: Any) -> Any:
    """An argument that is annotated float is ``floating``, others are int64."""
    parameters = inspect.signature(function).parameters.values()
    return void(*(floating if p.annotation in ("float", float) else int64 for p in parameters))


@cache
def _functions(kind: Kind) -> tuple[Any, Any]:
    both = []
    for function in _FORMATS[kind]:
        machine_code = CFunc(function, (_signature(function, float32).args, void), {}, {"error_model": "numpy"})
        _keep_on_disk(machine_code)
        machine_code.compile()
        both.append(machine_code)
    return both[0], both[1]


@cache
def addresses(kind: Kind) -> tuple[int, int]:
    """Of a format's encode and decode."""
    encode, decode = _functions(kind)
    return encode.address, decode.address


def prepare(kinds: Sequence[Kind] | None = None, kernels: Sequence[str] | None = None) -> float:
    """Compile or load formats and kernels, all where none are named; returns the seconds that took."""
    start = time.perf_counter()
    functions = [f for kind in (_FORMATS if kinds is None else kinds) for f in _functions(kind)]
    for name in KERNELS if kernels is None else kernels:
        KERNELS[name].compile(_signature(KERNELS[name].py_func, float64))
    if kinds is None and kernels is None:
        caches: list[Any] = [compiled._cache for compiled in (*KERNELS.values(), *functions)]
        note_compiled([c._cache_file._index_path for c in caches if hasattr(c, "_cache_file")])
    return time.perf_counter() - start

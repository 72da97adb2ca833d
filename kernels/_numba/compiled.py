"""How is a kernel compiled, once for all processes? By numba's cache on disk, with a stamp that covers all of this package."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

from numba import float64, int64, njit, void

from dtrain.kernels.cpu_cache import note_compiled, source_stamp

KERNELS: dict[str, Any] = {}


def kernel(function: Callable[..., None]) -> Any:
    """Jit a function that Python calls without the interpreter's lock; it is compiled or loaded at its first call."""
    try:
        jitted: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
        jitted._cache._cache_file._source_stamp = source_stamp()
    except RuntimeError:  # numba found no folder that it may write to
        jitted = njit(nogil=True, error_model="numpy")(function)
    KERNELS[function.__name__] = jitted
    return jitted


def prepare(names: Sequence[str] | None = None) -> float:
    """Compile or load kernels, all where none is named; returns the seconds that took. An argument that is annotated float is float64, others int64."""
    start = time.perf_counter()
    for name in KERNELS if names is None else names:
        parameters = inspect.signature(KERNELS[name].py_func).parameters.values()
        KERNELS[name].compile(void(*(float64 if p.annotation in ("float", float) else int64 for p in parameters)))
    if names is None:
        paths = [getattr(jitted, "_cache", None) for jitted in KERNELS.values()]
        note_compiled([path._cache_file._index_path for path in paths if hasattr(path, "_cache_file")])
    return time.perf_counter() - start

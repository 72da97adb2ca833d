"""How is a kernel compiled, once for all processes? By numba's cache on disk, with a stamp that covers all of this package."""

from __future__ import annotations

import ctypes
import inspect
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

from numba import float32, int64, void
from numba.core.ccallback import CFunc

from dtrain.kernels._numba import decoders, encoders, topk
from dtrain.kernels.cpu_cache import note_compiled, source_stamp
from dtrain.kernels.operands import Kind

KERNELS: dict[str, Kernel] = {}
_FORMATS = {
    "identity": (encoders.encode_identity, decoders.decode_identity),
    "bf16": (encoders.encode_bf16, decoders.decode_bf16),
    "int8": (encoders.encode_int8, decoders.decode_int8),
    "int4": (encoders.encode_int4, decoders.decode_int4),
    "e3m0": (encoders.encode_e3m0, decoders.decode_e3m0),
    "lut4": (encoders.encode_lut4, decoders.decode_lut4),
    "sign": (encoders.encode_sign, decoders.decode_sign),
    "topk": (topk.encode_topk, topk.decode_topk),
}


class Code:
    """A C function, compiled or loaded from the cache when it is first asked for."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.compiled = _c_function(function)

    @cached_property
    def address(self) -> int:
        self.compiled.compile()
        return self.compiled.address


class Kernel(Code):
    """One that takes the address of its arguments, which Python can call."""

    @cached_property
    def call(self) -> Callable[[int], None]:
        """Without the interpreter's lock."""
        return ctypes.CFUNCTYPE(None, ctypes.c_int64)(self.address)


def kernel(function: Callable[..., None]) -> Kernel:
    made = KERNELS[function.__name__] = Kernel(function)
    return made


def _c_function(function: Callable[..., None]) -> Any:
    """A C function of int64 arguments, and float32 where one is annotated float."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (float32 if p.annotation in ("float", float) else int64 for p in parameters)
    made: Any = CFunc(function, (void(*kinds).args, void), {}, {"error_model": "numpy"})
    try:
        made.enable_caching()
    except RuntimeError:  # numba found no folder that it may write to: every process compiles
        return made
    made._cache._cache_file._source_stamp = source_stamp()
    return made


@cache
def _formats(kind: Kind) -> tuple[Code, Code]:
    encode, decode = _FORMATS[kind]
    return Code(encode), Code(decode)


def addresses(kind: Kind) -> tuple[int, int]:
    """Of a format's encode and decode."""
    encode, decode = _formats(kind)
    return encode.address, decode.address


def prepare(kinds: Sequence[Kind] | None = None, kernels: Sequence[str] | None = None) -> float:
    """Compile or load formats and kernels, all where none are named; returns the seconds that took."""
    start = time.perf_counter()
    wanted: list[Code] = [code for kind in (_FORMATS if kinds is None else kinds) for code in _formats(kind)]
    wanted += [KERNELS[name] for name in (KERNELS if kernels is None else kernels)]
    loaded = {code: code.address for code in wanted}
    if kinds is None and kernels is None:
        caches: list[Any] = [code.compiled._cache for code in loaded]
        note_compiled([c._cache_file._index_path for c in caches if hasattr(c, "_cache_file")])
    return time.perf_counter() - start

"""Which backend runs the kernels?

Triton on a GPU, numba on a CPU. ``DTRAIN_KERNELS`` forces one by name; a backend that was asked for and is not there is an
error, never a fallback."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from dtrain.kernels.cpu_cache import alone, is_compiled
from dtrain.kernels.operands import Kind

BACKENDS = {
    "reference": "dtrain.kernels.reference",
    "numba": "dtrain.kernels._numba",
    "triton": "dtrain.kernels._triton",
}
_BY_DEVICE = {"cpu": "numba", "cuda": "triton"}

_LOADED: dict[str, ModuleType] = {}
_BLOCK_FORMATS = ("int8", "int4", "e3m0", "lut4", "sign")
OPERATIONS = (
    *(f"quantize_{kind}" for kind in _BLOCK_FORMATS),
    *(f"dequantize_add_{kind}" for kind in _BLOCK_FORMATS),
    *("cast_bf16", "add_bf16", "topk_chunks", "topk_add", "encode", "decode_add"),
    *("encode_difference", "encode_feedback", "choco_encode", "choco_mix", "mix"),
    *("accum_adam", "gossip_adam", "choco_gossip_adam", "outer_step"),
    *("sum_of_squares", "scale", "checksum", "flag_non_finite", "put_identity"),
)
"""What every backend has, with the signatures of ``reference.py``."""


def operations(device: torch.device) -> ModuleType:
    """The module whose functions are the operations for tensors of a device; on the meta device there is nothing to compute,
    whatever is forced. Triton, where it is forced, is for what lies on a GPU: the CPU beside one checks wires that arrived."""
    if device.type == "meta":
        return importlib.import_module("dtrain.kernels.shapes")
    forced = os.environ.get("DTRAIN_KERNELS")
    if forced == "triton" and device.type == "cpu" and torch.cuda.is_available():
        forced = None
    name = forced or _BY_DEVICE.get(device.type, "reference")
    return _LOADED.get(name) or _LOADED.setdefault(name, backend(name))


def prepare(device: torch.device, kinds: Sequence[Kind], say: Callable[[], None]) -> None:
    """Compile the kernels of a device where that has not been done on this machine; ``say`` is called first, for it takes about
    half a minute. Then load those of the formats that will be used, 0.4 s that the first round would wait for."""
    if operations(device).__name__ != BACKENDS["numba"]:
        return
    if not is_compiled():
        say()
        with alone():
            operations(device).prepare()
    operations(device).prepare(kinds)


def backend(name: str) -> ModuleType:
    """A backend by name; raises ValueError where there is no such, or its package is not installed."""
    if name not in BACKENDS:
        raise ValueError(f"DTRAIN_KERNELS = {name!r} is not a backend; use one of {', '.join(sorted(BACKENDS))}")
    try:
        return importlib.import_module(BACKENDS[name])
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] == "dtrain":
            raise
        raise ValueError(f"the {name} kernels need the package {e.name}; install it, or set DTRAIN_KERNELS=reference") from e

"""Compression, gossip and optimizer kernels: what each operation means is ``reference.py``; which backend runs is
``dispatch.py``; what their bytes mean is ``WIRE.md``."""

from dtrain.kernels.cpu_cache import cache_folder, is_compiled
from dtrain.kernels.dispatch import BACKENDS, OPERATIONS, backend, operations, prepare
from dtrain.kernels.operands import MAX_BLOCK, MIN_BLOCK, SUM_TILE, Adam, Coded, Format, KeptCoded, Noise, Piece, Public, zones

__all__ = [
    "BACKENDS",
    "MAX_BLOCK",
    "MIN_BLOCK",
    "OPERATIONS",
    "SUM_TILE",
    "Adam",
    "Coded",
    "Format",
    "KeptCoded",
    "Noise",
    "Piece",
    "Public",
    "backend",
    "cache_folder",
    "is_compiled",
    "operations",
    "prepare",
    "zones",
]

"""Compression kernels: which implementation runs, and what each operation means (``reference.py`` is the
specification)."""

from dtrain.kernels.dispatch import operations

__all__ = ["operations"]

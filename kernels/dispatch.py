"""Which backend runs the kernels?

``DTRAIN_KERNELS`` forces one by name; a backend that was asked for and is not there is an error, never a fallback.
"""

from __future__ import annotations

import os
from types import ModuleType

from dtrain.kernels import reference

_BACKENDS: dict[str, ModuleType] = {"reference": reference}


def operations() -> ModuleType:
    """The module whose functions are the operations."""
    name = os.environ.get("DTRAIN_KERNELS", "reference")
    if name not in _BACKENDS:
        raise ValueError(f"DTRAIN_KERNELS={name!r} is not a backend; available: {', '.join(sorted(_BACKENDS))}")
    return _BACKENDS[name]

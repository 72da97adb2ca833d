"""What does an operation do to tensors that have shapes and no values? Nothing: the backend of torch's meta device, on which
``dtrain plan`` runs methods to count their bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dtrain.kernels import reference


def __getattr__(name: str) -> Callable[..., None]:
    """Any operation, with the signature of ``reference.py``; raises AttributeError where that has none."""
    return _nothing(getattr(reference, name))


@functools.cache
def _nothing(operation: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(operation)
    def skip(*operands: object, **named: object) -> None:
        """Nothing."""

    return skip

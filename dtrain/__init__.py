"""dtrain trains one large model on islands of GPUs that are joined by slow links."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.engine import Sync, join
    from dtrain.errors import NonFinite, PeerLost, WireError

__all__ = ["NonFinite", "PeerLost", "Sync", "WireError", "join"]


def __getattr__(name: str) -> object:
    """Import torch only when a name that needs it is used: `dtrain --help` answers at once."""
    if name in ("Sync", "join"):
        from dtrain import engine

        return getattr(engine, name)
    if name in __all__:
        from dtrain import errors

        return getattr(errors, name)
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")

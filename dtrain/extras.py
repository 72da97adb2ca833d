"""Is a package there that dtrain does not install by itself? An extra brings it: ``pip install '.[hf]'`` in a checkout."""

from __future__ import annotations

from importlib.util import find_spec


def require(package: str, *, asked: str, extra: str) -> None:
    """Raises ValueError where what a job file says needs a package that is not installed."""
    if find_spec(package) is None:
        raise ValueError(f"{asked} needs {package}, which is not installed; in a checkout: pip install '.[{extra}]'")

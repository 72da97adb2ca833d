"""Which names in a job file are somebody's own, and not the project's? ``FILE.py:NAME``. Pure."""

from __future__ import annotations

OWN_AXES = ("recipe", "topology", "codec")
"""What a job file may name so."""


def is_own(name: str) -> bool:
    """Whether it names something in a file of somebody's own."""
    return ".py:" in name

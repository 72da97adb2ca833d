"""How are rates, times, sizes and losses read and shown? (``"10mbit"``, ``"40ms"``, ``1.5 MB``, bits a byte)"""

from __future__ import annotations

import math
import re

_RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

LINK_KEYS = ("islands", "rate", "rtt")
"""Of a level of [sync], what is no answer of a recipe: who is in its groups, and what its link is like."""


def bits_per_s(text: str) -> float | None:
    """``"10mbit"`` -> 1e7; ``"none"`` -> None (unshaped). Units as tc writes them: bit, kbit, mbit, gbit, tbit."""
    if text == "none":
        return None
    value = _number_with_unit(text, _RATES)
    if value is None or value <= 0:
        raise ValueError(f'{text!r} is not a rate; write "10mbit", "1gbit" or "none"')
    return value


def seconds(text: str) -> float:
    """``"40ms"`` -> 0.04. Units: us, ms, s."""
    value = _number_with_unit(text, _TIMES)
    if value is None or value < 0:
        raise ValueError(f'{text!r} is not a time; write "40ms" or "1s"')
    return value


def links(text: str) -> dict[tuple[int, int], tuple[float | None, float]]:
    """``"0-1:10mbit/80ms, 0-2:none/5ms"`` -> {(0, 1): (1e7, 0.08), ...}: the rate and the round trip between two islands."""
    found: dict[tuple[int, int], tuple[float | None, float]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\d+)-(\d+):([^/]+)/([^/]+)", part)
        if match is None or match[1] == match[2]:
            raise ValueError(f'{part!r} is no link of two islands; write "0-1:10mbit/80ms"')
        pair = min(int(match[1]), int(match[2])), max(int(match[1]), int(match[2]))
        if pair in found:
            raise ValueError(f"{part!r} names a link that was named before; both directions are one")
        found[pair] = bits_per_s(match[3].strip()), seconds(match[4].strip())
    return found


def _number_with_unit(text: str, units: dict[str, float]) -> float | None:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in units:
        return None
    return float(match[1]) * units[match[2]]


def bits_per_byte(loss_nats: float, bytes_per_token: float) -> float:
    """Loss in nats a token -> bits a byte of text, which compares models of different vocabularies."""
    return loss_nats / math.log(2) / bytes_per_token


def show_bytes(count: float) -> str:
    """``1500000`` -> ``1.5 MB`` (decimal units, as links are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:  # above it, three digits would read 1e+03
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def show_seconds(value: float) -> str:
    """``75.2`` -> ``1 min 15 s``; ``0.25`` -> ``0.25 s``."""
    if value < 60:
        return f"{value:.3g} s"
    return f"{int(value) // 60} min {int(value) % 60} s"

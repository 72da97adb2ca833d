"""How do shares of a simulation, which have a clock each, stay the simulation that it would be on one clock?

Conservative parallel discrete events (Chandy and Misra 1979; windows as in Nicol's YAWNS, 1993). Islands meet only through wires,
and when a wire arrives is known where it is posted. All shares agree on t, the earliest event of any, and each handles its own of
the window [t, t + L), where no wire arrives sooner than L after it was posted: those that are posted in the window to another
share arrive behind it, and change hands at its end. With L = 0, or one that is lost in the rounding of t + L, a window is one
wave of t (virtual_clock.py). Rounding keeps order, so a wire of L or longer is never rounded into its window.

What is handed over is said here, and how in virtual_sockets.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.virtual import Key, Simulation


class Failure(NamedTuple):
    """Of what a share handled at ``time_s``."""

    time_s: float
    error: Exception


@dataclass(slots=True)
class Parcel:
    """One wire, and the islands of the other share that it goes to: (arrival, island) each. Whoever took it says so
    (``Simulation.sent``)."""

    key: Key
    wire: Tensor
    to: list[tuple[float, int]] = field(default_factory=list)


@dataclass(slots=True)
class Said:
    """What a share says to another at the end of a window."""

    earliest_s: float
    """No event of this share, and no wire that it posted to any, is earlier; infinity where there is none."""
    failure: Failure | None = None
    parcels: list[Parcel] = field(default_factory=list)


Heard = Sequence[tuple[float, Failure | None]]
"""``earliest_s`` and ``failure`` of each other share; its wires are in ``Simulation.receive`` already."""
Windows = Generator[Mapping[int, Said], Heard, Failure | None]
"""Yields what goes to each other share, at the end of each window; returns why it ended before its end."""


@torch.no_grad()
def windows(part: Simulation, steps: int, owners: Sequence[int], own: int, least_s: float) -> Windows:
    """The steps of share ``own``. ``owners``: island -> its share. All shares end with the same window, and know the earliest
    failure of any."""
    others = sorted(set(owners) - {own})
    failure: Failure | None = None
    part.begin(steps)
    while True:
        earliest_s, said = _said(part, owners, others, failure)
        heard = yield said
        failures = [f for f in (failure, *(f for _, f in heard)) if f is not None]
        if failures:
            return min(failures, key=lambda f: f.time_s)
        time_s = min([earliest_s, *(theirs_s for theirs_s, _ in heard)])
        if time_s == math.inf:
            return None
        failure = _turn(part, time_s, time_s + least_s)


def _turn(part: Simulation, time_s: float, until_s: float) -> Failure | None:
    try:
        if until_s > time_s:
            part.clock.run(until_s)
        else:
            part.clock.wave(time_s)
    except Exception as e:  # noqa: BLE001  (whatever a method raises; the first share raises it again)
        return Failure(part.clock.now_s, e)
    return None


def _said(
    part: Simulation, owners: Sequence[int], others: Sequence[int], failure: Failure | None
) -> tuple[float, dict[int, Said]]:
    """``earliest_s``, and all that is to be said. A wire that goes to several islands of a share is one parcel."""
    away, part.away = part.away, []
    earliest_s = min([part.clock.next_s, *(wire.arrival_s for wire in away)])
    parcels: defaultdict[int, dict[tuple[Key, int], Parcel]] = defaultdict(dict)
    for wire in away:
        parcel = parcels[owners[wire.peer]].setdefault((wire.key, id(wire.wire)), Parcel(wire.key, wire.wire))
        parcel.to.append((wire.arrival_s, wire.peer))
    return earliest_s, {other: Said(earliest_s, failure, list(parcels[other].values())) for other in others}

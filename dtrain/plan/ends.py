"""What does a run cost beside its steps? The start's comparison, and the exact merge at the end, which every recipe has."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.plan.plans import Setting

_PHASES_OF_START = 2
"""Facts are told, then digests of the parameters; islands begin with the same bits, or each with its own: no model is sent."""


@dataclass(frozen=True, slots=True)
class Ends:
    start_s: float
    merge_s: float
    merge_bytes: float
    """Sent by one island."""


def ends(setting: Setting, num_islands: int, shared: int | None = None) -> Ends:
    """Each island sends every other its part of the sum in fp32, then every other the mean of the part that it added up: 2 x 4
    bytes a parameter x (n - 1) / n, of which those to other hosts and those to the same one have a link each. ``shared``:
    parameters that are merged; None: all."""
    link, n, host = setting.link, num_islands, min(setting.per_host, num_islands)
    whole = 8.0 * (setting.parameters if shared is None else shared) / n
    far_s = _sends(whole * (n - host), link.far_bits_per_s) + (link.rtt_s if n > host else 0.0)
    near_s = _sends(whole * (host - 1), link.near_bits_per_s) + (link.near_rtt_s if host > 1 else 0.0)
    trip_s = link.rtt_s if n > host else link.near_rtt_s
    return Ends(_PHASES_OF_START * trip_s / 2, max(far_s, near_s), whole * (n - 1))


def _sends(num_bytes: float, bits_per_s: float | None) -> float:
    return 0.0 if bits_per_s is None else 8 * num_bytes / bits_per_s

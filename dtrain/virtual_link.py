"""When does a wire arrive? A model of slow links, in numbers: an uplink an island, latency, jitter, loss.

A wire of b bytes, posted at time t, leaves behind those that its island posted before (all its peers share the uplink):
    left    = max(t, when the uplink is free) + 8 (b + resent) / rate;   the uplink is free again at ``left``;
    arrives = left + rtt / 2 + jitter + generations rtt,                 jitter exponential, of the mean that was given.
Loss: the wire is k = ceil(b / 1448) packets of b / k bytes (TCP carries 1448 in an Ethernet frame). Each transmission of a
packet is lost with probability p, on its own. Those that were lost are sent again together, an rtt later, and so on until none
is: of L_0 = k packets L_g ~ Binomial(L_{g-1}, p) are lost in the g-th generation, resent = (b / k) sum_{g >= 1} L_g, and
generations is how many of these L_g are not 0. In the mean b + resent is b / (1 - p), and generations sum_{g >= 1} (1 - (1 -
p^g)^k). A wire is not given up, and congestion control is not modelled: the uplink sends at its rate whatever was lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

PACKET_BYTES = 1448


class Way(NamedTuple):
    """The way between two islands, in both directions."""

    bits_per_s: float | None
    """None: as many as one likes."""
    rtt_s: float


@dataclass(frozen=True, slots=True)
class LinkModel:
    """All links of a simulation."""

    way: Way = Way(bits_per_s=None, rtt_s=0.0)  # noqa: RUF009  (it cannot be changed)
    jitter_s: float = 0.0
    loss: float = 0.0
    """The share of packets that do not come."""
    between: Mapping[tuple[int, int], Way] = field(default_factory=dict)
    """(lower island, higher island) -> what holds between them instead of ``way``."""

    @property
    def least_s(self) -> float:
        """No wire is there earlier after it was posted."""
        return min(way.rtt_s for way in (self.way, *self.between.values())) / 2


class VirtualLink:
    """The uplinks of all islands. What is drawn depends on the seed and on the wires that the same island posted before."""

    def __init__(self, model: LinkModel, num_islands: int, seed: int) -> None:
        self.resent_bytes = [0.0] * num_islands
        """By island that sent them; besides what its wires have."""
        self._model = model
        self._free_at_s = [0.0] * num_islands
        self._plain = not model.between and not model.jitter_s and not model.loss
        draws = model.jitter_s or model.loss
        self._draws = [np.random.default_rng((seed, 1, node)) for node in range(num_islands if draws else 0)]

    def arrival_s(self, now_s: float, source: int, to: int, wire_bytes: int) -> float:
        """Post a wire; returns when it will be there."""
        model = self._model
        rate, rtt_s = model.way
        free_at_s = self._free_at_s[source]
        left_s = free_at_s if free_at_s > now_s else now_s
        if self._plain:
            if rate is not None:
                left_s += wire_bytes * 8 / rate
            self._free_at_s[source] = left_s
            return left_s + rtt_s / 2
        if model.between:
            rate, rtt_s = model.between.get((min(source, to), max(source, to)), model.way)
        resent_bytes, generations = self._lose(source, wire_bytes) if model.loss else (0.0, 0)
        self.resent_bytes[source] += resent_bytes
        if rate is not None:
            left_s += (wire_bytes + resent_bytes) * 8 / rate
        self._free_at_s[source] = left_s
        jitter_s = self._draws[source].exponential(model.jitter_s) if model.jitter_s else 0.0
        return left_s + rtt_s / 2 + jitter_s + generations * rtt_s

    def _lose(self, source: int, wire_bytes: int) -> tuple[float, int]:
        packets = lost = max(1, -(-wire_bytes // PACKET_BYTES))
        resent = generations = 0
        while lost := int(self._draws[source].binomial(lost, self._model.loss)):
            resent += lost
            generations += 1
        return resent * wire_bytes / packets, generations

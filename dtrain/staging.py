"""Where do wires lie while they are under way? In buffers that are used again, so that a round allocates nothing."""

from __future__ import annotations

import sys
import threading

import torch
from torch import Tensor

_IDLE_REFERENCES = 3
"""Of a buffer that only the pool knows: its list, the loop's variable, and the argument of getrefcount."""


class Pool:
    """Byte buffers by length. One is free again when nobody else refers to it: its sender, its receiver and whoever reads it
    need not say so, and none of them can say so too early."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = device.type == "cpu" and torch.cuda.is_available()
        self._buffers: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """An uint8 buffer that nobody else uses; what is in it is left over from its last use."""
        with self._lock:
            buffers = self._buffers.setdefault(num_bytes, [])
            for buffer in buffers:
                if sys.getrefcount(buffer) == _IDLE_REFERENCES:
                    return buffer
            buffers.append(torch.empty(num_bytes, dtype=torch.uint8, device=self._device, pin_memory=self._pinned))
            return buffers[-1]

"""Where do wires lie while they are under way? In buffers that are used again, so that a round allocates nothing."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Pool:
    """Byte buffers by length, those that are all but as long together. One is free again when no tensor but the pool's own shares
    its memory: a view, a slice or a transfer under way keeps it, and nobody has to say that they are done. (numpy arrays and raw
    addresses do not count: keep the tensor beside them.)"""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[int, list[Tensor]] = {}
        self._lock = threading.Lock()
        self._idle = _users(torch.empty(1, dtype=torch.uint8))

    def take(self, num_bytes: int) -> Tensor:
        """An uint8 buffer that nobody else uses; what is in it is left over from its last use."""
        with self._lock:
            length = _rounded(num_bytes)
            buffers = self._buffers.setdefault(length, [])
            for buffer in buffers:
                if _users(buffer) == self._idle:
                    return buffer[:num_bytes]
            # Host memory that a GPU copies to and from is pinned; a job on the CPU wakes no GPU for that.
            pinned = self._device.type == "cpu" and torch.cuda.is_initialized()
            buffers.append(torch.empty(length, dtype=torch.uint8, device=self._device, pin_memory=pinned))
            return buffers[-1][:num_bytes]


def _rounded(num_bytes: int) -> int:
    """Up, by a sixteenth at most."""
    step = 1 << max(0, num_bytes.bit_length() - 5)
    return -(-num_bytes // step) * step


def _users(buffer: Tensor) -> int:
    """How many hold the memory of a tensor, this function's own hold among them."""
    return torch._C._storage_Use_Count(buffer.untyped_storage()._cdata)

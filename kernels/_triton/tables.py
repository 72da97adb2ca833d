"""How do kernels get to know pointers that are many? By tables of int64 in the device's memory, kept by their content.

A step's tensors lie where they lay, so from the second step on a table is found, and nothing is allocated, copied or waited for.
A new one goes through its own pinned memory, asynchronously: one buffer that is overwritten each step would be overwritten while
an earlier copy still reads it. The stream is part of the key, because the copy is ordered on one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime import driver


def float_bits(value: float) -> int:
    """The bits of the nearest fp32, signed."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def on_device(words: Sequence[int], device: torch.device) -> Tensor:
    return _table(tuple(words), device, _order(device))


def tile_map(num_tiles: Sequence[int], device: torch.device) -> Tensor:
    """int32: the tensor that each tile belongs to."""
    return _tile_map(tuple(num_tiles), device, _order(device))


@lru_cache(maxsize=1024)
def _table(words: tuple[int, ...], device: torch.device, order: int) -> Tensor:
    return _copied(torch.tensor(words or (0,), dtype=torch.int64), device)


@lru_cache(maxsize=64)
def _tile_map(num_tiles: tuple[int, ...], device: torch.device, order: int) -> Tensor:
    return _copied(torch.arange(len(num_tiles), dtype=torch.int32).repeat_interleave(torch.tensor(num_tiles)), device)


def _copied(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _order(device: torch.device) -> int:
    """The current stream, so that a table is found only where its copy is ordered before its use."""
    if device.type != "cuda":
        return 0
    return driver.active.get_current_stream(device.index)  # pyright: ignore[reportAttributeAccessIssue]

"""What do our kernels do alone? One vector encoded and decoded on a GPU, for a tool that slows whatever runs under it.

``python -m dtrain.codec_alone CODEC NUMEL``, under ncu: what lies between cudaProfilerStart and cudaProfilerStop is measured."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from dtrain.bucket import whole
from dtrain.codec import BoundCodec, State, by_name

_TIMES = 3


def main(codec: str, numel: int) -> None:
    x = torch.randn(numel, device="cuda")
    bound = by_name(codec, error_feedback=True).bind(whole("x", x))
    wire, y = bound.new_wire(x.device), torch.zeros_like(x)
    state = bound.init(x.device)
    _round(bound, x, wire, y, state)  # compiles what is compiled
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for _ in range(_TIMES):
        _round(bound, x, wire, y, state)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def _round(bound: BoundCodec, x: Tensor, wire: Tensor, y: Tensor, state: State) -> None:
    bound.encode(x, wire, state)
    bound.decode_add(wire, y, weight=0.5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

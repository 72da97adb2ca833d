"""On which device does a rank train?"""

from __future__ import annotations

import os

import torch


def own_device() -> torch.device:
    """The GPU of its LOCAL_RANK, as torchrun's scripts, DeepSpeed and accelerate have it, or of those there are, where ranks are
    more; else the CPU. An island that has others beside it sees its own GPUs only (``launch/gpus.py``)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return made_current(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()))


def made_current(device: torch.device) -> torch.device:
    """A GPU becomes what NCCL and torch's checkpoints use without being told, and where Triton launches, wherever its tensors
    lie."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

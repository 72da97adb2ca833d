"""On which device does a rank train?"""

from __future__ import annotations

import os

import torch


def own_device(ranks_key: str = "islands.ranks") -> torch.device:
    """The GPU of its LOCAL_RANK, as torchrun's scripts, DeepSpeed and accelerate have it; the CPU where there is none. An island
    that has others beside it sees its own GPUs only (``launch/gpus.py``). Raises ValueError where its ranks would share one;
    ``ranks_key`` says how many they are."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > count:
        raise ValueError(
            f"an island's {ranks} ranks would share {count} GPU{'s' * (count > 1)}, which NCCL refuses; use "
            f"{ranks_key}={count}, or CUDA_VISIBLE_DEVICES= before the command, which trains on the CPU"
        )
    return made_current(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))


def made_current(device: torch.device) -> torch.device:
    """A GPU becomes what NCCL and torch's checkpoints use without being told, and where Triton launches, wherever its tensors
    lie."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device

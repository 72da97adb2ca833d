"""On which device does a rank train?"""

from __future__ import annotations

import os

import torch

from dtrain.membership import Place


def own_device(place: Place, ranks_before: int) -> torch.device:
    """A GPU of its own for each rank of each island on this machine, as far as there are enough; else the CPU. ``ranks_before``:
    of the islands before this one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", (ranks_before + local_rank) % torch.cuda.device_count())
    torch.cuda.set_device(device)  # what NCCL and torch's checkpoints use without being told
    return device

"""Has this machine the memory for the processes that ``dtrain plan`` measures a step with?"""

from __future__ import annotations

from pathlib import Path

import torch

from dtrain import units
from dtrain.config import Job
from dtrain.plan.accelerators import Work

_BYTES_A_WEIGHT, _BYTES_BESIDE = 4, 12
"""fp32 weights, and of those that are trained gradients and AdamW's moments; activations come on top, so that what is refused
would not have fitted."""


def check_room(job: Job, work: Work) -> None:
    """Raises ValueError where the ranks of all islands, which are started at once, hold more than is there."""
    ranks = job.islands.count * job.islands.ranks
    needed, there = ranks * (work.parameters * _BYTES_A_WEIGHT + work.trained * _BYTES_BESIDE), free_bytes()
    if there is not None and needed > there:
        raise ValueError(
            f"a step cannot be measured here: {ranks} ranks of {work.parameters:,} parameters hold "
            f"{units.show_bytes(needed)} at least, and this machine has {units.show_bytes(there)} free; say what a step takes "
            "with --step-time, or reckon it with --gpu"
        )


def free_bytes() -> int | None:
    """Of all GPUs, where there are any, else of the machine; None where it is not told."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(k)[0] for k in range(torch.cuda.device_count()))
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes) * 1024

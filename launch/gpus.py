"""Which GPUs does an island see, where several run on one machine?

Its own: what takes the GPU of its LOCAL_RANK (a script, DeepSpeed, accelerate) would meet that of every other island there."""

from __future__ import annotations

import os
from collections.abc import Callable

from dtrain.config import Job

GPUS_VARIABLE = "DTRAIN_GPUS"
"""Holds, for an island's torchrun, how many ranks earlier islands have on its machine, and how many it has: ``4:4``."""


def asked(job: Job, island: int) -> dict[str, str]:
    """In the environment of an island's torchrun; one that is alone on its machine sees all that is there."""
    ranks = job.island(island).ranks
    return {GPUS_VARIABLE: f"{job.ranks_before(island)}:{ranks}"} if job.ranks_beside(island) > ranks else {}


def see_own(count: Callable[[], int]) -> None:
    """In a torchrun, before its ranks start: leave only its own GPUs of as many as torch counts to be seen."""
    share = os.environ.pop(GPUS_VARIABLE, "")
    if share and (found := count()):
        before, ranks = map(int, share.split(":"))
        # On ROCm torch and HIP take theirs before CUDA's.
        name = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in os.environ else "CUDA_VISIBLE_DEVICES"
        os.environ[name] = ",".join(own(os.environ.get(name), found, before, ranks))


def own(visible: str | None, count: int, before: int, ranks: int) -> list[str]:
    """A GPU for each rank, in turn, as far as there are enough, after those of earlier islands. ``visible``: the names that
    the variable has, if it is set, of which torch finds the first ``count``."""
    names = visible.split(",")[:count] if visible else [str(k) for k in range(count)]
    return list(dict.fromkeys(names[(before + rank) % count] for rank in range(ranks)))

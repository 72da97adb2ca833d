"""What of a model does each rank of a planned island have?"""

from __future__ import annotations

from dtrain import zero_config
from dtrain.config import Job
from dtrain.plan.memory import WHOLE, Shards


def shards_of(job: Job) -> Shards:
    """Of weights, gradients and the optimizer's state, over how many of an island's ranks each is spread."""
    match job.islands.engine:
        case "fsdp":
            ranks = job.islands.shards or job.islands.ranks
            return Shards(ranks, ranks, ranks)
        case "fsdp+pipeline":
            ranks = job.islands.shards_of_stage
            return Shards(ranks, ranks, ranks)
        case "deepspeed":
            return _zero(job)
        case _:
            return WHOLE


def _zero(job: Job) -> Shards:
    """ZeRO 1 shards the optimizer's state, 2 gradients too, 3 weights too. Only in 3 are fp32 weights that lie on the device
    their own masters."""
    said, ranks = zero_config.of_job(job), job.islands.ranks
    stage, half = zero_config.at(said, (zero_config.ZERO, "stage")), bool(zero_config.at(said, ("bf16", "enabled")))
    weights_away, state_away = (
        zero_config.at(said, (zero_config.ZERO, side, "device")) == "cpu" for side in ("offload_param", "offload_optimizer")
    )
    return Shards(
        weights=ranks if stage == 3 else 1,
        gradients=ranks if stage >= 2 else 1,
        state=ranks,
        number_bytes=2 if half else 4,
        masters=stage < 3 or half or state_away or weights_away,
        weights_on_host=weights_away and stage == 3,
        state_on_host=state_away,
    )

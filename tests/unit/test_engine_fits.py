"""Which engines, and which keys of theirs, do not go together, and is each refused in one line that says what to do?"""

from __future__ import annotations

from typing import Any

import pytest
from torch.distributed.pipelining.schedules import _Action, _add_unshard_reshard

from dtrain.config import parse_job
from dtrain.engine_fits import MOST_SHARED_STAGES

PIPELINE: dict[str, Any] = {"engine": "pipeline", "ranks": 2, "stages_per_rank": 2}
MESH: dict[str, Any] = {"engine": "fsdp+pipeline", "ranks": 4, "shards": 2}


def test_a_mesh_of_stages_and_shards_divides_its_batch_among_the_shards_alone() -> None:
    """Four layers, on two stages, or four where each rank has two of them; two micro-batches for each of two shards."""
    for islands in (PIPELINE, MESH, MESH | {"stages_per_rank": 2, "recompute": True}):
        parse_job({"islands": islands, "model": {"layers": 4}, "train": {"accumulate": 2, "batch": 4}})
    with pytest.raises(ValueError, match=r"by islands\.shards x train\.accumulate = 4; use a multiple of 4"):
        parse_job({"islands": MESH, "model": {"layers": 4}, "train": {"accumulate": 2, "batch": 6}})


@pytest.mark.parametrize(
    ("islands", "more", "said"),
    [
        (
            {"stages_per_rank": 2},
            [],
            'islands.stages_per_rank is of islands.engine = "pipeline" and "fsdp+pipeline", and it is \'ddp\'; leave it out',
        ),
        (
            PIPELINE | {"stages_per_rank": 3},
            [],
            "islands.ranks = 2 x islands.stages_per_rank = 3, 6 stages of a pipeline need a block each, and there are",
        ),
        (
            PIPELINE,
            ["train.accumulate=5", "train.batch=5"],
            "into 2 equal rounds, which islands.stages_per_rank = 2 interleaves; use train.accumulate=4, or another",
        ),
        (
            {"engine": "fsdp+pipeline", "ranks": 4},
            [],
            'islands.engine = "fsdp+pipeline" without islands.shards, the ranks that share a stage; say it, as islands.shards=2',
        ),
        (
            MESH | {"shards": 1},
            [],
            'islands.shards = 1 with islands.engine = "fsdp+pipeline" shares no stage; use islands.shards=2 or more, or',
        ),
        (
            MESH | {"ranks": 2},
            [],
            "islands.ranks = 2 and islands.shards = 2 is one stage, which is no pipeline; use islands.ranks=4 or more, or",
        ),
        (
            MESH | {"stages_per_rank": 4},
            ["model.layers=8"],
            "keeps 3 stages of a rank gathered at most; use islands.stages_per_rank=3 or fewer, or islands.engine=pipeline",
        ),
        (MESH | {"ranks": 5}, [], "islands.shards = 2 does not divide islands.ranks = 5; use a divisor of it, or islands.ranks="),
        (
            MESH | {"ranks": 8, "stages_per_rank": 2},
            [],
            "islands.ranks / islands.shards = 4 x islands.stages_per_rank = 2, 8 stages of a pipeline need a block each",
        ),
        (
            MESH | {"ranks": 8},
            [],
            "train.accumulate = 2 micro-batches leave some of islands.ranks / islands.shards = 4 stages of a pipeline without",
        ),
        (MESH, ["sync.exclude=[\"head.*\"]"], 'sync.exclude with islands.engine = "fsdp+pipeline": a stage may have none'),
        (
            MESH,
            ["model.hf=tiny", "model.layers=3"],
            'model.hf with islands.engine = "fsdp+pipeline", whose stages are cut from gpt only; use islands.engine=ddp',
        ),
        (
            MESH,
            ["train.merge=variance_corrected", "islands.start=own"],
            'train.merge = "variance_corrected" needs each tensor whole on a rank, and islands.engine = "fsdp+pipeline" shards',
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(islands: dict[str, Any], more: list[str], said: str) -> None:
    raw = {"islands": islands, "model": {"layers": 4}, "train": {"accumulate": 2, "batch": 4}}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  (compared below)
        parse_job(raw, more)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("each", "again"), [(MOST_SHARED_STAGES, False), (MOST_SHARED_STAGES + 1, True)])
def test_a_rank_of_as_many_shared_stages_as_are_allowed_gathers_each_once_a_step(each: int, again: bool) -> None:
    """By torch's own plan of interleaved 1F1B, of the first of two ranks: of one more some are gathered again."""
    order = [*range(0, 2 * each, 2)]
    forward = [f"{stage}F{m}" for first in (0, 2) for stage in order for m in (first, first + 1)]
    backward = [f"{stage}B{m}" for first in (0, 2) for stage in reversed(order) for m in (first, first + 1)]
    actions = [_Action.from_str(text) for text in [*forward, *backward]]
    planned = [str(a) for a in _add_unshard_reshard([*actions])]
    gathered = [text for text in planned if text.endswith("UNSHARD")]
    assert (len(gathered) > len(set(gathered))) is again
    islands = MESH | {"stages_per_rank": MOST_SHARED_STAGES}
    parse_job({"islands": islands, "model": {"layers": 6}, "train": {"accumulate": 4, "batch": 8}})

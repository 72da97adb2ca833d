"""Is the gradient of an island on a mesh of stages and shards that of the whole batch, by the whole model?"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tests.dist import meshes
from tests.dist.harness import run_islands, show, values
from tests.unit.by_hand import write_texts

pytestmark = pytest.mark.timeout(300)
SAME = ("islands.shards=2", "model.layers=4", "train.accumulate=2", "train.batch=8")
CHANGES: dict[str, tuple[str, ...]] = {
    "1f1b": SAME,
    "interleaved": (*SAME, "islands.stages_per_rank=2", "islands.recompute=true"),
    "bf16": (*SAME, "islands.stages_per_rank=2", "train.precision=bf16"),
}
ROUNDED = 2e-6
"""Of a tensor's largest number: eight sequences' gradients are added in another order, each with a rounding of 6e-8 of what a sum
is meanwhile, which may be some times the result. In bf16 each micro-batch's gradient has the bits of one process's, and they are
added in fp32: one addition in bf16 would round by 2e-3."""


def test_stages_that_ranks_share_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """AdamW would not see one that is a multiple of it."""
    source = str(write_texts(tmp_path / "texts"))
    scenarios = {
        name: functools.partial(meshes.beside_the_whole, source=source, changes=list(changes))
        for name, changes in CHANGES.items()
    }
    results = run_islands(scenarios, 1, 4, run=tmp_path / "run", timeout_s=250)
    assert [r.status for r in results] == [0] * 4, show(results)
    for name in CHANGES:
        found, *others = values(results, name)
        assert others == [{}] * 3
        assert found["furthest"] < ROUNDED, name
        assert found["loss"] == pytest.approx(found["exact_loss"], rel=ROUNDED)
        assert found["evaluated"] == pytest.approx(found["exact_evaluated"], rel=ROUNDED)

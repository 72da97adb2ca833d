"""Are frozen parameters of a sharded model what they are of a plain one: the same on all islands, and as they were?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrain import checkpoint
from dtrain.build import build_model
from dtrain.data.corpus import load_corpus
from tests.dist import adapted, staged
from tests.dist.harness import run_islands, show, values
from tests.dist.test_engines import SHARED, furthest, launched, zero_file
from tests.unit.by_hand import part_of, write_texts

pytestmark = pytest.mark.timeout(600)
ADAPTED = ('model.factory="tests.dist.adapted:Adapted"', "sync.rank=2")
TIED = "model.arguments={tied=true}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("frozen") / "texts")


@pytest.fixture(scope="module")
def ddp(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of two islands of DDP ranks."""
    runs: dict[tuple[int, tuple[str, ...]], Path] = {}

    def run(ranks: int, *more: str) -> Path:
        if (ranks, more) not in runs:
            runs[ranks, more] = tmp_path_factory.mktemp("ddp")
            launched(source, runs[ranks, more], [("ddp", ranks)] * 2, ["dilocox"], *ADAPTED, *more)
        return runs[ranks, more] / "dilocox"

    return run


def test_unlike_islands_begin_with_the_frozen_parameters_of_island_0_and_keep_them(tmp_path: Path) -> None:
    """Two ranks of island 0 have a part each, and so have those of island 2; island 1 has one."""
    results = run_islands(adapted.apart, 3, [2, 1, 2], run=tmp_path, timeout_s=200)
    assert [r.status for r in results] == [0] * 5, show(results)
    first, second, *others = values(results, "apart")
    for v in (first, second, *others):
        assert v["started"] == v["ended"] == first["before"]
        assert v["trained"] == first["trained"]
        assert v["moved"]
    assert all(v["before"] != first["before"] for v in others)
    # To each of two islands; the bias that is the same stays at home.
    weights, promises, digest = (7 * 5 + 5 * 3 + 3) * 4, 4 * 8, 32
    assert first["sent"] == second["sent"] == 2 * (promises + 3 * digest + weights)


def kept(source: Path, run: Path, *more: str) -> None:
    """Of the frozen parameters every bit, and of the others none."""
    job = staged.engine_job(str(source), "ddp", 1, *ADAPTED, *more)
    begun = build_model(job, load_corpus(str(source)))
    ended = checkpoint.load_weights(run / "model.safetensors")
    assert ended.keys() == begun.state_dict().keys()
    for name, p in begun.named_parameters():
        assert torch.equal(ended[name], p.detach()) == (not p.requires_grad), name
    assert int(ended["seen"]) == 20 * 2, "a rank's sequences"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "changes"), [(2, ()), (4, ("islands.shards=2", "islands.recompute=true"))], ids=["fsdp", "hsdp"]
)
def test_a_sharded_island_trains_beside_frozen_parameters_as_one_of_ddp_ranks(
    source: Path, tmp_path: Path, ddp: Callable[..., Path], ranks: int, changes: tuple[str, ...]
) -> None:
    results = launched(source, tmp_path, [("fsdp", ranks)] * 2, ["dilocox"], *ADAPTED, *changes, resumed=["dilocox"])
    assert furthest(tmp_path / "dilocox", ddp(ranks)) < SHARED
    assert [v["same"] for v in values(results, "dilocox")] == [True] * 2 * ranks
    if ranks == 2:
        kept(source, tmp_path / "dilocox")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), (TIED,)], ids=["apart", "tied"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_ranks_train_beside_frozen_parameters_and_buffers_as_ddp_ranks(
    source: Path, tmp_path: Path, ddp: Callable[..., Path], stage: int, more: tuple[str, ...]
) -> None:
    pytest.importorskip("deepspeed")
    file = zero_file(tmp_path, stage)
    results = launched(source, tmp_path, [("deepspeed", 2)] * 2, ["dilocox"], *ADAPTED, *more, file, resumed=["dilocox"])
    assert furthest(tmp_path / "dilocox", ddp(2, *more)) < SHARED
    assert [v["same"] for v in values(results, "dilocox")] == [True] * 4
    kept(source, tmp_path / "dilocox", *more)
    assert part_of(tmp_path / "dilocox", 0).parameters == part_of(ddp(2, *more), 0).parameters

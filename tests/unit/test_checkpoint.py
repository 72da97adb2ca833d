"""When is a checkpoint a checkpoint? Commits, damage, other models, and going on with another number of islands."""

from __future__ import annotations

import warnings
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from dtrain import checkpoint


def tensors(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(3, 5, generator=g),
        "sync.bucket0.residual": torch.randn(15, generator=g),
        "sync.step": torch.tensor(seed),
        "model.half": torch.randn(7, generator=g).to(torch.bfloat16),
    }


def save(run: Path, step: int, islands: int = 2) -> None:
    for i in range(islands):
        checkpoint.save_island(run, step, i, tensors(10 * step + i), rank=0, num_ranks=1)


def test_all_tensors_come_back_with_their_bits(tmp_path: Path) -> None:
    save(tmp_path, 3)
    for i in range(2):
        loaded, wanted = checkpoint.load_island(tmp_path, 3, i), tensors(30 + i)
        assert loaded.keys() == wanted.keys()
        assert all(loaded[k].dtype == v.dtype and torch.equal(loaded[k], v) for k, v in wanted.items())


def test_a_step_counts_only_when_all_islands_have_written_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, islands=1)
    assert checkpoint.newest_commit(tmp_path) is None
    checkpoint.commit_ready(tmp_path, 2, keep=5)
    assert checkpoint.newest_commit(tmp_path) == 1
    checkpoint.discard_partial(tmp_path)
    assert not checkpoint.step_folder(tmp_path, 2).exists()
    assert checkpoint.newest_commit(tmp_path) == 1


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    checkpoint.commit_ready(tmp_path, 2, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000003", "step_00000010"]


def test_an_interrupted_write_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / ".writing-step_00000002-island0").mkdir()
    checkpoint.commit_ready(tmp_path, 2, keep=2)
    checkpoint.discard_partial(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "manifest", "torn manifest"])
def test_damage_is_one_line_and_never_loaded(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    folder = checkpoint.island_folder(tmp_path, 1, 1)
    data = next(folder.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "remove":
        data.unlink()
    elif damage == "torn manifest":
        (folder / "manifest.json").write_text('{"step": 1, "fil')
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="step_00000001") as said:
        checkpoint.load_island(tmp_path, 1, 1)
    assert "\n" not in str(said.value)
    assert "remove" in str(said.value)
    assert checkpoint.load_island(tmp_path, 1, 0)


def test_another_model_is_refused_by_name_and_shapes(tmp_path: Path) -> None:
    model = nn.Linear(5, 3, bias=False)
    checkpoint.check_same_model({"weight": torch.zeros(3, 5)}, model, tmp_path)
    with pytest.raises(ValueError, match=r"another model: weight has shape \(4, 5\) there and \(3, 5\) in this job"):
        checkpoint.check_same_model({"weight": torch.zeros(4, 5)}, model, tmp_path)
    with pytest.raises(ValueError, match="another model: bias has shape"):
        checkpoint.check_same_model({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, model, tmp_path)


def test_other_islands_start_from_the_mean_and_are_told_what_is_dropped(tmp_path: Path) -> None:
    save(tmp_path, 4, islands=3)
    checkpoint.merge_for_resume(tmp_path, 4, 3)
    said = checkpoint.merged_note(tmp_path / "init.safetensors")
    assert "3 islands at step 4" in said
    assert "dropped: inner optimizer state" in said
    merged = checkpoint.load_weights(tmp_path / "init.safetensors")
    assert checkpoint.weights_step(tmp_path / "init.safetensors") == 4
    for name in ("weight", "half"):
        exact = torch.stack([tensors(40 + i)[f"model.{name}"].to(torch.float64) for i in range(3)]).mean(dim=0)
        # One rounding from float64: half a unit in the last place of the stored type.
        unit = torch.finfo(merged[name].dtype).eps
        assert torch.all((merged[name].to(torch.float64) - exact).abs() <= unit / 2 * exact.abs().clamp_min(1e-30) * 2)


def test_a_merge_reads_the_weights_and_not_the_rest_of_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for Schedule-Free's averages (tests/oracle/test_schedule_free.py), of an island after the other."""
    more = ("optim.state.0.exp_avg", "optim.state.0.step", "optim1.state.2.momentum", "sync.bucket0.x")
    kept = ("clock.time_s", "optim.groups", "shard1.optim.state.0.x", "optim1.state.7.z")
    state = {key: torch.zeros(1, dtype=torch.float64) for key in (*more, *kept, "clock.wall_s", "rng0")}
    for island in range(2):
        checkpoint.save_island(tmp_path, 4, island, tensors(island) | state, rank=0, num_ranks=1)
    read, load = list[set[str]](), checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda into, **where: (read.append(set(into)), load(into, **where))[1])
    checkpoint.merge_for_resume(tmp_path, 4, 2)
    assert read == [{"model.weight", "model.half", *kept}] * 2


def test_merged_weights_know_the_training_time_of_the_slowest_island(tmp_path: Path) -> None:
    for island, time_s in enumerate((12.5, 99.25, None)):
        clock = {} if time_s is None else {"clock.time_s": torch.tensor(time_s, dtype=torch.float64)}
        checkpoint.save_island(tmp_path, 4, island, tensors(island) | clock, rank=0, num_ranks=1)
    merged = tmp_path / "init.safetensors"
    checkpoint.merge_for_resume(tmp_path, 4, 2)
    assert checkpoint.weights_time_s(merged) == 99.25
    checkpoint.save_island(tmp_path, 5, 0, tensors(0), rank=0, num_ranks=1)
    checkpoint.merge_for_resume(tmp_path, 5, 1)
    assert checkpoint.weights_time_s(merged) == 0.0
    checkpoint.save_weights(merged, {}, step=6)
    assert checkpoint.weights_time_s(merged) == 0.0, "weights that were saved otherwise have no clock"


def test_a_commit_knows_its_number_of_islands(tmp_path: Path) -> None:
    save(tmp_path, 4, islands=3)
    checkpoint.commit_ready(tmp_path, 3, keep=1)
    assert checkpoint.commit_islands(tmp_path, 4) == 3
    (checkpoint.step_folder(tmp_path, 4) / "COMMIT").write_text("")
    with pytest.raises(ValueError, match=r"COMMIT is damaged; remove .*step_00000004 to resume"):
        checkpoint.commit_islands(tmp_path, 4)


def test_a_checkpoint_that_cannot_be_written_is_an_error_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, **options: object) -> None:
        raise CheckpointException("write", {0: (OSError(28, "No space left on device"), StackSummary())})

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match=r"island0 could not be written; is the disk full\? \(.*No space left on device\)"):
        save(tmp_path, 1)
    assert not checkpoint.island_folder(tmp_path, 1, 0).exists()


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save_weights(path, {"w": torch.zeros(100)}, step=1)
    path.write_bytes(path.read_bytes()[:-40])
    for read in (checkpoint.load_weights, checkpoint.weights_step):
        with pytest.raises(ValueError, match=r"model.safetensors is damaged .*; remove it") as said:
            read(path)
        assert "\n" not in str(said.value)


def test_torch_does_not_warn_that_an_island_of_one_rank_has_no_group(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(tmp_path, 1)
        checkpoint.load_island(tmp_path, 1, 0)


def test_a_torch_optimizer_comes_back_whole() -> None:
    def built() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        groups = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))

    def step(model: nn.Linear, optimizer: torch.optim.AdamW, seed: int) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    model, optimizer = built()
    step(model, optimizer, 1)
    saved = {k: v.clone() for k, v in checkpoint.optimizer_tensors(optimizer, "optim").items()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, optimizer, 2)
    again, other = built()
    again.load_state_dict(weights)
    checkpoint.load_optimizer_tensors(other, "optim", saved)
    step(again, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

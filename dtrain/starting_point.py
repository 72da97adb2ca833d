"""Where does an island begin? At a checkpoint, at merged weights of another number of islands, or at its first weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.connect import Connection


def starting_point(
    run: Path, connection: Connection, resume_step: int, whole: nn.Module, model: nn.Module
) -> tuple[dict[str, Tensor], int]:
    """A checkpoint's tensors of this rank's model, and its step; or merged weights of another number of islands, which are put
    into the whole model; or nothing and 0."""
    island, prefix, held = connection.node, connection.ranks.prefix, {f"model.{name}" for name in model.state_dict()}

    def wanted(key: str) -> bool:
        others = key not in held if key.startswith("model.") else key.startswith("stage") and not key.startswith(prefix)
        return not (prefix and others)  # who has the whole model looks at all, and at what the model has not

    folder = checkpoint.island_folder(run, resume_step, island)
    merged = run / "init.safetensors"
    if resume_step and folder.exists():
        saved = checkpoint.load_island(run, resume_step, island, wanted)
        checkpoint.check_same_model(model_weights(saved), model, folder)
        return saved, resume_step
    if merged.exists():
        weights = checkpoint.load_weights(merged)
        checkpoint.check_same_model(weights, whole, merged)
        whole.load_state_dict(weights)
        return {}, checkpoint.weights_step(merged)
    if resume_step:
        raise ValueError(f"no checkpoint of island {island} at step {resume_step} in {run / 'checkpoints'}")
    return {}, 0


def model_weights(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("model."): v for k, v in saved.items() if k.startswith("model.")}

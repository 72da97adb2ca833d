"""How good are a finished run's models? Evaluates the merged one and each island's own again, from their files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.config import load_job, runs_a_script
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.train import build_model
from dtrain.uncertainty import Predicted, covariance_diagonal, predict
from dtrain.units import bits_per_byte

ENSEMBLE = "ensemble"


class Loaded(NamedTuple):
    """A run's models, the merged one first, and the text that they have not seen."""

    models: dict[str, nn.Module]
    heldout: tuple[Tensor, Tensor]
    bytes_per_token: float


def evaluate_run(run: Path) -> list[tuple[str, float, float]]:
    """(model, held-out loss in nats a token, bits a byte), the merged model first."""
    models, heldout, bytes_per_token = _load(run)
    losses = {name: evaluate(model, heldout) for name, model in models.items()}
    return [(name, loss, bits_per_byte(loss, bytes_per_token)) for name, loss in losses.items()]


def uncertainty_of_run(run: Path) -> tuple[list[tuple[str, Predicted]], float, float]:
    """(model, its predictions) for the merged model, each island's, and the ensemble of the islands'; the consensus distance, the
    root of the trace of the islands' covariance; and that over the norm of their mean."""
    models, heldout, _ = _load(run)
    merged = models.pop("merged")
    (alone, _) = predict([merged], heldout)
    found = predict(list(models.values()), heldout)
    sums, squares = (_total(models, power) for power in (1, 2))
    diagonal = covariance_diagonal(sums, squares, len(models))
    size = (sums / len(models)).square().sum()
    rows = [("merged", alone), *zip((*models, ENSEMBLE), found, strict=True)]
    return rows, diagonal.sum().sqrt().item(), (diagonal.sum() / size).sqrt().item()


def _total(models: dict[str, nn.Module], power: int) -> Tensor:
    """sum_j theta_j^power, float64."""
    each = [torch.cat([p.detach().double().flatten() for p in model.parameters()]).pow(power) for model in models.values()]
    return torch.stack(each).sum(dim=0)


def _load(run: Path) -> Loaded:
    if not (run / "job.toml").exists():
        raise ValueError(f"{run} is not a run folder: it has no job.toml")
    job = load_job(run / "job.toml")
    if runs_a_script(job):
        raise ValueError(f"{run} is the run of a script, which keeps its model itself; there is nothing to evaluate")
    files = [run / "model.safetensors", *sorted((run / "islands").glob("island*.safetensors"))]
    if not files[0].exists():
        raise ValueError(
            f"{run} has no model.safetensors: it is still running, or was stopped; finish it with --resume"
        )
    corpus = load_corpus(job.data.source)
    models: dict[str, nn.Module] = {}
    for file in files:
        model = build_model(job, corpus)
        weights = checkpoint.load_weights(file)
        checkpoint.check_same_model(weights, model, file)
        model.load_state_dict(weights)
        models["merged" if file.stem == "model" else file.stem] = model
    return Loaded(models, heldout_sequences(corpus, job.model.context), corpus.bytes_per_token)

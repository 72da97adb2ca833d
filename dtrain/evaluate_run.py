"""How good are a finished run's models? Evaluates the merged one and each island's own again, from their files."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.build import build_model
from dtrain.config import load_job, runs_a_script
from dtrain.data.corpus import corpus_of
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.report import bits_per_byte
from dtrain.uncertainty import Predicted, covariance_diagonal, predict

ENSEMBLE = "ensemble"


class Run(NamedTuple):
    """A finished run's model, into which any of its files can be loaded, and the text that it has not seen."""

    model: nn.Module
    files: dict[str, Path]
    """The merged one first, then each island's."""
    heldout: tuple[Tensor, Tensor]
    bytes_per_token: float | None

    def load(self, name: str) -> nn.Module:
        weights = checkpoint.load_weights(self.files[name])
        checkpoint.check_same_model(weights, self.model, self.files[name])
        self.model.load_state_dict(weights)
        return self.model


def evaluate_run(run: Path) -> list[tuple[str, float, float | None]]:
    """(model, held-out loss in nats a token, bits a byte or None where a token's bytes are unknown), the merged model first."""
    found = _open(run)
    losses = {name: evaluate(found.load(name), found.heldout) for name in found.files}
    return [(name, loss, bits_per_byte(loss, found.bytes_per_token)) for name, loss in losses.items()]


def uncertainty_of_run(run: Path) -> tuple[list[tuple[str, Predicted]], float, float]:
    """(model, its predictions) for the merged model, each island's, and the ensemble of the islands'; the consensus distance, the
    root of the trace of the islands' covariance; and that over the norm of their mean. All islands' models are held at once."""
    found = _open(run)
    (alone, _) = predict([found.load("merged")], found.heldout)
    islands = {name: copy.deepcopy(found.load(name)) for name in found.files if name != "merged"}
    each = predict(list(islands.values()), found.heldout)
    squares = total = 0.0
    for parameters in zip(*(model.parameters() for model in islands.values()), strict=True):
        values = torch.stack([p.detach().double().flatten() for p in parameters])
        squares += covariance_diagonal(values.sum(dim=0), values.square().sum(dim=0), len(values)).sum().item()
        total += values.mean(dim=0).square().sum().item()
    rows = [("merged", alone), *zip((*islands, ENSEMBLE), each, strict=True)]
    return rows, math.sqrt(squares), math.sqrt(squares / total)


def _open(run: Path) -> Run:
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
    corpus = corpus_of(job.data)
    named = {"merged" if file.stem == "model" else file.stem: file for file in files}
    return Run(build_model(job, corpus), named, heldout_sequences(corpus, job.model.context), corpus.bytes_per_token)

"""How good are a finished run's models? Evaluates the merged one and each island's own again, from their files."""

from __future__ import annotations

from pathlib import Path

from dtrain import checkpoint
from dtrain.config import load_job, runs_a_script
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.train import build_model
from dtrain.units import bits_per_byte


def evaluate_run(run: Path) -> list[tuple[str, float, float]]:
    """(model, held-out loss in nats a token, bits a byte), the merged model first."""
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
    heldout = heldout_sequences(corpus, job.model.context)
    model = build_model(job, corpus)
    rows = []
    for file in files:
        weights = checkpoint.load_weights(file)
        checkpoint.check_same_model(weights, model, file)
        model.load_state_dict(weights)
        loss = evaluate(model, heldout)
        rows.append(
            ("merged" if file.stem == "model" else file.stem, loss, bits_per_byte(loss, corpus.bytes_per_token))
        )
    return rows

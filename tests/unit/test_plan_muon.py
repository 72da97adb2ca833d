"""Does ``dtrain plan`` reckon with the optimizer that a job, or its recipe, trains with?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dtrain.build import build_model, build_optimizers
from dtrain.config import Job, load_job
from dtrain.data.corpus import load_corpus
from dtrain.launch import plan_job
from dtrain.launch.plan_job import Said, setting_of
from dtrain.methods import InnerOptimizer
from dtrain.plan.candidates import candidates
from dtrain.plan.plans import Planner
from dtrain.recipes import RECIPES, resolve
from tests.unit.small_run import write_job_file


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    return Path("job.toml")


def test_memory_is_what_the_optimizers_hold(job: Path) -> None:
    """Weights, gradients and moments that a step has left behind; AdamW's count of steps, 4 bytes a tensor, apart."""
    said = Said(step_s=0.03, bits_per_s=1e8, rtt_s=0.04)
    ours, (found, _) = load_job(job), setting_of(job, [], load_job(job), said, Console())
    model = build_model(ours, load_corpus(ours.data.source))
    for name, inner in (("muloco", None), ("diloco", None), ("diloco", "schedule_free")):
        asked = ours.model_copy(update={"train": ours.train.model_copy(update={"optimizer": inner})})
        optimizers = build_optimizers(asked, RECIPES[name], model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
        moments = [v for o in optimizers for state in o.state.values() for key, v in state.items() if key != "step"]
        held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *moments]
        planned_bytes = Planner(replace(found, optimizer=inner)).row(resolve(name, {}, 2), 2).memory.model
        assert planned_bytes == sum(tensor.numel() * tensor.element_size() for tensor in held)
    by_muon = Planner(replace(found, optimizer="muon"))
    assert by_muon.row(resolve("diloco", {}, 2), 2).memory.model == Planner(found).row(resolve("muloco", {}, 2), 2).memory.model


def test_a_row_of_another_inner_optimizer_than_the_jobs_is_not_looked_at() -> None:
    def names(asked: str, optimizer: InnerOptimizer | None) -> set[str]:
        return {r.name for r in candidates(resolve(asked, {}, 2), 2, optimizer=optimizer)}

    adamw, muon = {"decent_adam", "accum_adam"}, {"muloco"}
    every = adamw | muon
    assert [names("diloco", said) & every for said in (None, "adamw", "muon", "schedule_free")] == [adamw, adamw, muon, set()]
    assert names("muloco", None) & every == every


def test_rows_that_the_job_would_refuse_are_not_looked_at() -> None:
    """One sends matrices by a rank that none that islands share has; one steps by SGD, which has no moments."""
    shapes = {"blocks.0.weight": (256, 256), "head.weight": (256, 64)}
    both = {"dilocox", "demo"}

    def names(axes: dict[str, object], moments_every: int | None = None) -> set[str]:
        asked = resolve("diloco", axes, 2)
        return {r.name for r in candidates(asked, 2, shapes=shapes, moments_every=moments_every)} & both

    assert names({}) == both
    assert names({}, moments_every=4) == {"dilocox"}
    assert names({"include": ["blocks.*"]}) == {"dilocox"}
    assert names({"include": ["head.*"]}) == set()


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        ((), "adamw"), (("sync.recipe=muloco",), "muon"), (("train.optimizer=muon",), "muon"),
        (("sync.recipe=demo",), None),  # SGD, which no key says
    ],
)
def test_a_step_is_measured_with_the_jobs_optimizer(
    job: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], measured: str | None
) -> None:
    def look(ran: Job, *_: object, **__: object) -> None:
        raise ValueError(f"by {ran.train.optimizer}")

    monkeypatch.setattr(plan_job, "run_local", look)
    with pytest.raises(ValueError, match=f"^by {measured}$"):
        plan_job.measure_steps(job, words, Console())

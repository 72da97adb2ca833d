"""Does ``dtrain sim`` run pairs under Poisson clocks as ``simulate_events`` does, keep what came out, and refuse the rest?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dtrain.events.run import simulate_events
from dtrain.launch.cli import run_command
from tests.unit.small_run import refused, write_job_file

POISSON = ("sim", "job.toml", "sim.clock=poisson", "sim.numel=4", "--islands", "8", "train.steps=40")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()


@pytest.mark.parametrize(
    ("recipe", "problem", "more"),
    [
        ("dadao", "ridge", ()),
        ("a2cid2", "scattered", ("sim.meetings=2.5",)),
        ("dpsgd", "consensus", ("sync.topology=graph", "sync.graph=star")),
    ],
)
def test_what_is_kept_is_what_the_simulation_gives(
    recipe: str, problem: str, more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*POISSON, f"sync.recipe={recipe}", f"sim.problem={problem}", "job.seed=3", *more]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    kept = json.loads(Path("runs/small/virtual.json").read_text(encoding="utf-8"))
    method, topology, graph, each = {
        "dadao": ("dadao", "ring", None, None),
        "a2cid2": ("a2cid2", "one_peer_ring", None, 2.5),
        "dpsgd": ("gossip", "graph", "star", None),
    }[recipe]
    given = {"topology": topology, "graph": graph, "problem": problem, "meetings_per_node": each}
    run = simulate_events(method, 8, numel=4, horizon=40.0, seeds=(3,), **given)
    assert kept["squared_error"] == run.trace.error[:, 0].tolist()
    assert kept["squared_disagreement"] == run.trace.consensus[:, 0].tolist()
    assert kept["times"] == np.linspace(0, 40, 51)[1:].tolist()
    assert (kept["gradients"], kept["meetings"]) == (run.trace.gradients, run.trace.meetings)
    assert f"At time 40 {run.trace.error[-1, 0]:.4g}" in shown
    assert ("Promised" in shown) == (recipe == "dadao")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sync.recipe=choco", "sim.problem=ridge"], 'sim.clock = "poisson" is for pairs that meet: recipes dpsgd, a2cid2'),
        (["sync.recipe=dpsgd", "sync.codec=int8:64", "sim.problem=ridge"], 'sync.codec = "int8:64" has no effect with sim.clock'),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "sim.step_s=1"], "sim.step_s = 1.0 has no effect without sim.clock = "),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "sync.every=5"], "sync.every = 5 has no effect with sim.clock"),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "sync.every=2", "sync.fragments=2"], "sync.every = 2 has no effect"),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "sync.delay=0"], "sync.delay = 0 has no effect with sim.clock"),
        (["sync.recipe=a2cid2", "sim.problem=ridge", "sync.bucket_bytes=64"], "sync.bucket_bytes = 64 has no effect"),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "sync.error_feedback=true"], "would drive the islands apart"),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "sync.schedule=budget:5%"], 'has sync.schedule = "budget:5%"; use'),
        (["sync.recipe=single_merge", "sim.problem=ridge"], 'has sync.schedule = "budget:20%"; use sync.recipe = "dpsgd"'),
        (["sync.recipe=dpsgd", "sim.problem=ridge", "train.lr=0.5"], "train.lr = 0.5 has no effect with sim.clock"),
        (["sync.recipe=dfedsam", "sim.problem=ridge"], '"dfedsam" is defined with SAM; use sync.recipe = "dpsgd"'),
        (["sync.recipe=muloco", "sim.problem=ridge"], '"muloco" is defined with Muon; use sync.recipe = "diloco"'),
        (["sync.recipe=accum_adam", "sim.problem=ridge"], '"accum_adam" is defined with AdamW; use sync.recipe = "dpsgd"'),
        (["sync.recipe=dadao", "sim.problem=consensus"], 'dadao minimises, and problem = "consensus" has nothing'),
        (["sync.recipe=dadao", "sim.problem=ridge", "sim.meetings=0.01"], "meetings_per_node = 0.01 is less than dadao needs"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *POISSON, *arguments)


def test_problems_of_the_other_clock_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert 'sim.problem = "logistic" is for sim.clock = "poisson"' in refused(capsys, "sim", "job.toml", "sim.problem=logistic")
    assert "sim.clock = 'poisson' has no effect without sim.problem" in refused(capsys, "sim", "job.toml", "sim.clock=poisson")
    assert 'sync.recipe = "dadao" is for strongly convex' in refused(capsys, "run", "job.toml", "sync.recipe=dadao")

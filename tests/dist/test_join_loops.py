"""Does ``dtrain.join`` count and land right in the loops that people write around an optimizer?

Two islands, each a real process, over gloo on the loopback."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest

from dtrain.wire import HEADER_BYTES
from tests.dist import least_squares, loops
from tests.dist.harness import Result, run_islands, show, values

CLASSIFIER_NUMEL = 8 * 12 + 12 + 12 * 2 + 2
ROUNDS = loops.STEPS // loops.EVERY

SCENARIOS = {
    "accumulated": functools.partial(loops.accumulated, micro=4, recipe="fedavg"),
    "whole batch": functools.partial(loops.accumulated, micro=1, recipe="fedavg"),
    "schedule before join": functools.partial(loops.scheduled, scheduler_first=True),
    "schedule after join": functools.partial(loops.scheduled, scheduler_first=False),
    "scaler diloco": functools.partial(loops.scaled, recipe="diloco", every=loops.EVERY, delay=2),
    "scaler dpsgd": functools.partial(loops.scaled, recipe="dpsgd", every=1, delay=1),
    "scaler allreduce": loops.scaled_allreduce,
    "scaler first of two": functools.partial(loops.scaled_pair, overflows=0),
    "scaler last of two": functools.partial(loops.scaled_pair, overflows=1),
    "two optimizers": loops.two_optimizers,
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run_islands(SCENARIOS, 2, run=tmp_path_factory.mktemp("loops"), timeout_s=100)


def _round_bytes(numel: int) -> int:
    """All-to-all of two islands in fp32: the peer's half to the peer, then the own half's mean, each with a header."""
    return 4 * numel + 2 * HEADER_BYTES


def test_every_process_ends_well(launch: list[Result]) -> None:
    assert [r.status for r in launch] == [0, 0], show(launch)


def test_accumulation_equals_the_whole_batch(launch: list[Result]) -> None:
    parts, whole = values(launch, "accumulated"), values(launch, "whole batch")
    assert all(v["inside"] for v in parts + whole), "the bound below holds only for parameters within LARGEST"
    apart = _distance(parts, whole)
    assert apart <= least_squares.largest_difference(loops.STEPS, ROUNDS, 2)


def test_the_accumulation_bound_would_see_a_lost_round(launch: list[Result]) -> None:
    """Steps since the last round alone move an island further than the bound, so the bound is no licence."""
    a, b = values(launch, "accumulated")
    assert a["parameters"] == b["parameters"], "step 20 ends with a round, and fedavg's lands on the mean"
    start = [float(x) for p in least_squares.make_model().parameters() for x in p.detach().reshape(-1)]
    per_round = math.dist(a["parameters"], start) / ROUNDS
    assert per_round > 100 * least_squares.largest_difference(loops.STEPS, ROUNDS, 2)


def test_accumulation_counts_optimizer_steps(launch: list[Result]) -> None:
    for v in values(launch, "accumulated"):
        assert (v["step"], v["sent"]) == (loops.STEPS, ROUNDS * _round_bytes(least_squares.NUMEL))


@pytest.mark.parametrize("scenario", ["schedule before join", "schedule after join"])
def test_a_schedule_is_not_disturbed(launch: list[Result], scenario: str) -> None:
    for v in values(launch, scenario):
        assert v["lrs"] == [0.1 * 0.5 ** (step // 7) for step in range(loops.STEPS)]
        assert v["counted"] == list(range(1, loops.STEPS + 1)), "one step a call of opt.step()"
        assert v["sent"] == ROUNDS * _round_bytes(CLASSIFIER_NUMEL)
        assert v["step_after"] == loops.STEPS, "the hooks are off after the block"


@pytest.mark.parametrize("scenario", ["scaler diloco", "scaler dpsgd"])
def test_a_step_that_the_scaler_skips_counts_on_every_island(launch: list[Result], scenario: str) -> None:
    a, b = values(launch, scenario)
    assert (a["step"], b["step"]) == (loops.STEPS, loops.STEPS)
    assert (a["updates"], b["updates"]) == (loops.STEPS, loops.STEPS - len(loops.SKIPPED)), "island 1 overflowed twice"
    assert (a["scale"], b["scale"]) == (1024.0, 256.0)
    rounds = ROUNDS if scenario == "scaler diloco" else loops.STEPS
    round_bytes = _round_bytes(CLASSIFIER_NUMEL) if scenario == "scaler diloco" else 4 * CLASSIFIER_NUMEL + HEADER_BYTES
    assert a["sent"] == b["sent"] == rounds * round_bytes
    assert a["anchors"] == b["anchors"]  # none in dpsgd
    assert a["finite"]
    assert a["merged"] == b["merged"]
    assert a["restored"], "the scaler's own step is back after the block"
    assert b["restored"]


@pytest.mark.parametrize(("scenario", "overflows"), [("scaler first of two", 0), ("scaler last of two", 1)])
def test_one_of_two_optimizers_is_skipped(launch: list[Result], scenario: str, overflows: int) -> None:
    a, b = values(launch, scenario)
    assert (a["step"], b["step"]) == (loops.STEPS, loops.STEPS)
    fewer = [loops.STEPS - len(loops.SKIPPED) * (i == overflows) for i in range(2)]
    assert (a["updates"], b["updates"]) == ([loops.STEPS, loops.STEPS], fewer)
    assert a["anchors"] == b["anchors"]
    assert a["merged"] == b["merged"]


def test_allreduce_with_a_scaler_is_refused(launch: list[Result]) -> None:
    for message in values(launch, "scaler allreduce"):
        assert "GradScaler" in message
        assert "bf16" in message
        assert "\n" not in message


def test_two_optimizers_are_one_step(launch: list[Result]) -> None:
    a, b = values(launch, "two optimizers")
    for v in (a, b):
        assert v["counted"] == list(range(1, loops.STEPS + 1))
        assert v["sent"] == ROUNDS * _round_bytes(CLASSIFIER_NUMEL)
    assert a["anchors"] == b["anchors"]
    assert a["model"] == b["model"], "step 20 ends with a round without delay, so both stand on the anchor"


def _distance(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Over the parameters of all islands."""
    return math.dist(*([x for v in run for x in v["parameters"]] for run in (one, other)))


def test_the_harness_shows_what_a_child_printed(tmp_path: Path) -> None:
    """A child that fails, and one that hangs, are ended and their last words are in the failure."""
    script = (
        "import os, threading\n"
        "print('my words', flush=True)\n"
        "os._exit(3) if os.environ['DTRAIN_ISLAND'] == '0' else threading.Event().wait()\n"
    )
    with pytest.raises(AssertionError, match=r"(?s)still running .*island 1.*exit status 3.*my words.*script\.py"):
        run_islands(script, 2, run=tmp_path, timeout_s=5, lost_s=60)

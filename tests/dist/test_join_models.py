"""Does ``dtrain.join`` treat every part of a model right: tied and frozen weights, buffers, islands that start apart?"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from dtrain.wire import HEADER_BYTES
from tests.dist import models
from tests.dist.harness import Result, run_islands, show, values

ROUNDS = models.STEPS // models.EVERY
TIED_NUMEL = models.VOCAB * models.WIDTH
TRAINED_NUMEL = 12 + 12 + 12 * 2 + 2
BUFFERS_NUMEL = 12 + 12 + 1
DIGEST_BYTES = 32
PROMISE_BYTES = 4 * 8
"""What islands compare before anything else: recipe, model, ranks and seed."""
NOTE_BYTES = 2 * 8
"""An island's distance and step, which go with an average."""

SCENARIOS = {
    "tied": functools.partial(models.tied, codec="identity"),
    "tied int4": functools.partial(models.tied, codec="int4:64"),
    "normed": models.normed,
    "look": functools.partial(models.looked_at, look=True, delay=0),
    "no look": functools.partial(models.looked_at, look=False, delay=0),
    "look at a flight": functools.partial(models.looked_at, look=True, delay=5),
    "no look at a flight": functools.partial(models.looked_at, look=False, delay=5),
    "failed look": models.failed_look,
    "apart": models.apart,
}


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run_islands(SCENARIOS, 2, run=tmp_path_factory.mktemp("models"), timeout_s=100)


def _means(a: list[float], b: list[float]) -> list[float]:
    """The exact average as two islands compute it, in fp32: halving is exact, so the sum is all that is rounded."""
    return (torch.tensor(a) * 0.5 + torch.tensor(b) * 0.5).tolist()


def test_every_process_ends_well(launch: list[Result]) -> None:
    assert [r.status for r in launch] == [0, 0], show(launch)


@pytest.mark.parametrize("scenario", ["tied", "tied int4"])
def test_tied_weights_travel_once_and_stay_tied(launch: list[Result], scenario: str) -> None:
    a, b = values(launch, scenario)
    # One matrix of 2,048 elements in two parts. A part in int4: half a byte an element and a bf16 scale for each 64.
    wire_bytes = 4 * TIED_NUMEL if scenario == "tied" else TIED_NUMEL // 2 + 2 * TIED_NUMEL // 64
    wire_bytes += 2 * HEADER_BYTES
    for v in (a, b):
        assert v["sent"] == v["received"] == ROUNDS * wire_bytes
        assert v["start"] == PROMISE_BYTES + DIGEST_BYTES, "equal weights are compared, not sent"
        assert v["merge"] == 4 * TIED_NUMEL + 2 * HEADER_BYTES + NOTE_BYTES, "the matrix in fp32, and the note"
        assert v["tied"]
        assert v["storage"]
    assert a["model"] == b["model"]


def test_islands_start_from_island_0(launch: list[Result]) -> None:
    a, b = values(launch, "normed")
    assert a["before"] != b["before"]
    assert (a["after"], b["after"]) == (a["before"], a["before"])
    compared = PROMISE_BYTES + 3 * DIGEST_BYTES  # one bucket of parameters, the buffers, what is frozen
    counter_bytes, number_bytes = 8, 4
    values_bytes = number_bytes * (TRAINED_NUMEL + BUFFERS_NUMEL - 1) + counter_bytes
    assert (a["start"], b["start"]) == (compared + values_bytes, compared), "frozen weights that are equal are not sent"


def test_merge_averages_buffers(launch: list[Result]) -> None:
    a, b = values(launch, "normed")
    for name in ("running_mean", "running_var"):
        assert a["own"][name] != b["own"][name], "the islands saw other data"
        assert a["merged"][name] == b["merged"][name] == _means(a["own"][name], b["own"][name])
    assert a["merged"]["num_batches_tracked"] == b["merged"]["num_batches_tracked"] == models.STEPS
    assert a["model"] == b["model"]


def test_what_is_frozen_and_what_is_no_number_is_made_equal_at_the_start_to_the_byte(launch: list[Result]) -> None:
    a, b = values(launch, "apart")
    assert a["before"] != b["before"]
    assert a["after"] == b["after"] == a["before"]
    for v in (a, b):
        assert v["mask"] == "-inf"
        assert v["counter"] == 2**24 + 1, "an integer that fp32 does not hold"
        assert v["flag"] is True
        assert v["merged"], "a mask of -inf does not stop the average"


def test_frozen_parameters_are_left_alone(launch: list[Result]) -> None:
    for v in values(launch, "normed"):
        assert v["frozen"]
        assert v["frozen_storage"], "not even moved"


@pytest.mark.parametrize("scenario", ["look", "look at a flight"])
def test_merged_shows_the_exact_average_and_gives_the_model_back(launch: list[Result], scenario: str) -> None:
    a, b = values(launch, scenario)
    assert a["own"] != b["own"]
    assert a["inside"] == b["inside"] == _means(a["own"], b["own"])
    for v in (a, b):
        assert v["same"], "the block gets the model itself"
        assert v["restored"]
        assert v["untouched"], "after consensus_distance()"


@pytest.mark.parametrize("scenario", ["look", "look at a flight"])
def test_consensus_distance(launch: list[Result], scenario: str) -> None:
    a, b = values(launch, scenario)
    assert a["distance"] == b["distance"]
    expected = _consensus_distance(a["own"][:TRAINED_NUMEL], b["own"][:TRAINED_NUMEL])
    # Each mean is rounded to fp32, by at most 2^-24 of the largest value, and so is each island's sum, and their mean.
    absolute = 2**-24 * max(map(abs, a["own"] + b["own"])) * TRAINED_NUMEL**0.5
    assert a["distance"] == pytest.approx(expected, rel=2 * 2**-24, abs=absolute)


@pytest.mark.parametrize("scenario", ["look", "look at a flight"])
def test_looking_does_not_alter_the_run(launch: list[Result], scenario: str) -> None:
    looked, not_looked = values(launch, scenario), values(launch, f"no {scenario}")
    assert [v["model"] for v in looked] == [v["model"] for v in not_looked]


def test_a_failed_evaluation_gives_the_model_back(launch: list[Result]) -> None:
    for v in values(launch, "failed look"):
        assert v == {"moved": True, "restored": True}


def _consensus_distance(a: list[Any], b: list[Any]) -> float:
    """sqrt(mean_i |x_i - mean x|^2) of two islands is half their distance."""
    return math.dist(a, b) / 2

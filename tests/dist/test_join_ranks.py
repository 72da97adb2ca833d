"""Is an island of two ranks the same island as one of one rank: in bytes, in bits among its ranks, and in what it computes?"""

from __future__ import annotations

import functools
import math

import pytest

from dtrain.wire import HEADER_BYTES
from tests.dist import least_squares, ranked
from tests.dist.harness import Result, run_islands, show, values

ROUNDS = ranked.STEPS // ranked.EVERY

_plain = functools.partial(ranked.ddp_loop, recipe="fedavg", codec="identity", delay=0)
SCENARIOS = {
    "wrapped before": functools.partial(_plain, wrap="before"),
    "wrapped after": functools.partial(_plain, wrap="after"),
    "sharpness-aware": functools.partial(_plain, wrap="after", rho=0.1),
    "muon": functools.partial(ranked.ddp_loop, wrap="after", recipe="muloco", codec="identity", delay=0),
    "own bias": functools.partial(_plain, wrap="after", exclude=["a.bias"]),
    "corrected": functools.partial(_plain, wrap="after", corrects=True),
    # Its rounds move the parameters when they start; the look two steps before the end falls into one.
    "eager": functools.partial(
        ranked.ddp_loop, wrap="after", recipe="diloco", codec="identity", delay=ranked.EVERY, landing="eager", outer_lr=0.3,
        outer_momentum=0.5,
    ),
    "default recipe": functools.partial(ranked.ddp_loop, wrap="after", recipe="delayed_diloco", codec="int4:64", delay=2),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run_islands(SCENARIOS, 2, 2, run=tmp_path_factory.mktemp("ranks2"), timeout_s=100)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    return run_islands(SCENARIOS, 2, run=tmp_path_factory.mktemp("ranks1"), timeout_s=100)


def test_every_process_ends_well(one_rank: list[Result], two_ranks: list[Result]) -> None:
    assert [r.status for r in one_rank] == [0, 0], show(one_rank)
    assert [r.status for r in two_ranks] == [0, 0, 0, 0], show(two_ranks)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_both_ranks_carry_buckets_and_the_island_sends_the_same_bytes(
    one_rank: list[Result], two_ranks: list[Result], scenario: str
) -> None:
    ones, twos = values(one_rank, scenario), values(two_ranks, scenario)
    assert [v["buckets"] for v in twos] == [[0, 1]] * 4
    # Two int4 codes share a byte and a part's last block is a block: what a round sends follows from the cut, so from the model.
    assert [v["sent"] for v in twos] == [ones[0]["sent"]] * 2 + [ones[1]["sent"]] * 2
    assert [v["received"] for v in twos] == [ones[0]["received"]] * 2 + [ones[1]["received"]] * 2
    if scenario != "default recipe":
        numel = least_squares.NUMEL - (scenario == "own bias")
        assert ones[0]["sent"] == ROUNDS * (4 * numel + 2 * 2 * HEADER_BYTES), "two buckets, all-to-all of two islands in fp32"
    assert ones[0]["sent"] > 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_all_processes_end_with_the_same_bits(two_ranks: list[Result], scenario: str) -> None:
    vs = values(two_ranks, scenario)
    islands = {vs[0]["model"], vs[2]["model"]}
    assert {v["model"] for v in vs} == islands, "after the merge"
    assert len(islands) == (2 if scenario == "own bias" else 1)
    assert (vs[0]["model"], vs[2]["model"]) == (vs[1]["model"], vs[3]["model"])
    assert vs[0]["own"] == vs[1]["own"], "the ranks of island 0 before it"
    assert vs[2]["own"] == vs[3]["own"]
    assert vs[0]["before"] == vs[1]["before"], "and four steps after a round has made them equal"


def test_wrapping_before_or_after_the_join_is_the_same(two_ranks: list[Result]) -> None:
    before, after = values(two_ranks, "wrapped before"), values(two_ranks, "wrapped after")
    assert [v["own"] for v in before] == [v["own"] for v in after]


def test_a_split_batch_computes_the_same_model(one_rank: list[Result], two_ranks: list[Result]) -> None:
    ones, twos = values(one_rank, "wrapped after"), values(two_ranks, "wrapped after")[::2]
    assert all(v["inside"] for v in ones + twos), "the bound below holds only for parameters within LARGEST"
    apart = math.dist(*([x for v in vs for x in v["own"]] for vs in (ones, twos)))
    assert apart <= least_squares.largest_difference(ranked.STEPS, ROUNDS, 2)

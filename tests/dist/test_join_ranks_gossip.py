"""Is an island of two ranks the same island as one of one rank under each gossip method too, as ``test_join_ranks.py`` asks?"""

from __future__ import annotations

import functools
import math

import pytest

from tests.dist import least_squares, ranked
from tests.dist.harness import Result, run_islands, show, values

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

METHODS = {
    **dict.fromkeys(("dpsgd", "deepsqueeze", "push_sum", "choco", "gradient_tracking", "beer"), 1),
    **dict.fromkeys(("multi_gossip", "chebyshev"), ranked.EVERY),
}
"""And how often they have a round."""
SCENARIOS = {
    recipe: functools.partial(ranked.ddp_loop, wrap="after", recipe=recipe, codec="identity", delay=1, every=every)
    for recipe, every in METHODS.items()
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """By the number of ranks an island."""
    return {
        n: run_islands(SCENARIOS, 2, n, run=tmp_path_factory.mktemp(f"ranks{n}"), timeout_s=220) for n in (1, 2)
    }


@pytest.mark.parametrize("recipe", METHODS)
def test_the_ranks_are_one_island(ranks: dict[int, list[Result]], recipe: str) -> None:
    assert [r.status for r in ranks[1] + ranks[2]] == [0] * 6, show(ranks[1] + ranks[2])
    ones, twos = values(ranks[1], recipe), values(ranks[2], recipe)
    assert [v["buckets"] for v in twos] == [[0, 1]] * 4, "each rank carries some"
    for count in ("sent", "received"):
        assert [v[count] for v in twos] == [ones[0][count]] * 2 + [ones[1][count]] * 2
    assert ones[0]["sent"] > 0
    assert twos[0]["own"] == twos[1]["own"], "the ranks of island 0 before the merge"
    assert twos[2]["own"] == twos[3]["own"]
    assert twos[0]["own"] != twos[2]["own"]
    assert len({v["model"] for v in twos}) == 1, "after it"
    assert all(v["inside"] for v in ones + twos), "the bound below holds only for parameters within LARGEST"
    apart = math.dist(*([x for v in vs for x in v["own"]] for vs in (ones, twos[::2])))
    # What sums over all steps keeps what each of them rounded (test_algorithms, test_gradient_tracking).
    kept = ranked.STEPS if recipe in ("choco", "gradient_tracking", "beer") else 1
    assert apart <= kept * least_squares.largest_difference(ranked.STEPS, ranked.STEPS, 2)

"""Do rounds with a server leave the disagreement, and move the mean, as their paper says? By all samples that there are.

The trajectories of methods that use them are in the contract suite (tests/contract)."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from dtrain.methods import RULES
from dtrain.recipes import RECIPES, resolve
from dtrain.topology import Mixing, Round, check, mixing, parse_server
from dtrain.topology.consensus import Matrix, consensus, matrix
from dtrain.topology.server import Server, row
from tests.oracle.test_topology import w_of

U = 2.0**-53
SIZES = [(n, k) for n in (2, 3, 5, 6) for k in range(1, n + 1)]


def matrices(server: Server, n: int) -> list[Matrix]:
    """Of every sample, by the rows that each island reckons for itself; who is heard sends, and nobody else."""
    out = []
    for sampled in combinations(range(n), server.sample):
        rows = [row(server, sampled, node, n) for node in range(n)]
        sent = {(a, b) for a, one in enumerate(rows) for b in one.sends}
        assert sent == {(b, a) for a, one in enumerate(rows) for b, _ in one.recvs}
        out.append(matrix(Mixing(lambda index, node, num_nodes, rows=rows: rows[node], lambda _: 1), 0, n))
    return out


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_closed_forms_over_all_samples(n: int, k: int) -> None:
    x = np.random.default_rng(n).normal(size=n)
    spread = float(np.square(x - x.mean()).sum())
    if k >= 2:
        s2s = [w @ x for w in matrices(Server("sampled", k, 1), n)]
        left = np.mean([np.square(y - y.mean()).sum() for y in s2s])
        assert left == pytest.approx(spread * (n - k) / (n - 1), rel=1e-12, abs=1e-14)
        assert max(abs(y.mean() - x.mean()) for y in s2s) <= 8 * n * U, "doubly stochastic: the mean of all stays"
    s2a = [w @ x for w in matrices(Server("all", k, 1), n)]
    assert max(np.ptp(y) for y in s2a) <= 8 * n * U, "no disagreement is left"
    bias = np.mean([np.square(y.mean() - x.mean()) for y in s2a])
    assert bias == pytest.approx(spread / n * (n - k) / (k * (n - 1)), rel=1e-12, abs=1e-14)
    assert np.mean([y.mean() for y in s2a]) == pytest.approx(x.mean(), rel=0, abs=1e-14), "no bias on average"


def test_h_rounds_of_the_neighbours_and_then_one_with_the_server() -> None:
    """The neighbours' rounds go on where they were, as if there were no server."""
    n, h = 6, 3
    drawn = []
    for index in range(60):
        w = w_of("one_peer_ring", None, index, n, f"sampled:2:{h}")
        turn, place = divmod(index, h + 1)
        if place < h:
            np.testing.assert_array_equal(w, w_of("one_peer_ring", None, turn * h + place, n))
        else:
            (pair,) = [(i, j) for i, j in combinations(range(n), 2) if w[i, j]]
            assert (w[np.ix_(pair, pair)] == 0.5).all()
            assert np.count_nonzero(w) == n + 2, "the others keep what they have"
            drawn.append(pair)
    assert len(set(drawn)) > 5
    other_seed = [matrix(mixing("ring", None, 1, "all:2:3"), index, n) for index in (3, 7, 11)]
    assert any((w_of("ring", None, index, n, "all:2:3") != w).any() for index, w in zip((3, 7, 11), other_seed, strict=True))


def test_every_island_is_drawn_as_often() -> None:
    """Of 2000 draws of 2 in 5 each island is in 800, within 5 standard deviations of sqrt(2000 * 0.4 * 0.6) = 22."""
    mixed = mixing("ring", None, 4, "sampled:2:1")
    often = np.zeros(5)
    for index in range(1, 4000, 2):
        often += [bool(mixed.rows(index, node, 5).sends) for node in range(5)]
    assert np.abs(often - 800).max() <= 110


@pytest.mark.parametrize(
    ("graph", "n", "parts"),
    [("rings:2", 7, [3, 4]), ("rings:3", 6, [2, 2, 2]), ("rings:1", 5, [5]), ("rings:2", 2, [1, 1])],
)
def test_rings_that_fall_apart_come_together_by_a_server_only(graph: str, n: int, parts: list[int]) -> None:
    w = w_of("graph", graph, 0, n)
    blocks = [slice(sum(parts[:k]), sum(parts[: k + 1])) for k in range(len(parts))]
    for block in blocks:
        size = block.stop - block.start
        ring = w_of("ring", None, 0, size) if size > 1 else np.ones((1, 1))
        np.testing.assert_allclose(w[block, block], ring, rtol=0, atol=2 * U)
    assert np.count_nonzero(w) == sum(np.count_nonzero(w[b, b]) for b in blocks), "no weight goes from one ring to another"
    if len(parts) > 1:
        assert consensus(mixing("graph", graph, 0), n).rounds is None
        with pytest.raises(ValueError, match=r"falls into . parts, .* or rounds with a server"):
            check("graph", graph, n)
    check("graph", graph, n, server="all:1:2")
    for to in ("sampled:2:2", "all:1:2"):
        rounds = consensus(mixing("graph", graph, 0, to), n).rounds
        assert rounds is not None
        assert rounds > 2 or len(parts) == 1


def test_an_island_has_room_for_all_it_may_hear() -> None:
    for server, star in (("sampled:4:2", 3), ("all:4:2", 4), ("all:6:2", 5)):
        mixed = mixing("star", None, 0, server)
        assert mixed.in_degree(1, 6) == star
        assert mixed.in_degree(0, 6) == 5, "the middle of the star"
        assert max(len(mixed.rows(i, 1, 6).recvs) for i in range(60)) == star


def test_all_take_a_mean_that_is_their_own_where_they_were_not_drawn() -> None:
    server = parse_server("all:2:9")
    assert row(server, (1, 3), 0, 4) == Round(0.0, (), ((1, 0.5), (3, 0.5)))
    assert row(server, (1, 3), 3, 4) == Round(0.5, (0, 1, 2), ((1, 0.5),))


@pytest.mark.parametrize(("n", "k", "h"), [(6, 2, 50), (6, 3, 4), (7, 2, 9)])
def test_wires_of_a_rare_server_are_counted(n: int, k: int, h: int) -> None:
    """Two rings of 3 or more: each island sends 2 wires a round, and in the server's, one in h + 1, k of n send n - 1."""
    found = consensus(mixing("graph", "rings:2", 0, f"all:{k}:{h}"), n)
    assert found.mean_sends == pytest.approx((2 * h + k * (n - 1) / n) / (h + 1), rel=1e-12)
    assert (found.most_sends, found.articulation) == (n - 1, ())
    found = consensus(mixing("graph", "rings:2", 0, f"sampled:2:{h}"), n)
    assert (found.most_sends, found.articulation) == (2, ()), "who is drawn is another each time"


@pytest.mark.parametrize("name", [name for name, row in RECIPES.items() if "server" in RULES[row.algorithm].axes])
@pytest.mark.parametrize("server", [None, "sampled:2:2", "all:2:2"])
def test_what_dtrain_check_asks_of_a_recipe_is_what_its_matrices_keep(name: str, server: str | None) -> None:
    """The mean of all islands where every column sums to one, of the first server's round and those before it."""
    row = RECIPES[name]
    if row.reduce != "neighbours" or (row.algorithm == "gradient_tracking" and server == "all:2:2"):
        return
    recipe = resolve(name, {"server": server}, 4)
    mixed = mixing(recipe.topology, recipe.graph, 0, recipe.server)
    columns = np.array([matrix(mixed, index, 4).sum(axis=0) for index in range(mixed.turn)])
    keeps = bool(np.abs(columns - 1).max() <= 8 * U)
    assert keeps == mixed.doubly_stochastic
    assert recipe.combine == ("gossip" if keeps else "sampled")


def test_a_row_that_says_another_than_its_matrices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dtrain.recipes import Recipe\n"
        "row = Recipe('mine', 's', 'p', 'own', 'parameters', 1, 'neighbours', 'directed', 'cycle', combine='gossip', "
        "method=print)\n"
    )
    with pytest.raises(ValueError, match=r'say combine = "push" there, or use another topology$'):
        resolve(f"{tmp_path}/mine.py:row", {}, 4)
    changed = {"topology": "graph", "graph": "ring", "server": "all:1:2"}
    assert resolve(f"{tmp_path}/mine.py:row", changed, 4).combine == "sampled"


@pytest.mark.parametrize("text", ["", "some:2:5", "all:2", "all:0:5", "all:2:0", "sampled:1:5", "all:2:5:1", "all:x:5"])
def test_what_is_no_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not known; use \"sampled:K:H\" \(K of 2 or more\)"):
        parse_server(text)


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("dpsgd", {"server": "all:5:2"}, 'sync.server = "all:5:2" draws 5 of 4 islands; draw fewer'),
        ("dpsgd", {"server": 5}, "server = 5 is not allowed; use text"),
        ("dpsgd", {"server": "all:2:2", "reduce": "gather", "topology": "complete"}, "stands between rounds of neighbours"),
        ("gradient_tracking", {"server": "all:2:2"}, 'gradient_tracking needs a matrix whose columns sum to one'),
        ("choco", {"server": "sampled:2:2"}, 'has no effect with sync.algorithm = "choco"'),
        ("push_sum", {"server": "sampled:2:2"}, 'has no effect with sync.algorithm = "push_sum"'),
        ("dpsgd", {"topology": "graph", "graph": "rings:2"}, "falls into 2 parts"),
        ("dpsgd", {"topology": "graph", "graph": "rings:9", "server": "all:2:2"}, "rings:9 needs 9 islands or more, got 4"),
    ],
)
def test_what_does_not_fit_is_one_line(recipe: str, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        resolve(recipe, changes, 4)
    assert "\n" not in str(caught.value)

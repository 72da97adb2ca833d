"""Is each topology the matrix that its paper says? Closed forms of lambda2, exact means after so many rounds, valid weights."""

from __future__ import annotations

from itertools import pairwise
from math import cos, pi
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from dtrain.algorithms.multi_gossip import chebyshev_steps
from dtrain.launch.topology_rows import rows as table_rows
from dtrain.topology import NAMES, Mixing, check, fingerprint, mixing
from dtrain.topology.coloured import edge_colours
from dtrain.topology.consensus import TARGET, Matrix, consensus, matrix
from dtrain.topology.static import sides

FAMILIES = ("ring", "path", "torus", "star", "complete", "random_regular:3", "barabasi_albert:3")
SYMMETRIC = (
    *(("complete", None, n) for n in (1, 2, 5)),
    *(("ring", None, n) for n in (2, 3, 4, 7, 16)),
    *(("torus", None, n) for n in (4, 6, 7, 9, 12, 24)),
    *(("hypercube", None, n) for n in (2, 8, 16)),
    *(("star", None, n) for n in (2, 5, 9)),
    *(("one_peer_ring", None, n) for n in (2, 3, 4, 5, 8, 9)),
    *(("random_pairs", None, n) for n in (2, 5, 8)),
    *(("alternating_exp_ring", None, n) for n in (2, 4, 8)),
    *(("alternating_exp_ring:2", None, n) for n in (2, 4, 8, 16)),
    *(("alternating_exp_ring:3", None, n) for n in (6, 12, 24)),
    *((name, graph, 10) for name in ("graph", "coloured", "random_edges") for graph in FAMILIES),
    *(("coloured", "complete", n) for n in (2, 3, 7)),
)
ASYMMETRIC = (
    *(("one_peer_exponential", None, n) for n in (2, 3, 5, 8, 12, 16)),
    *(("directed", graph, 7) for graph in ("cycle", "random_out:1", "random_out:3")),
)
U = 2.0**-53


def matrices(mixed: Mixing, n: int, rounds: int | None = None) -> list[Matrix]:
    return [matrix(mixed, index, n) for index in range(rounds or mixed.period(n))]


def product(mixed: Mixing, n: int, rounds: int) -> Matrix:
    out = np.eye(n)
    for index in range(rounds):
        out = matrix(mixed, index, n) @ out
    return out


def w_of(name: str, graph: str | None, index: int, n: int, server: str | None = None) -> Matrix:
    """W of a round, seed 0, which the tests below (and test_server) hold to closed forms."""
    return matrix(mixing(name, graph, 0, server), index, n)


def chebyshev_matrix(w: Matrix, steps: int) -> Matrix:
    """T_Q((W - c) / h) / T_Q((1 - c) / h) on the eigenvalues, all of which but the mean's 1 lie in [c - h, c + h]."""
    values, vectors = np.linalg.eigh(w)
    c, h = (values[-2] + values[0]) / 2, (values[-2] - values[0]) / 2

    def polynomial(x: Matrix) -> Matrix:
        return np.asarray(np.polynomial.chebyshev.chebval(x, [*np.zeros(steps), 1.0]), np.float64)

    scaled: Matrix = polynomial((values - c) / h) / polynomial(np.array((1 - c) / h))
    return vectors @ np.diag(scaled) @ vectors.T


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_chebyshev_on_a_ring_of_16_leaves_what_its_polynomial_says(steps: int) -> None:
    """||P(W) - J|| = 1 / T_Q((1 - c) / h), below plain gossip's lambda2^Q, by the steps that the method takes. W of the ring has
    eigenvalues (1 + 2 cos(2 pi k / 16)) / 3."""
    w = w_of("ring", None, 0, 16)
    largest, least = (1 + 2 * cos(2 * pi / 16)) / 3, -1 / 3
    taken = chebyshev_steps(least, largest, steps)
    before, y = np.eye(16), np.eye(16)
    for weight in taken.weights:
        before, y = y, weight * (y + taken.scale * (w @ y - y)) + (1 - weight) * before
    left = np.linalg.norm(y - 1 / 16, 2)
    c, h = (largest + least) / 2, (largest - least) / 2
    assert left == pytest.approx(1 / np.polynomial.chebyshev.chebval((1 - c) / h, [*np.zeros(steps), 1.0]), rel=1e-9)
    assert left < largest**steps
    np.testing.assert_allclose(y, chebyshev_matrix(w, steps), rtol=0, atol=1e-12)
    np.testing.assert_allclose(y.sum(axis=0), 1.0, rtol=0, atol=1e-12)


def test_one_step_is_enough_where_all_disagreement_has_one_eigenvalue() -> None:
    taken = chebyshev_steps(0.25, 0.25, 3)
    w = 0.25 * np.eye(4) + 0.75 / 4
    y = np.eye(4) + taken.scale * (w - np.eye(4))
    np.testing.assert_allclose(y, 1 / 4, rtol=0, atol=1e-15)
    assert taken.weights == [1.0] * 3


@pytest.mark.parametrize(("degree", "n"), [(2, 9), (3, 16), (56, 64), (6, 9), (63, 64)])
def test_regular_graphs_of_any_degree_are_drawn(degree: int, n: int) -> None:
    check("graph", f"random_regular:{degree}", n)
    drawn = [mixing("graph", f"random_regular:{degree}", seed) for seed in (0, 1)]
    assert {len(m.rows(0, node, n).sends) for m in drawn for node in range(n)} == {degree}
    assert degree > n - 3 or (matrix(drawn[0], 0, n) != matrix(drawn[1], 0, n)).any(), "another seed is another graph"


def test_a_graph_has_one_number_on_every_host(tmp_path: Path) -> None:
    """Whatever its file's name and the order of its lines; another edge, or direction, is another number."""
    texts = {"a": "0 1\n1 2\n", "b": "# the same\n2 1\n0 1\n", "c": "0 1\n0 2\n"}
    for name, text in texts.items():
        (tmp_path / f"{name}.edges").write_text(text)
    a, b, c = (fingerprint("graph", str(tmp_path / f"{name}.edges"), 3, 0) for name in texts)
    assert a == b != c
    assert fingerprint("coloured", str(tmp_path / "a.edges"), 3, 0) == a
    assert fingerprint("directed", str(tmp_path / "a.edges"), 3, 0) != fingerprint("directed", str(tmp_path / "b.edges"), 3, 0)
    assert fingerprint("ring", None, 3, 0) == 0


def test_every_name_is_looked_at() -> None:
    assert {name.partition(":")[0] for name, _, _ in (*SYMMETRIC, *ASYMMETRIC)} == set(NAMES)


@pytest.mark.parametrize(("name", "graph", "n"), [*SYMMETRIC, *ASYMMETRIC])
def test_rows_agree_with_each_other(name: str, graph: str | None, n: int) -> None:
    """Who sends is heard; the columns sum to one, so that mixing keeps the mean, and the rows too but of directed graphs."""
    check(name, graph, n)
    mixed = mixing(name, graph, seed=3)
    for index in range(2 * mixed.period(n) + 2):
        rows = [mixed.rows(index, node, n) for node in range(n)]
        sent = {(node, peer) for node, row in enumerate(rows) for peer in row.sends}
        heard = {(peer, node) for node, row in enumerate(rows) for peer, _ in row.recvs}
        assert sent == heard
        assert all(a != b for a, b in sent)
        w = matrix(mixed, index, n)
        assert (w >= 0).all()
        np.testing.assert_allclose(w.sum(axis=0), 1.0, rtol=0, atol=2 * n * U)
        if mixed.doubly_stochastic:
            np.testing.assert_allclose(w.sum(axis=1), 1.0, rtol=0, atol=2 * n * U)
        if (name, graph, n) in SYMMETRIC:
            assert (w == w.T).all()
        again = matrix(mixed, index + mixed.period(n), n)
        assert mixed.drawn or (again == w).all(), "its period is what it says"
        assert all(len(row.recvs) <= mixed.in_degree(node, n) for node, row in enumerate(rows))


@pytest.mark.parametrize(
    ("name", "n", "lambda2"),
    [
        ("complete", 6, 0.0),
        *(("ring", n, (1 + 2 * cos(2 * pi / n)) / 3) for n in (4, 5, 16, 33)),
        *(("torus", n, (3 + 2 * cos(2 * pi / max(sides(n)))) / 5) for n in (9, 12, 16, 35)),
        *(("hypercube", 2**k, (k - 1) / (k + 1)) for k in (2, 3, 5)),
        *(("star", n, 1 - 1 / n) for n in (3, 8, 20)),
    ],
)
def test_lambda2_is_the_closed_form(name: str, n: int, lambda2: float) -> None:
    found = consensus(mixing(name, None, 0), n)
    assert found.lambda2 == pytest.approx(lambda2, rel=0, abs=1e-9)
    if lambda2:
        assert found.rounds == int(np.ceil(np.log(TARGET) / np.log(lambda2)))


def test_the_most_square_torus() -> None:
    assert [sides(n) for n in (4, 12, 16, 7, 36)] == [(2, 2), (3, 4), (4, 4), (1, 7), (6, 6)]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_doubling_walk_reaches_the_exact_mean(k: int) -> None:
    n = 2**k
    mean = np.full((n, n), 1 / n)
    assert (product(mixing("one_peer_exponential", None, 0), n, k) == mean).all()
    assert consensus(mixing("one_peer_exponential", None, 0), n).rounds == k
    for ranks in (1, 2, 4):
        mixed = mixing(f"alternating_exp_ring:{ranks}", None, 0)
        np.testing.assert_allclose(product(mixed, n * ranks, 2 * k), 1 / (n * ranks), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("hosts", "ranks"), [(4, 2), (8, 4), (16, 1)])
def test_half_of_the_hosts_use_the_slow_network_at_a_time(hosts: int, ranks: int) -> None:
    mixed, n = mixing(f"alternating_exp_ring:{ranks}", None, 0), hosts * ranks
    for index in range(mixed.period(n)):
        w = matrix(mixed, index, n).reshape(hosts, ranks, hosts, ranks).sum(axis=(1, 3)) > 0
        assert (w.sum(axis=1) == 2).sum() == hosts / 2


@pytest.mark.parametrize("n", [3, 5, 6, 9])
def test_two_rounds_of_the_ring_of_pairs_are_its_edges(n: int) -> None:
    """Each round is a matching that is as large as can be; two rounds in a row share no edge; a period uses every edge."""
    mixed = mixing("one_peer_ring", None, 0)
    rounds = [{tuple(sorted((i, p))) for i in range(n) for p in mixed.rows(t, i, n).sends} for t in range(mixed.period(n) + 1)]
    assert all(len(edges) == n // 2 for edges in rounds)
    assert all(not a & b for a, b in pairwise(rounds))
    assert set().union(*rounds) == {tuple(sorted((i, (i + 1) % n))) for i in range(n)}


GRAPHS = [
    *(nx.gnp_random_graph(n, p, seed=seed) for n in (2, 7, 12, 25) for p in (0.2, 0.5, 0.9) for seed in range(4)),
    *(nx.complete_graph(n) for n in (2, 3, 6, 9)),
    nx.petersen_graph(),
    nx.star_graph(9),
    nx.empty_graph(3),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_colours_are_proper_and_few(graph: nx.Graph[int]) -> None:
    """No island has two edges of one colour, and Vizing's deg + 1 colours are enough."""
    colours = edge_colours(graph)
    assert set(colours) == {(min(e), max(e)) for e in graph.edges}
    for node in graph:
        own = [colour for edge, colour in colours.items() if node in edge]
        assert len(own) == len(set(own))
    most = max((degree for _, degree in graph.degree()), default=0)
    assert len(set(colours.values())) <= most + 1


@pytest.mark.parametrize("graph", ["torus", "barabasi_albert:3", "star"])
def test_a_coloured_period_uses_every_edge_once(graph: str) -> None:
    n = 12
    once, all_edges = mixing("coloured", graph, 5), mixing("graph", graph, 5)
    edges = [tuple(sorted((i, p))) for t in range(once.period(n)) for i in range(n) for p in once.rows(t, i, n).sends]
    assert sorted(edges) == sorted(2 * [tuple(sorted((i, p))) for i in range(n) for p in all_edges.rows(0, i, n).sends if i < p])
    assert max(len(once.rows(t, i, n).sends) for t in range(once.period(n)) for i in range(n)) == 1


def test_metropolis_hastings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "links.edges"
    file.write_text("0 1  # Paris - Rome\n\n1 2\n1 3\n")
    check("graph", str(file), 4)
    w = matrix(mixing("graph", str(file), 0), 0, 4)
    quarter = [[0.75, 0.25, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0.25, 0.75, 0], [0, 0.25, 0, 0.75]]
    assert (w == np.array(quarter)).all()
    found = consensus(mixing("graph", str(file), 0), 4)
    assert found.articulation == (1,)
    assert found.most_sends == 3
    assert found.mean_sends == 1.5


def test_a_directed_graph_splits_evenly(tmp_path: Path) -> None:
    file = tmp_path / "arcs.txt"
    file.write_text("0 1\n0 2\n1 2\n2 0\n")
    w = matrix(mixing("directed", str(file), 0), 0, 3)
    np.testing.assert_array_equal(w, np.array([[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]]))
    # Push-sum's ratios agree with each other once the rows of the product are multiples of one row.
    rounds = consensus(mixing("directed", str(file), 0), 3).rounds
    assert rounds is not None
    settled = np.linalg.matrix_power(w, 200) @ np.ones(3)
    assert consensus(mixing("directed", str(file), 0), 3).weights == pytest.approx((settled.min(), settled.max()), rel=1e-9)
    powers = np.linalg.matrix_power(w, rounds)
    ratios = powers / powers.sum(axis=1, keepdims=True)
    assert np.abs(ratios - ratios[0]).max() <= 2 * TARGET


def test_random_pairs_shrink_the_square_as_expected() -> None:
    """E ||(W - J) x||^2 = (n - 2) / (2 (n - 1)) ||x||^2 for a random matching of n islands: over 4000 draws within 5 standard
    errors (a draw's square lies between 0 and 1, so its standard deviation is at most 1/2)."""
    n, draws = 10, 4000
    mixed = mixing("random_pairs", None, 7)
    x = np.arange(n) - (n - 1) / 2
    x /= np.linalg.norm(x)
    squares = [np.square(matrix(mixed, index, n) @ x).sum() for index in range(draws)]
    assert np.mean(squares) == pytest.approx((n - 2) / (2 * (n - 1)), rel=0, abs=5 * 0.5 / draws**0.5)


@pytest.mark.parametrize(
    ("name", "graph", "n", "said"),
    [
        ("rign", None, 4, "topology = 'rign' is not known; use one of complete, ring, torus"),
        ("ring:3", None, 4, "topology = 'ring:3' is not known"),
        ("alternating_exp_ring:0", None, 4, "is not known"),
        ("ring", None, 1, 'sync.topology = "ring" needs at least 2 islands, got 1; use more, or sync.recipe = "local"'),
        ("ring", "torus", 4, 'sync.graph = "torus" has no effect with sync.topology = "ring"'),
        ("graph", None, 4, "is made of the edges of a graph; name it in sync.graph: ring, path"),
        ("graph", "circle", 4, "sync.graph = 'circle' is no graph; use ring, path"),
        ("directed", "ring", 4, "sync.graph = 'ring' is no directed graph; use cycle"),
        ("hypercube", None, 6, "a hypercube has 2, 4, 8 ... islands, got 6; use 4 or 8"),
        ("coloured", "hypercube", 12, "a hypercube has 2, 4, 8 ... islands, got 12; use 8 or 16"),
        ("alternating_exp_ring:2", None, 6, "pairs hosts of 2 islands, and needs 1, 2, 4, 8 ... hosts, not 6 islands"),
        ("graph", "random_regular:3", 5, "no connected graph of 5 islands; use a degree from 2 to 4, an even one"),
        ("graph", "random_regular:9", 6, "use a degree from 2 to 5"),
        ("graph", "barabasi_albert:6", 6, "barabasi_albert:6 needs 7 islands or more, got 6; use fewer edges"),
        ("graph", "barabasi_albert:0", 6, "barabasi_albert:0 has no edges; use barabasi_albert:M with M of 1 or more"),
        ("directed", "random_out:6", 6, "random_out:6 needs 7 islands or more, got 6; use fewer arcs"),
        ("directed", "random_out:0", 6, "random_out:0 has no arcs; use random_out:K with K of 1 or more"),
        ("graph", "rings:0", 8, "rings:0 is no graph; use rings:C with C of 1 or more"),
        ("graph", "rings:9", 8, "rings:9 needs 9 islands or more, got 8; use fewer rings"),
        ("graph", "./nowhere.edges", 4, "the edges of nowhere.edges cannot be read"),
    ],
)
def test_what_is_no_topology_is_refused(name: str, graph: str | None, n: int, said: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as refused:
        check(name, graph, n)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 1\n1 1\n", "line 2: '1 1' is no edge; write two different islands from 0 to 3"),
        ("0 1\n1 4\n", "line 2: '1 4' is no edge"),
        ("0 1 5\n", "line 1: '0 1 5' is no edge"),
        ("0 1\n2 3\n", "falls into 2 parts, and islands 0, 1 would never hear of the others"),
    ],
)
def test_a_file_that_is_no_connected_graph_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "links.edges"
    file.write_text(text)
    with pytest.raises(ValueError, match="edge") as refused:
        check("graph", str(file), 4)
    assert said in str(refused.value)


def test_arcs_that_do_not_lead_back_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "arcs.txt"
    file.write_text("0 1\n1 0\n1 2\n")
    with pytest.raises(ValueError, match=r"has 2 parts that do not hear each other both ways, as islands 2; add arcs"):
        check("directed", str(file), 3)


def test_consensus_of_a_slow_walk_is_found_by_squaring() -> None:
    """A path of 24 islands takes more rounds than are multiplied out one by one; the power of W says as many."""
    n = 24
    mixed = mixing("graph", "path", 0)
    found = consensus(mixed, n)
    w = matrix(mixed, 0, n)
    values = np.sort(np.abs(np.linalg.eigvalsh(w)))
    assert found.lambda2 == pytest.approx(values[-2], rel=0, abs=1e-12)
    assert found.rounds == int(np.ceil(np.log(TARGET) / np.log(values[-2])))


@pytest.mark.parametrize(
    ("name", "graph", "n"), [("random_pairs", None, 8), ("random_edges", "ring", 9), ("random_edges", "path", 6)]
)
def test_the_first_round_of_a_drawn_topology_is_found(name: str, graph: str | None, n: int) -> None:
    mixed = mixing(name, graph, 0)
    found = consensus(mixed, n)
    assert found.rounds is not None
    left, before = (np.linalg.norm(product(mixed, n, r) - 1 / n, 2) for r in (found.rounds, found.rounds - 1))
    assert left <= TARGET < before
    assert found.lambda2 == pytest.approx(left ** (1 / found.rounds), rel=1e-9)


def test_of_a_slow_drawn_topology_the_factor_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """After so many rounds it is no fixed point: they leave a part of the disagreement, and that is no 1."""
    monkeypatch.setattr("dtrain.topology.consensus.DRAWN", 64)
    monkeypatch.setattr("dtrain.launch.topology_rows.DRAWN", 64)
    mixed, n = mixing("random_edges", "path", 0), 16
    found = consensus(mixed, n)
    left = np.linalg.norm(product(mixed, n, 64) - 1 / n, 2)
    assert 0.5 < left < 0.99
    assert found.rounds is None
    assert found.lambda2 == pytest.approx(left ** (1 / 64), rel=1e-9)
    said = {what: number for what, number, _ in table_rows(mixed, n, wire_bytes=1, wire="")}
    assert said["rounds"] == "more than 64"


@pytest.mark.parametrize(("graph", "n"), [("rings:2", 2), ("rings:5", 5), ("./none.edges", 3)])
def test_a_graph_without_edges_has_rounds_alone_until_the_server_comes(
    graph: str, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("none.edges").write_text("# none\n")
    check("coloured", graph, n, server="sampled:2:3")
    mixed = mixing("coloured", graph, 0, "sampled:2:3")
    assert all((matrix(mixed, index, n) == np.eye(n)).all() for index in range(3))
    assert np.linalg.matrix_rank(matrix(mixed, 3, n)) == n - 1
    assert consensus(mixed, n).lambda2 < 1


@pytest.mark.parametrize("n", [3, 5, 6, 12])
def test_a_doubling_walk_of_any_n_comes_together(n: int) -> None:
    mixed = mixing("one_peer_exponential", None, 0)
    rounds = consensus(mixed, n).rounds
    assert rounds is not None
    left, before = (np.linalg.norm(product(mixed, n, r) - 1 / n, 2) for r in (rounds, rounds - 1))
    assert left <= TARGET < before

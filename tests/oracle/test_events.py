"""Do methods of events do what their papers say? Their flows and jumps, and how quickly they get somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi

import numpy as np
import pytest

from dtrain.events import dadao
from dtrain.events.a2cid2 import a2cid2, momentum
from dtrain.events.algorithm import Array, EventAlgorithm, Ints
from dtrain.events.clock import Clocks
from dtrain.events.gossip import gossip
from dtrain.events.graph_constants import Chi, chi, edge_list, laplacian, rates_of_rounds, uniform
from dtrain.events.problems import PROBLEMS, Problem, consensus
from dtrain.events.run import MethodName, simulate_events
from dtrain.events.sdp import fewest_meetings
from dtrain.events.simulate import simulate
from dtrain.topology import mixing
from dtrain.topology.consensus import matrix

U = 2.0**-53
MU, L = 0.03, 3.0
CHI = Chi(13.0, 0.9)


def edges_of(name: str, n: int) -> Ints:
    return edge_list(mixing(name, None, 0), n)


# ---- the graph's two numbers


@pytest.mark.parametrize("n", [3, 16, 17])
@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_chi_of_ring_and_complete_graph_in_closed_form(n: int, rate: float) -> None:
    """The ring's lambda2 is rate (2 - 2 cos(2 pi / n)), and an edge of it lies beside n - 1 in a row; all eigenvalues of the
    complete graph but 0 are n rate."""
    ring, complete = edges_of("ring", n), edges_of("complete", n)
    want = (1 / (rate * (2 - 2 * cos(2 * pi / n))), (n - 1) / n / rate / 2)
    np.testing.assert_allclose(chi(ring, np.full(len(ring), rate), n), want, rtol=1e-10)
    np.testing.assert_allclose(chi(complete, np.full(len(complete), rate), n), (1 / (n * rate),) * 2, rtol=1e-10)


def test_nodes_that_never_meet_are_refused() -> None:
    with pytest.raises(ValueError, match="some nodes would never hear of the others"):
        chi(np.array([[0, 1], [2, 3]]), np.ones(2), 4)


@pytest.mark.parametrize(
    ("name", "graph"),
    [("one_peer_ring", None), ("random_pairs", None), ("coloured", "torus"), ("random_edges", "barabasi_albert:2")],
)
@pytest.mark.parametrize("n", [8, 9])
def test_rates_of_rounds_are_how_often_pairs_meet(name: str, graph: str | None, n: int) -> None:
    """In 72 k rounds, whole periods of all that have one; drawn ones are 5 deviations off at most."""
    mixed, rounds, every = mixing(name, graph, 0), 720, 3
    pairs, rates = rates_of_rounds(mixed, n, every)
    met = 2 * np.mean([matrix(mixed, index, n) for index in range(rounds)], axis=0)
    expected = np.zeros((n, n))
    expected[pairs[:, 0], pairs[:, 1]] = expected[pairs[:, 1], pairs[:, 0]] = rates * every
    off = np.abs(met - expected)[~np.eye(n, dtype=bool)].max()
    assert off <= (5 * (0.25 / rounds) ** 0.5 if mixed.drawn else 1e-12)


# ---- clocks


def test_clocks_ring_as_often_as_they_should_however_time_is_cut() -> None:
    edges, rates = np.array([[0, 1], [1, 2]]), np.array([0.5, 4.0])
    clocks = Clocks(3, 1.0, edges, rates, seed=7)
    whole = clocks.between(0.0, 400.0)
    parts = [clocks.between(a, b) for a, b in ((0.0, 0.3), (0.3, 17.75), (17.75, 17.75), (17.75, 400.0))]
    for column, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert (column == np.concatenate(pieces)).all()
    assert (np.diff(whole.times) >= 0).all()
    assert len(Clocks(3, 1.0, edges, rates, seed=8).between(0.0, 400.0).times) != len(whole.times)
    for expected, mine in (
        *((400, (whole.first == node) & (whole.second < 0)) for node in range(3)),
        *((400 * rate, (whole.first == a) & (whole.second == b)) for (a, b), rate in zip(edges, rates, strict=True)),
    ):
        assert abs(np.count_nonzero(mine) - expected) <= 5 * expected**0.5
        gaps = np.diff(whole.times[mine]) * expected / 400
        # An exponential's mean and deviation are 1; those of N gaps are 1 / sqrt(N) and sqrt(2 / N) off, each times 5.
        assert abs(gaps.mean() - 1) <= 5 / len(gaps) ** 0.5
        assert abs(gaps.std() - 1) <= 5 * (2 / len(gaps)) ** 0.5


# ---- what a state does by itself, and at an event


def exponential(M: Array) -> Array:
    """Taylor's series of M / 2^k, which is cut before 0.5^19 / 19! < 1e-22, squared k times. (torch.linalg.matrix_exp is off by
    1e-10 where |M| is 0.05.)"""
    k = max(0, int(np.ceil(np.log2(max(np.abs(M).sum(axis=1).max(), 1e-30)))) + 1)
    term = total = np.eye(len(M))
    for power in range(1, 19):
        term = term @ M / 2**k / power
        total = total + term
    for _ in range(k):
        total = total @ total
    return total


def flow_matrix(name: str) -> Array:
    """By the papers' equations."""
    if name == "gossip":
        return np.zeros((1, 1))
    if name == "a2cid2":
        eta = 0.5 / np.sqrt(CHI.chi1 * CHI.chi2)
        return np.array([[-eta, eta], [eta, -eta]])
    nu = MU / 2
    eta, alpha, theta = np.sqrt(nu / L) / 8, np.sqrt(nu / L) / 4, np.sqrt(L / nu) / 2
    M = np.zeros((6, 6))
    x, x_, y, y_, z, z_ = range(6)
    for into, of, rate in ((x, x_, eta), (x_, x, eta), (y, y_, alpha), (z, z_, alpha), (z_, z, eta)):
        M[into, of], M[into, into] = rate, -rate
    M[y_, y] = M[y_, z] = -theta
    M[y_, x_] = -theta * nu
    return M


def method(name: str) -> EventAlgorithm:
    return {"gossip": gossip(1 / L), "a2cid2": a2cid2(CHI, 1 / L), "dadao": dadao.dadao(CHI, MU, L)}[name]


@pytest.mark.parametrize("name", ["gossip", "a2cid2", "dadao"])
def test_the_flow_is_the_exponential_of_its_equations(name: str) -> None:
    times, M = np.array([0.0, 1e-5, 0.3, 7.0, 1000.0]), flow_matrix(name)
    got = np.tile(np.eye(len(M)), (len(times), 1, 1))
    method(name).flow(got, times)
    want = np.array([exponential(M * time) for time in times])
    # Squaring doubles what was rounded, so the oracle is good to about |M| t u; the modes to their condition of 130, times u, of
    # entries of up to 7.
    assert np.abs(got - want).max() <= (10 * np.abs(M).sum() * times.max() + 8 * 130 * 7) * U


def test_the_flow_of_dadao_is_exact_for_any_curvature() -> None:
    for smoothness in (MU, 1.0, 1e5):
        nu = MU / 2
        values, vectors = dadao.modes(MU, smoothness)
        eta, alpha, theta = np.sqrt(nu / smoothness) / 8, np.sqrt(nu / smoothness) / 4, np.sqrt(smoothness / nu) / 2
        M = flow_matrix("dadao")
        M[M != 0] = 0
        for into, of, rate in ((0, 1, eta), (1, 0, eta), (2, 3, alpha), (4, 5, alpha), (5, 4, eta)):
            M[into, of], M[into, into] = rate, -rate
        M[3, [1, 2, 4]] = -theta * np.array([nu, 1, 1])
        assert np.abs(M @ vectors - vectors * values).max() <= 20 * U * np.abs(M).max() * np.abs(vectors).max()
        assert np.linalg.cond(vectors) < 20 * np.sqrt(smoothness / nu) * max(1.0, 1 / nu)


@pytest.mark.parametrize("name", ["gossip", "a2cid2", "dadao"])
def test_a_meeting_keeps_the_sum_of_both_and_brings_them_together(name: str) -> None:
    """Each side takes the same number m of opposite sign, so only the two additions round: u of the results."""
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 50, len(flow_matrix(name)), 7))
    before, sums = np.stack((a, b)).copy(), a + b
    method(name).meet(a, b)
    largest = np.maximum(np.abs(np.stack((a, b))).max(axis=0), np.abs(before).max(axis=0))
    assert (np.abs(a + b - sums) <= 4 * U * largest).all()
    if name == "dadao":  # y + z of both become equal
        np.testing.assert_allclose(a[:, 2] + a[:, 4], b[:, 2] + b[:, 4], rtol=0, atol=20 * U)
        changed = [k for k in range(6) if (np.stack((a, b)) != before)[:, :, k].any()]
        assert changed == [4, 5]
    else:
        np.testing.assert_allclose(a[:, 0], b[:, 0], rtol=0, atol=8 * U)


def test_dadaos_jumps_have_the_constants_of_the_paper() -> None:
    """mu = 2 and L = 16, so that nu = 1 and sqrt(nu / L) = 1/4; chi1 = 3."""
    algorithm = dadao.dadao(Chi(3.0, 0.1), 2.0, 16.0)
    a, b = np.arange(6.0).reshape(1, 6, 1), np.array([[[0.0], [0], [10], [0], [1], [0]]])
    algorithm.step(a, np.array([[100.0]]))
    G = 100 - 1 * 0 - 3
    np.testing.assert_allclose(a[0, :, 0], [-G / 64, 1 - G / 16, 2, 3 + (1 / 16 + 1) * G, 4, 5], rtol=1e-15)
    before = a.copy()
    algorithm.meet(a, b)
    m = 2 + 4 - 10 - 1
    np.testing.assert_allclose((a - before)[0, :, 0], [0, 0, 0, 0, -m / 2, -2 * 3 * 4 * m], rtol=1e-15)
    np.testing.assert_allclose(b[0, 4:, 0], [1 + m / 2, 2 * 3 * 4 * m], rtol=1e-15)


def test_any_displacement_moves_x_and_x_tilde_alike() -> None:
    """Adam's form is that of SGD with another displacement."""
    states = np.random.default_rng(0).standard_normal((3, 2, 4))
    before, u = states.copy(), np.random.default_rng(1).standard_normal((3, 4))
    a2cid2(CHI, 0.5).step(states, u)
    assert (states == before - 0.5 * u[:, None]).all()


@pytest.mark.parametrize("posed", ["quadratic", "ridge", "logistic"])
def test_the_optimum_is_where_dadao_rests(posed: str) -> None:
    """x = x~ = x*, y = y~ = g - nu x*, z = z~ = -y - nu x*: no event and no time changes it, and the z sum to 0."""
    n = 6
    p = PROBLEMS[posed](n, 5, 3)
    assert p.gradient is not None
    x = np.tile(p.optimum, (n, 1))
    g = p.gradient(np.arange(n), x)
    scale = np.abs(g).max() + p.smoothness * np.abs(x).max()
    assert np.abs(g.mean(axis=0)).max() <= 1e-13 * scale, "the optimum"
    nu = p.strong_convexity / 2
    y, z = g - nu * x, -g
    rest = np.stack((x, x, y, y, z, z), axis=1)
    algorithm = dadao.dadao(CHI, p.strong_convexity, p.smoothness)
    moved = rest.copy()
    algorithm.flow(moved, np.full(n, 13.0))
    algorithm.step(moved, g)
    algorithm.meet(moved[:3], moved[3:])
    condition = (p.smoothness / nu) ** 0.5
    np.testing.assert_allclose(moved, rest, rtol=0, atol=1e3 * U * condition * max(1, condition) * max(scale, 1.0))


# ---- the simulator


def one_by_one(
    algorithm: EventAlgorithm, M: Array, p: Problem, edges: Ints, rates: Array, until: float, *, seed: int = 0
) -> Iterator[Array]:
    """All nodes are brought to the time of every event, one event after the other."""
    states, last = algorithm.init(p.start), 0.0
    events = Clocks(len(p.start), 0.0 if p.gradient is None else 1.0, edges, rates, seed).between(0.0, until)

    def to(time: float) -> None:
        states[...] = np.einsum("uv,nvd->nud", exponential(M * (time - last)), states)

    for time, i, j in zip(*events, strict=True):
        to(time)
        last = time
        if j < 0:
            assert p.gradient is not None
            algorithm.step(states[i : i + 1], p.gradient(np.array([i]), states[i : i + 1, 0]))
        else:
            algorithm.meet(states[i : i + 1], states[j : j + 1])
    to(until)
    yield states


@pytest.mark.parametrize("name", ["gossip", "a2cid2", "dadao"])
def test_many_events_at_once_are_events_one_by_one(name: str) -> None:
    n, until = 6, 9.0
    edges = edges_of("ring", n)
    rates = uniform(edges, n, 2.0)
    p = PROBLEMS["ridge"](n, 3, 0)
    (want,) = one_by_one(method(name), flow_matrix(name), p, edges, rates, until)
    one = simulate(method(name), p, edges, rates, seeds=[0], times=np.array([until]))
    cut = simulate(method(name), p, edges, rates, seeds=[5, 0], times=np.array([0.1, 4.0, until]))
    size = np.abs(want).max()
    np.testing.assert_allclose(one.states[0], want, rtol=0, atol=1e-10 * size)
    np.testing.assert_allclose(cut.states[1], want, rtol=0, atol=1e-10 * size)
    assert np.abs(cut.states[0] - want).max() > 1e-3 * size, "another seed is another run"
    x = want[:, 0]
    assert one.error[-1, 0] == pytest.approx(np.square(x - p.optimum).sum(axis=1).mean())
    assert one.consensus[-1, 0] == pytest.approx(np.square(x - x.mean(axis=0)).sum(axis=1).mean())


# ---- what the papers promise


def test_on_a_ring_of_16_momentum_brings_nodes_ten_times_closer() -> None:
    """A meeting a node and unit of time, at T = 60, the norm of what they disagree about, median of 20 seeds."""
    n = 16
    edges = edges_of("ring", n)
    rates = uniform(edges, n, 1.0)
    of_ring = chi(edges, rates, n)
    assert of_ring == pytest.approx((13.137, 0.9375), rel=1e-4)
    assert momentum(of_ring) == pytest.approx((0.1425, 1.8717), rel=1e-3)
    p = consensus(n, 16, 0)
    left = {
        name: np.median(simulate(a, p, edges, rates, seeds=range(20), times=np.array([60.0])).consensus[-1]) ** 0.5
        for name, a in (("plain", gossip(0.0)), ("a2cid2", a2cid2(of_ring, 0.0)))
    }
    print(f"disagreement at T = 60 beside that at 0: {left}")
    assert left["a2cid2"] <= left["plain"] / 10


def test_the_mean_of_all_nodes_stays_in_any_number_of_meetings() -> None:
    """A flow and a meeting round x and x~ by 4 u of what they are each, and x~ is up to alpha times as far out as x began. The
    mean is off by no more than the nodes are."""
    n = 16
    edges = edges_of("ring", n)
    rates = uniform(edges, n, 1.0)
    of_ring = chi(edges, rates, n)
    p = consensus(n, 16, 0)
    trace = simulate(a2cid2(of_ring, 0.0), p, edges, rates, seeds=[0], times=np.array([60.0]))
    events = 2 * trace.meetings / n  # of a node
    bound = 8 * events * U * np.abs(p.start).max() * (1 + momentum(of_ring).alpha)
    assert np.abs(trace.states[0, :, 0].mean(axis=0) - p.optimum).max() <= bound
    assert np.abs(trace.states[0, :, 1].mean(axis=0) - p.optimum).max() <= bound


def slope(method: MethodName, topology: str, problem: str, horizon: float, meetings: float | None = None) -> tuple[float, str]:
    """By how much the log of the squared error falls a unit of time, of 64 nodes, and a row for the table. The median of three
    seeds; the first fifth is not looked at."""
    run = simulate_events(
        *(method, 64), topology=topology, problem=problem, numel=4, horizon=horizon, looks=40, seeds=(0, 1, 2),
        meetings_per_node=meetings,
    )  # fmt: skip
    times, logs = run.trace.times[8:], np.log(np.median(run.trace.error[8:], axis=1))
    found = -float(np.polyfit(times, logs, 1)[0])
    bound = "" if run.bound is None else f", promised {run.bound:.4f}"
    each = f"{run.meetings_per_node:.2f} meetings"
    return found, f"{problem} {topology} {method}, {each}: {found:.4f}{bound}, at the end {np.exp(logs[-1]):.1e}"


def test_dadao_is_as_quick_as_promised_and_exact_where_plain_gossip_stays_off() -> None:
    """With as many meetings and gradients. Plain gossip with a fixed step ends beside the optimum."""
    run = simulate_events("dadao", 12, topology="ring", problem="ridge", numel=3, horizon=400.0, looks=10)
    assert run.bound is not None
    plain = simulate_events(
        "gossip", 12, topology="ring", problem="ridge", numel=3, horizon=400.0, looks=10, meetings_per_node=run.meetings_per_node
    )
    error = run.trace.error[:, 0]
    assert -np.polyfit(run.trace.times, np.log(error), 1)[0] >= run.bound
    assert error[-1] < 1e-3 * plain.trace.error[-1, 0]


def test_where_news_must_travel_momentum_is_steeper_and_on_a_complete_graph_nothing() -> None:
    for topology in ("ring", "torus"):
        (fast, row), (plain, beside) = (slope(m, topology, "scattered", 200.0) for m in ("a2cid2", "gossip"))
        print(f"{row}\n{beside}")
        assert fast > plain
    pair = [simulate_events(m, 16, topology="complete", problem="scattered", horizon=20.0) for m in ("a2cid2", "gossip")]
    assert [run.chi.chi1 for run in pair] == pytest.approx([run.chi.chi2 for run in pair])
    # chi1 = chi2 but for rounding, so alpha is 1/2 and x~ = x for ever.
    np.testing.assert_allclose(pair[0].trace.error, pair[1].trace.error, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("problem", ["ridge", "logistic"])
@pytest.mark.parametrize("topology", ["ring", "torus", "complete"])
def test_64_nodes_fall_as_quickly_as_promised(topology: str, problem: str) -> None:
    found, row = slope("dadao", topology, problem, 600.0)
    run = simulate_events("dadao", 64, topology=topology, problem=problem, numel=4, horizon=1.0, looks=1)
    assert run.bound is not None
    plain, beside = slope("gossip", topology, problem, 600.0, run.meetings_per_node)
    _, momentum_row = slope("a2cid2", topology, problem, 600.0, run.meetings_per_node)
    print(f"{row}\n{beside}\n{momentum_row}")
    assert found >= run.bound
    assert found > 10 * plain


# ---- at which rates


def test_without_cvxpy_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cvxpy", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[sdp\]'$"):
        simulate_events("dadao", 4, problem="ridge", rates="sdp", horizon=1.0)


@pytest.mark.parametrize(("name", "n"), [("ring", 8), ("complete", 6), ("star", 6), ("hypercube", 8)])
def test_the_rates_of_an_edge_transitive_graph_are_equal(name: str, n: int) -> None:
    pytest.importorskip("cvxpy")
    edges = edges_of(name, n)
    rates = fewest_meetings(edges, n)
    share = np.full(len(edges), 1 / len(edges))
    # The solver stops at 1e-4 or better, of the whole.
    assert rates.sum() == pytest.approx(dadao.total_rate(chi(edges, share, n)), rel=1e-3)
    np.testing.assert_allclose(rates, rates.mean(), rtol=0.02)


def test_a_barbell_needs_fewer_meetings_with_rates_of_its_own() -> None:
    """Two cliques of 4 and one edge between them: the bridge must meet more often than others; feasible, and fewer."""
    pytest.importorskip("cvxpy")
    cliques = [(a + k, b + k) for k in (0, 4) for a in range(4) for b in range(a + 1, 4)]
    edges = np.array([*cliques, (3, 4)])
    rates = fewest_meetings(edges, 8)
    found = chi(edges, rates, 8)
    assert found.chi1 * found.chi2 <= 0.5 * 1.01
    share = np.full(len(edges), 1 / len(edges))
    assert rates.sum() < 0.8 * dadao.total_rate(chi(edges, share, 8))
    assert rates.argmax() == len(edges) - 1
    assert np.linalg.eigvalsh(laplacian(edges, rates, 8))[1] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "sgd"}, "method = 'sgd' is not known; use one of gossip, a2cid2, dadao"),
        ({"problem": "cubic"}, "problem = 'cubic' is not known; use one of consensus, quadratic"),
        ({"rates": "best"}, "rates = 'best' is not known; use one of uniform, sdp"),
        ({"num_islands": 1}, "num_islands = 1 is too few; use 2 or more"),
        ({"horizon": 0.0}, "horizon = 0.0 must be more than 0"),
        ({"problem": "consensus"}, 'dadao minimises, and problem = "consensus" has nothing to minimise'),
        ({"meetings_per_node": 0.1}, "meetings_per_node = 0.1 is less than dadao needs on this graph"),
        ({"topology": "directed", "graph": "cycle"}, "the meetings of events go both ways"),
    ],
)
def test_what_does_not_fit_is_one_line(changes: dict[str, object], said: str) -> None:
    asked = {"method": "dadao", "num_islands": 8, "horizon": 1.0} | changes
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the message is looked at below)
        simulate_events(**asked)  # pyright: ignore[reportArgumentType]
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)

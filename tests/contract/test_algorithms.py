"""Does every gossip method keep the promises of one? One suite over methods, topologies, delays and codecs.

Each is held to a matrix recursion in float64, which knows nothing of its code: with the identity codec a round that was sent
after step t adds (M - I) X_t where it lands, M its mixing matrix, and the optimizer does X <- X - lr A (X - C) in between. A pair
of any two axes' values is in some case of ``make test``; the whole product is slow."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dtrain
from dtrain.connect import Connection
from dtrain.recipes import RECIPES
from dtrain.topology import PAIRS, STATIC
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import BUCKET_BYTES, CUT, LR, WIDTH, Matrix, U, largest, problem
from tests.oracle.test_topology import chebyshev_matrix, w_of

ISLANDS, STEPS = 6, 13
EXACT = ("identity",)
LOSSY = ("bf16", "int8:64", "int4:64:stochastic")


class Method(NamedTuple):
    axes: dict[str, Any]
    matrix: Callable[[Matrix], Matrix] | None
    """W of the round -> M, with the identity codec; None where the recursion is another: test_gradient_tracking,
    test_a2cid2."""
    times: tuple[str, ...] = ("at once", "a step late", "every third, two late")


METHODS: dict[str, Method] = {
    "dpsgd": Method({}, lambda w: w),
    "deepsqueeze": Method({"gamma": 0.5}, lambda w: (np.eye(len(w)) + w) / 2),
    # Over the scale-free graph 4 bits with rounding by chance bear 0.69.
    "choco": Method({"gamma": 0.625}, lambda w: 0.375 * np.eye(len(w)) + 0.625 * w),
    "multi_gossip": Method({"gossip_steps": 3}, lambda w: w @ w @ w),
    "chebyshev": Method({"gossip_steps": 4}, lambda w: chebyshev_matrix(w, 4)),
    "gradient_tracking": Method({}, None, ("at once", "a step late")),
    "beer": Method({"gamma": 0.625}, None, ("a step late",)),
    "a2cid2": Method({}, None),
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "ring": {"topology": "ring"},
    "star": {"topology": "star"},
    "torus": {"topology": "torus"},
    "scale-free": {"topology": "graph", "graph": "barabasi_albert:2"},
    "pairs": {"topology": "one_peer_ring"},
    "doubling": {"topology": "one_peer_exponential"},
    "random": {"topology": "random_pairs"},
    "colours": {"topology": "coloured", "graph": "star"},
    "clocks": {"topology": "random_edges", "graph": "ring"},
    "hosts": {"topology": "alternating_exp_ring:3"},
    "server": {"topology": "graph", "graph": "rings:2", "server": "sampled:3:2"},
    "server to all": {"topology": "graph", "graph": "rings:2", "server": "all:2:2"},
}
TIMES: dict[str, dict[str, int]] = {
    "at once": {"every": 1, "delay": 0},
    "a step late": {"every": 1, "delay": 1},
    "every third, two late": {"every": 3, "delay": 2},
}
NEEDS = {"choco": STATIC, "chebyshev": STATIC, "beer": STATIC, "multi_gossip": STATIC, "a2cid2": PAIRS}
NO_SERVER = ("choco", "chebyshev", "beer", "a2cid2")

Case = tuple[str, str, str, str]


class Saved(NamedTuple):
    x: torch.Tensor
    state: dict[str, torch.Tensor]


def cases(codecs: tuple[str, ...]) -> list[Case]:
    return [
        (method, topology, time, codec)
        for method, topology, time, codec in product(METHODS, TOPOLOGIES, TIMES, codecs)
        if time in METHODS[method].times
        and (METHODS[method].matrix is not None or codecs != EXACT)
        and (method not in NEEDS or TOPOLOGIES[topology]["topology"] in NEEDS[method])
        and (method not in NO_SERVER or "server" not in TOPOLOGIES[topology])
        and (topology != "server to all" or codecs == EXACT)  # which moves the mean, and has no place in gradient tracking
    ]


def pairwise(every: list[Case]) -> list[Case]:
    """Greedily few of the cases in which each pair of values of two axes is, that is in any."""

    def pairs(case: Case) -> set[tuple[tuple[int, str], tuple[int, str]]]:
        return set(combinations(enumerate(case), 2))

    left = set().union(*map(pairs, every))
    chosen: list[Case] = []
    while left:
        chosen.append(max(every, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


def marked(codecs: tuple[str, ...]) -> list[Any]:
    few = set(pairwise(cases(codecs)))
    marks = {case: () if case in few else (pytest.mark.slow,) for case in cases(codecs)}
    return [pytest.param(*case, marks=mark, id=", ".join(case)) for case, mark in marks.items()]


def axes_of(method: str, topology: str, time: str, codec: str) -> dict[str, Any]:
    return {"recipe": method, "codec": codec, **METHODS[method].axes, **TOPOLOGIES[topology], **TIMES[time]}


def test_every_gossip_recipe_is_in_the_suite() -> None:
    """But dpsgd with an optimizer of its own (test_accum_adam, test_sam), a schedule (test_budget) or a server's rounds; push_sum
    keeps another mean (test_push_sum)."""
    gossips = {name for name, row in RECIPES.items() if row.combine == "gossip"}
    assert gossips == {*METHODS, "decent_adam", "accum_adam", "single_merge", "dfedsam", "dfedsam_mgs", "semi_s2s"}
    assert len(pairwise(cases(EXACT))) < len(cases(EXACT))


def recursion(axes: dict[str, Any], matrix: Callable[[Matrix], Matrix], first: int = 0) -> list[Matrix]:
    """X after each step, and after the drain; rounds start after steps first, first + every and so on."""
    p, every, delay = problem(ISLANDS), axes["every"], axes["delay"]
    X = np.tile(p.start.astype(np.float64), (ISLANDS, 1))
    out: list[Matrix] = []
    flying: dict[int, Matrix] = {}
    rounds = 0
    for t in range(1, STEPS + 1):
        gradient = p.gradient(X)
        X = X + flying.pop(t, 0.0) - LR * gradient
        if t % every == first:
            moved = (matrix(w_of(axes["topology"], axes.get("graph"), rounds, ISLANDS, axes.get("server"))) - np.eye(ISLANDS)) @ X
            rounds += 1
            if delay:
                flying[t + delay] = moved
            else:
                X = X + moved
        out.append(X)
    return [*out, X + sum(flying.values())]


def trajectory(axes: dict[str, Any]) -> Matrix:
    """(steps + 1, n, width)."""
    p = problem(ISLANDS)

    def island(connection: Connection) -> list[NDArray[np.float32]]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(model, optimizer, **axes, bucket_bytes=BUCKET_BYTES, link=connection):
            for _ in range(STEPS):
                sgd_step(model, optimizer)
                seen.append(model.flat().numpy().copy())
        return [*seen, model.flat().numpy().copy()]

    return np.array(run_islands(ISLANDS, island), dtype=np.float64).swapaxes(0, 1)


def rounding(method: str, want: Matrix) -> float:
    """A step rounds as D-PSGD's (8 u M), a mix of n terms n (1 + 1 + 2) u M, times the gossip steps of a round and, for
    Chebyshev, its weights, below 2; kept sums (CHOCO) carry what all rounds before rounded. lr a <= 1/4 and ||M|| <= 1 in the
    2-norm, so errors of sqrt(n) in the largest entry do not grow: 2 sqrt(n) (8 + 8 n Q) u M a step and T of them, squared for
    kept sums. That is wide for CHOCO's gamma, 1e-3 of which moves a run by half as much: test_gossip holds each step."""
    M = max(largest(want), largest(problem(ISLANDS).c.astype(np.float64)))
    return 2 * ISLANDS**0.5 * (8 + 8 * ISLANDS * RECIPES[method].gossip_steps) * U * M


@pytest.mark.parametrize(("method", "topology", "time", "codec"), marked(EXACT))
def test_it_follows_its_matrix_recursion(method: str, topology: str, time: str, codec: str) -> None:
    axes, matrix = axes_of(method, topology, time, codec), METHODS[method].matrix
    assert matrix is not None
    want = np.array(recursion(axes, matrix))
    got = trajectory(axes)
    each = rounding(method, want)
    assert largest(got - want) <= each * (STEPS + 1) * ((STEPS + 2) / 2 if method == "choco" else 1)
    assert largest(want - np.array(recursion(axes, lambda w: np.eye(len(w))))) > 100 * each, "mixing matters"


@pytest.mark.parametrize("method", [*(m for m in METHODS if METHODS[m].matrix is not None), "push_sum"])
def test_fragments_take_turns(method: str) -> None:
    """The first parameter is one and has the rounds of a model that is sent whole; the second has its own, every // 2 steps
    later. With SGD on this loss no element sees another."""
    axes = {"recipe": method, "graph": "random_out:2", **TIMES["every third, two late"], "codec": "identity"}
    if method in METHODS:
        axes = axes_of(method, "ring", "every third, two late", "identity")
    whole, turns = trajectory(axes), trajectory({**axes, "fragments": 2})
    assert (turns[..., :CUT] == whole[..., :CUT]).all()
    assert largest(turns[..., CUT:] - whole[..., CUT:]) > 1e-2
    if method in METHODS and (matrix := METHODS[method].matrix) is not None:
        want = np.array(recursion(axes, matrix, first=1))[..., CUT:]
        many = (STEPS + 1) * ((STEPS + 2) / 2 if method == "choco" else 1)
        assert largest(turns[..., CUT:] - want) <= rounding(method, want) * many


def apart_and_mixed(axes: dict[str, Any], rounds: int) -> tuple[Matrix, Matrix]:
    """Parameters before and after so many rounds of islands that began apart and have a learning rate of 0."""
    apart = np.random.default_rng(1).uniform(-1, 1, (ISLANDS, WIDTH)).astype(np.float32)
    p = problem(ISLANDS)

    def island(connection: Connection) -> NDArray[np.float32]:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with dtrain.join(model, optimizer, **axes, link=connection):
            model.set_flat(torch.from_numpy(apart[connection.node]))
            for _ in range(rounds * axes["every"]):
                sgd_step(model, optimizer)
        return model.flat().numpy()

    return apart.astype(np.float64), np.array(run_islands(ISLANDS, island), dtype=np.float64)


@pytest.mark.parametrize(("method", "topology", "time", "codec"), marked(LOSSY))
def test_a_lossy_codec_never_moves_the_mean(method: str, topology: str, time: str, codec: str) -> None:
    """What one island takes up another gives. Rounding alone moves the mean, as test_gossip derives: 20 u M a round and island,
    times the steps of a round; CHOCO's sums keep theirs. M = 4: lossy values of up to 2 are mixed with weights of up to 2."""
    axes, rounds = axes_of(method, topology, time, codec), 12
    apart, mixed = apart_and_mixed(axes, rounds)
    steps = RECIPES[method].gossip_steps
    # Tracking begins with v = 0 and gradients are taken at a learning rate of 0, so x mixes alone.
    bound = 20 * steps * rounds * (rounds + 1) / 2 * U * 4
    assert largest(mixed.mean(axis=0) - apart.mean(axis=0)) <= bound
    assert np.ptp(mixed, axis=0).mean() < 0.75 * np.ptp(apart, axis=0).mean()


def trained(axes: dict[str, Any], first: int, last: int, saved: list[Saved] | None) -> list[Saved]:
    """Islands that train from step ``first`` to ``last``, from what was saved of each, and what they are then; they are left as
    they stand, with what is in flight."""
    p = problem(ISLANDS)

    def island(connection: Connection) -> Saved:
        model = p.model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, **axes, bucket_bytes=BUCKET_BYTES, link=connection) as sync:
            if saved is not None:
                model.set_flat(saved[connection.node].x)
                sync.load_state_dict(saved[connection.node].state)
            for _ in range(first, last):
                sgd_step(model, optimizer)
            state = {k: v.clone() for k, v in sync.state_dict().items() if not k.startswith("counts")}
            return Saved(model.flat().clone(), state)

    return run_islands(ISLANDS, island)


BESIDE: dict[str, dict[str, Any]] = {
    "push_sum": {"graph": "random_out:2", "delay": 1},
    "noloco": {"every": 3, "delay": 2},
}
"""Methods that keep something else than the mean of x, and what they are resumed with."""


@pytest.mark.parametrize("method", [*METHODS, *BESIDE])
def test_twice_is_the_same_bits_and_a_resume_in_mid_flight_too(method: str) -> None:
    """Twelve steps, twice; and seven and five, the second five in new objects, while a round flies in between."""
    if method in BESIDE:
        axes = {"recipe": method, "codec": "int8:64:stochastic", **BESIDE[method]}
    else:
        axes = axes_of(method, "pairs" if method == "a2cid2" else "ring", METHODS[method].times[-1], "int8:64:stochastic")
    whole, again = trained(axes, 0, 12, None), trained(axes, 0, 12, None)
    half = trained(axes, 0, 7, None)
    assert any(int(v) >= 0 for k, v in half[0].state.items() if k.endswith("land_step")), "a round is under way"
    for other in (again, trained(axes, 7, 12, half)):
        for one, two in zip(whole, other, strict=True):
            assert torch.equal(one.x, two.x)
            assert one.state.keys() == two.state.keys()
            assert all(torch.equal(one.state[key], two.state[key]) for key in one.state)


def test_a_resume_over_other_edges_is_refused(tmp_path: Path) -> None:
    """Every island has as many neighbours as before, and so its state has the same shapes."""
    (tmp_path / "ring.edges").write_text("0 2\n2 4\n4 1\n1 3\n3 5\n5 0\n")
    axes = {"recipe": "choco", "topology": "graph", "graph": "ring"}
    half = trained(axes, 0, 3, None)
    with pytest.raises(ValueError, match="the saved state is of another graph"):
        trained(axes | {"graph": str(tmp_path / "ring.edges")}, 3, 5, half)


def test_islands_with_other_edges_are_refused(tmp_path: Path) -> None:
    """The same name on every host, and something else in the file."""
    (tmp_path / "0.edges").write_text("0 1\n1 2\n")
    (tmp_path / "1.edges").write_text("0 1\n0 2\n")

    def island(connection: Connection, differ: bool) -> None:
        model = problem(3).model(connection.node)
        graph = str(tmp_path / f"{int(differ and connection.node == 1)}.edges")
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="dpsgd", topology="graph", graph=graph, link=connection):
            sgd_step(model, optimizer)

    run_islands(3, lambda connection: island(connection, False))
    with pytest.raises(ValueError, match="has another recipe than island 0"):
        run_islands(3, lambda connection: island(connection, True))

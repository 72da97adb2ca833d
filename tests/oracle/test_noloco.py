"""Does NoLoCo follow its paper, and is each momentum that would drive pairs apart refused?

The rendering is plain torch on one vector an island. With momentum 1/2, outer_lr 1/2 and gamma 1/4 all products are exact and the
sums have one order: there dtrain must agree to the bit."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import dtrain
from dtrain.assemble import assemble
from dtrain.connect import Connection
from dtrain.pair_momentum import growth, largest_gamma
from dtrain.recipes import RECIPES, resolve
from dtrain.topology import mixing
from dtrain.topology.consensus import matrix
from dtrain.virtual import Simulation
from dtrain.virtual_link import LinkModel, VirtualLink
from dtrain.virtual_problem import Consensus
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, LR, WIDTH, Problem, problem
from tests.oracle.test_gossip import U

A, B, G = 0.5, 0.5, 0.25
EXACT: dict[str, Any] = {"recipe": "noloco", "outer_momentum": A, "outer_lr": B, "gamma": G}
EVERY, STEPS = 4, 18


def pairs(index: int, n: int) -> list[int]:
    """Each island's partner in a round, itself where it is alone."""
    w = matrix(mixing("random_pairs", None, 0), index, n)
    return [int(np.argmax(row - 0.75 * np.eye(n)[i])) if row[i] < 1 else i for i, row in enumerate(w)]


def paper(p: Problem, n: int, delay: int) -> Tensor:
    """(steps + 1, n, width): x after each step, and after the drain."""
    phi, x = [p.start.clone() for _ in range(n)], [p.start.clone() for _ in range(n)]
    u = [torch.zeros(WIDTH) for _ in range(n)]
    flight: tuple[int, list[Tensor]] | None = None
    seen, index = [], 0

    def land(sent: list[Tensor]) -> None:
        before, partner = list(phi), pairs(index, n)
        delta = [x_i - phi_i for x_i, phi_i in zip(sent, phi, strict=True)]
        for i, j in enumerate(partner):
            u[i] = A * u[i] + B * (delta[i] + delta[j]) / 2 - G * (before[i] - before[j]) / 2
            phi[i] = before[i] + u[i]
            x[i] = (x[i] - sent[i]) + phi[i]

    for t in range(1, STEPS + 1):
        grads = [a * (x_i - c) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if flight and flight[0] == t:
            land(flight[1])
            flight, index = None, index + 1
        x[:] = [x_i - LR * g for x_i, g in zip(x, grads, strict=True)]
        if t % EVERY == 0:
            flight = (t + delay, list(x))
            if delay == 0:
                land(flight[1])
                flight, index = None, index + 1
        seen.append(torch.stack(x))
    if flight:
        land(flight[1])
    return torch.stack([*seen, torch.stack(x)])


def islands_of_dtrain(p: Problem, n: int, steps: int, **axes: Any) -> Tensor:
    def island(connection: Connection) -> Tensor:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        seen = []
        with dtrain.join(model, optimizer, link=connection, **axes):
            for _ in range(steps):
                sgd_step(model, optimizer)
                seen.append(model.flat())
        return torch.stack([*seen, model.flat()])

    return torch.stack(run_islands(n, island), dim=1)


@pytest.mark.parametrize("delay", [0, 3, 4])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_it_is_its_paper_to_the_bit(n: int, delay: int) -> None:
    """Of three islands one is alone in each round, and goes on by its own progress."""
    p = problem(n)
    got = islands_of_dtrain(p, n, STEPS, **EXACT, every=EVERY, delay=delay, bucket_bytes=512)
    assert torch.equal(got, paper(p, n, delay))
    assert float((got[-1, 0] - got[-1, 1]).abs().max()) > 1e-3, "islands are not equal, as all-reduce would make them"


def test_without_consensus_between_equal_islands_it_is_a_heavy_ball() -> None:
    """Islands with the same data have the same anchors, and torch's SGD with momentum is their outer optimizer: u = - lr buf."""
    p = problem(2)
    p = Problem(p.start, p.a[:1].expand(2, -1), p.c[:1].expand(2, -1))
    got = islands_of_dtrain(p, 2, 12, **EXACT, every=3)
    theta = p.start.clone()
    outer = torch.optim.SGD([theta], lr=B, momentum=A)
    for _ in range(4):
        x = theta.clone()
        for _ in range(3):
            x = x - LR * (p.a[0] * (x - p.c[0]))
        theta.grad = theta - x
        outer.step()
    # A round of three steps rounds 8 u M each, an outer step 8 more; the momentum carries it on, twice at most.
    assert float((got[-1, 0] - theta).abs().max()) <= 4 * 2 * 32 * U * 2


def apart_and_mixed(n: int, rounds: int, **axes: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Islands that start apart, with a learning rate of 0: Delta is 0 unless a codec makes something of it."""
    apart = np.random.default_rng(1).uniform(-1, 1, (n, WIDTH)).astype(np.float32)

    def island(connection: Connection) -> NDArray[np.float32]:
        x = torch.from_numpy(apart[connection.node])
        model = Quadratic(x, torch.ones(WIDTH), torch.zeros(WIDTH), CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with dtrain.join(model, optimizer, recipe="noloco", every=1, start="own", link=connection, **axes):
            for _ in range(rounds):
                sgd_step(model, optimizer)
        return model.flat().numpy()

    return apart.astype(np.float64), np.array(run_islands(n, island), dtype=np.float64)


@pytest.mark.parametrize("codec", ["identity", "int8:64", "int4:64"])
@pytest.mark.parametrize("n", [5, 6])
def test_a_lossy_codec_never_moves_the_mean(n: int, codec: str) -> None:
    """What one of a pair takes up the other gives, to the bit; u, phi and x round 3 u M a round, |x| and |u| below 4."""
    rounds = 12
    apart, mixed = apart_and_mixed(n, rounds, codec=codec, delay=1)
    moved = float(np.abs(mixed.mean(axis=0) - apart.mean(axis=0)).max())
    assert moved <= 8 * rounds**2 * U * 4
    assert np.ptp(mixed, axis=0).mean() < 0.3 * np.ptp(apart, axis=0).mean()


def test_an_exact_average_is_a_new_start() -> None:
    """Islands that are equal stay so, whatever their anchors and momenta were before."""
    p = problem(3)

    def island(connection: Connection) -> tuple[Tensor, Tensor]:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="noloco", every=2, delay=1, link=connection) as sync:
            for _ in range(5):
                sgd_step(model, optimizer)
            sync.merge()
            merged = model.flat()
            optimizer.param_groups[0]["lr"] = 0.0
            for _ in range(4):
                sgd_step(model, optimizer)
        return merged, model.flat()

    for merged, after in run_islands(3, island):
        assert torch.equal(merged, after)


# ---- what pairs bear


def matchings(n: int) -> list[NDArray[np.float64]]:
    """Every W that may be drawn, once for each order that draws it."""
    found = []
    for order in permutations(range(n)):
        w = np.eye(n)
        for a, b in zip(order[::2], order[1::2], strict=False):
            w[[a, a, b, b], [a, b, a, b]] = 0.5
        found.append(w)
    return found


def one_round(z: NDArray[np.float64], w: NDArray[np.float64], s: tuple[float, float, float], flown: float, left: float) -> Any:
    """(phi, u, Delta) of n islands each, in columns, where a round is sent -> where the next is: the paper's lines."""
    (alpha, gamma, beta), (phi, u, delta) = s, z.reshape(3, len(w), -1)
    sent = phi + delta
    u = alpha * u + beta * (w @ delta) - gamma * (phi - w @ phi)
    phi = phi + u
    landed = left**flown * sent - sent + phi
    return np.concatenate((phi, u, left ** (1 - flown) * landed - phi))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize(
    ("settings", "flown"), [((0.5, 0.7, 0.7), 0.0), ((0.9, 0.5, 0.7), 0.0), ((0.7, 0.3, 0.9), 0.5), ((0.3, 1.0, 0.4), 1.0)]
)
def test_the_growth_is_that_of_all_matchings(n: int, settings: tuple[float, float, float], flown: float) -> None:
    """E M kron M over every matching, of M that the paper's lines give on all islands: its radius, but for the mean where
    training does nothing, which stays."""
    alpha, gamma, beta = settings
    radii = []
    for left in (1e-3, *np.linspace(0, 1, 17)[1:].tolist()):
        maps = [one_round(np.eye(3 * n), w, settings, flown, left) for w in matchings(n)]
        if left == 1:
            maps = [m @ np.kron(np.eye(3), np.eye(n) - 1 / n) for m in maps]
        mean = sum((np.kron(m, m) for m in maps), np.zeros((9 * n * n, 9 * n * n))) / len(maps)
        radii.append(np.abs(np.linalg.eigvals(mean)).max())
    found = growth(alpha, gamma, beta, n, flown=flown)
    assert found == pytest.approx(max(radii), rel=1e-6)
    assert growth(alpha, gamma, beta, n, flown=flown, lost=0.9) >= found


def test_what_a_codec_loses_makes_pairs_grow() -> None:
    lossless, half, most = (growth(0.5, 0.7, 0.7, 16, lost=lost) for lost in (0.0, 0.5, 0.9))
    assert lossless < half < most


def distance_after(rounds: int, **answers: Any) -> float:
    """Of 16 islands that began apart and only talk, by the code that trains: what is left of |x - mean|."""
    recipe = replace(RECIPES["noloco"], every=1, **answers)
    link = VirtualLink(LinkModel(), 16, 0)
    simulation = Simulation(
        assemble(recipe, 0, 16), 16, [("x", (256,))], Consensus(256, 0), lr=0.0, link=link, compute_s=lambda node: 1.0
    )

    def measure() -> float:
        x = torch.stack([x.double() for x in simulation.parameters])
        return float((x - x.mean(0)).norm())

    start = measure()
    simulation.run(rounds)
    return measure() / start


@pytest.mark.parametrize(
    ("answers", "comes_together"),
    [
        ({}, True),
        ({"outer_momentum": 0.9, "gamma": 0.7}, False),
    ],
)
def test_a_scan_over_drawn_pairs_agrees(answers: dict[str, Any], comes_together: bool) -> None:
    row = replace(RECIPES["noloco"], **answers)
    left = distance_after(100, **answers)
    assert (growth(row.outer_momentum, row.gamma, row.outer_lr, 16) < 1) == comes_together
    assert left < 1e-2 if comes_together else left > 10


@pytest.mark.parametrize("codec", ["int8:64", "int4:64", "sign:64"])
def test_what_a_codec_loses_is_a_floor(codec: str) -> None:
    resolve("noloco", {"codec": codec}, 16)
    assert distance_after(100, codec=codec) < 0.5


@pytest.mark.parametrize("n", [3, 16])
def test_a_momentum_beyond_the_range_is_refused_with_the_gamma_that_it_bears(n: int) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*would drive pairs drawn from \d+ islands apart, by 1\.\d+ a round") as caught:
        resolve("noloco", {"outer_momentum": 0.9, "gamma": 0.6}, n)
    (said,) = re.findall(r"use gamma=([0-9.]+) or less", str(caught.value))
    assert float(said) == largest_gamma(0.9, 0.7, n)
    resolve("noloco", {"outer_momentum": 0.9, "gamma": float(said)}, n)
    with pytest.raises(ValueError, match="apart"):
        resolve("noloco", {"outer_momentum": 0.9, "gamma": float(said) + 0.01}, n)


def test_a_delay_narrows_the_range() -> None:
    """In flight for all of the period, 0.9 bears no gamma with DiLoCo's 0.7."""
    resolve("noloco", {"outer_momentum": 0.9, "gamma": 0.3}, 16)
    with pytest.raises(ValueError, match=r"^[^\n]*use a smaller outer_momentum or outer_lr$"):
        resolve("noloco", {"outer_momentum": 0.9, "gamma": 0.3, "delay": "round"}, 16)
    resolve("noloco", {"delay": "round"}, 16)


@pytest.mark.parametrize(
    "axes", [{"topology": "ring"}, {"error_feedback": True}, {"schedule": "ready"}, {"outer": "sgd"}, {"server": "sampled:2:5"}]
)
def test_what_would_have_no_effect_is_refused(axes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'^[^\n]*has no effect with sync.algorithm = "noloco"'):
        resolve("noloco", axes, 4)


def test_a_row_of_ones_own_over_other_pairs_is_refused(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom dtrain.recipes import RECIPES\n"
        'ROW = replace(RECIPES["noloco"], name="mine", topology="one_peer_ring")\n'
    )
    with pytest.raises(ValueError, match=r'^what pairs bear .* "random_pairs", and not for "one_peer_ring"; use that,'):
        resolve(f"{tmp_path}/mine.py:ROW", {}, 4)

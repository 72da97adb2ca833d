"""Do islands wait for late ones as long as the simulated ones do, and as closed forms say where there are any?"""

from __future__ import annotations

import math
from statistics import NormalDist, mean, stdev

import numpy as np
import pytest

from dtrain.assemble import assemble
from dtrain.plan.company import Company, LinkSpeed, everyone, neighbours
from dtrain.plan.lateness import Course, Leg, Pace, Trip, When, follow
from dtrain.plan.model import Island, StepTime, step_time
from dtrain.plan.sent import Exchange, Flown, Phase, Sent, sent
from dtrain.recipes import Recipe, resolve
from dtrain.virtual import Simulation
from dtrain.virtual_link import LinkModel, VirtualLink, Way
from dtrain.virtual_problem import Still

T, SIGMA = 0.1, 0.01
FREE = LinkSpeed(None, 0.0)
NOISY = Island(T, SIGMA, 1e12)


def of(company: Company, num_bytes: int = 50_000) -> Sent:
    """One bucket, one phase, one wire."""
    flown = Flown(0, (Phase(0, num_bytes, 0, 1, num_bytes),), 0)
    return Sent((Exchange((), (flown,)),), 0, 0, 0, company)


def timed(company: Company, when: When, island: Island = NOISY, link: LinkSpeed = FREE) -> StepTime:
    return step_time(of(company), when, island, link)


def shape(steps: int = 1) -> float:
    """Of the lognormal sum of so many steps."""
    return math.sqrt(math.log1p((SIGMA / T) ** 2 / steps))


def longest(num_islands: int) -> float:
    """E of the longest of so many steps, in means: the integral of x over d Phi(z)^n, with x = exp(s z - s^2 / 2)."""
    edges = np.linspace(-8.5, 8.5, 20_001)
    grown = np.diff(np.array([NormalDist().cdf(z) for z in edges]) ** num_islands)
    middle = (edges[1:] + edges[:-1]) / 2
    return float(np.sum(np.exp(shape() * middle - shape() ** 2 / 2) * grown))


@pytest.mark.parametrize(("num_islands", "every"), [(2, 1), (2, 16), (64, 1), (1000, 1)])
def test_a_barrier_waits_for_the_longest_step(num_islands: int, every: int) -> None:
    """Of two lognormals of shape s the longer is longer than the mean by erf(s / 2). Five standard errors."""
    over = math.erf(shape(every) / 2) if num_islands == 2 else longest(num_islands) - 1
    found = timed(everyone(num_islands, 1), When(every, 0))
    assert found.late_s == pytest.approx(T * over, abs=5 * found.error_s)
    assert 0 < found.error_s < 0.05 * found.late_s
    assert found.step_s == pytest.approx(T + found.late_s)


def recursion(num_islands: int, steps: int) -> tuple[float, float]:
    """Waited by an island a step, over a free link, a step late: who is ahead may not be by more than one step. And its error,
    by ten parts of the run."""
    draws = np.random.default_rng(5)
    clock, waited = np.zeros(num_islands), np.zeros(steps)
    for k in range(steps):
        begun = clock
        clock = begun + T * draws.lognormal(-(shape() ** 2) / 2, shape(), num_islands)
        waits = np.maximum(0.0, begun.max() - clock)
        waited[k] = waits.mean()
        clock = clock + waits
    parts = [float(part.mean()) for part in np.array_split(waited[steps // 4 :], 10)]
    return mean(parts), stdev(parts) / math.sqrt(len(parts))


def test_a_round_that_hides_ten_sigma_is_waited_for_all_the_same() -> None:
    """A thousand islands wander apart until the last is a step behind the first: 3.7 ms of 100 each step."""
    said, error = recursion(1000, 2000)
    found = timed(everyone(1000, 1), When(1, 1))
    assert said > 0.003
    assert found.late_s == pytest.approx(said, abs=4 * math.hypot(error, found.error_s))


STEP_S, NOISE = 0.03, 0.1


def simulated(recipe: Recipe, num_islands: int, link: LinkSpeed, between: tuple[int, int]) -> float:
    """Waited a step by the mean island, from one step to another; what is waited for at a run's end is in neither."""
    waited = []
    for steps in between:
        draws = [np.random.default_rng((7, node)) for node in range(num_islands)]
        simulation = Simulation(
            assemble(recipe, 0, num_islands), num_islands, [("x", (NUMEL,))], Still(NUMEL), lr=0.0,
            link=VirtualLink(LinkModel(Way(link.far_bits_per_s, link.rtt_s)), num_islands, 0),
            compute_s=lambda node, draws=draws: STEP_S * draws[node].lognormal(-(NOISE**2) / 2, NOISE),
        )  # fmt: skip
        simulation.run(steps)
        waited.append(mean(account.waited_s for account in simulation.accounts))
    return (waited[1] - waited[0]) / (between[1] - between[0])


NUMEL = 500


@pytest.mark.parametrize(
    ("name", "axes", "num_islands", "mbit", "rtt_s"),
    [
        ("dpsgd", {"topology": "one_peer_exponential"}, 16, 50.0, 0.0),
        ("dpsgd", {"topology": "ring"}, 8, 2.0, 0.04),
        ("dpsgd", {"topology": "complete"}, 6, 4.0, 0.04),
        ("dpsgd", {"topology": "star"}, 5, 4.0, 0.02),
        ("choco", {}, 8, 1.0, 0.03),
        ("allreduce", {}, 5, 4.0, 0.01),
        ("delayed_diloco", {"every": 4, "delay": 1, "codec": "identity", "error_feedback": False}, 6, 1.5, 0.03),
        ("diloco", {"every": 4, "delay": 0}, 6, 1.5, 0.03),
    ],
)
def test_islands_that_are_simulated_wait_as_long(
    name: str, axes: dict[str, object], num_islands: int, mbit: float, rtt_s: float
) -> None:
    """A simulated run is one draw of what a copy is that is followed as long: four of the copies' standard deviations, and the
    error of their own mean. Of a star the hub's wires alone: its downlink, which no simulation has, is no narrower."""
    recipe, link = resolve(name, axes, num_islands), LinkSpeed(mbit * 1e6, rtt_s)
    first, last = 10 * recipe.every, 70 * recipe.every
    exchange = sent(recipe, {"x": (NUMEL,)}, num_islands).period[0]
    gradients, rounds = ([trip(flown)] if flown else [] for flown in (exchange.gradients, exchange.rounds))
    when = When(recipe.every, recipe.delay_steps)
    found = follow(
        Course(when, gradients[0] if gradients else None, tuple(rounds)),
        sent(recipe, {"x": (NUMEL,)}, num_islands).company,
        link, Pace(STEP_S, math.sqrt(math.expm1(NOISE**2)) * STEP_S),
        settle=10, rounds=60, copies=24,
    )  # fmt: skip
    tolerance = 4 * stdev(found.each_s) * math.sqrt(1 + 1 / 24)
    assert found.mean_s == pytest.approx(simulated(recipe, num_islands, link, (first, last)), abs=tolerance)
    assert tolerance < STEP_S / 30


def trip(flown: tuple[Flown, ...]) -> Trip:
    (one,) = flown
    return Trip(0.0, tuple(Leg(8 * p.far_bytes / p.wires, 0.0) for p in one.phases), 0.0)


def test_who_is_always_slow_is_waited_for_always() -> None:
    """Two islands, one of twice the step: both step at its pace, as late rounds may be. Alone each steps as fast as it can: 3
    steps in the time of 2 islands' 4."""
    slow = Island(T, 0.0, 1e12, factors=(1.0, 2.0))
    for when in (When(1, 0), When(1, 1), When(4, 0)):
        found = timed(everyone(2, 1), when, slow)
        assert found.step_s == pytest.approx(2 * T)
        assert found.unequal_s == pytest.approx(T / 2), "one waits a step, the other not at all"
    alone = step_time(Sent((Exchange((), ()),), 0, 0, 0, everyone(1, 1)), When(1, 0), slow, FREE)
    assert alone.step_s == pytest.approx(T * 4 / 3)


def test_a_slow_link_is_waited_for_by_all_who_are_joined() -> None:
    """Gossip on a ring of 4, 0.05 MB to each of two at a megabyte a second; between 0 and 1 at half of it, and 0.1 s of rtt. Both
    post to each other first: there after 0.1 + 0.05 s, and to their others after 0.15. So all cycles take 0.15 s a round."""
    link = LinkSpeed(8e6, 0.0, between={(0, 1): (4e6, 0.1)})
    ring = neighbours(("ring", None, 0, None), 4, 1)
    exchange = Exchange((), (Flown(0, (Phase(0, 100_000, 0, 2, 100_000),), 0),))
    found = step_time(Sent((exchange,), 0, 0, 0, ring), When(1, 0), Island(T, 0.0, 1e12), link)
    assert found.step_s == pytest.approx(T + 0.15)
    assert found.unequal_s == pytest.approx(0.05)

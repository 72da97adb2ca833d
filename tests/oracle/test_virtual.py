"""Do islands on the virtual clock do what live ones do, bit for bit, and does their time follow from bytes, rate and latency?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.assemble import assemble
from dtrain.config import parse_job
from dtrain.connect import Connection
from dtrain.recipes import resolve, with_steps
from dtrain.virtual import Account, Simulation
from dtrain.virtual_link import PACKET_BYTES, LinkModel, VirtualLink, Way
from dtrain.virtual_problem import Quadratic, Still
from dtrain.virtual_run import Virtual, simulate_job
from tests.islands import Quadratic as Model
from tests.islands import run_islands, sgd_step

CUT, WIDTH, STEPS, LR, ISLANDS = 70, 153, 13, 0.125, 4
HEADER_BYTES = 32

# Recipe -> the axes that differ. Steps are such that a round flies at the end where there is a delay.
CASES: Mapping[str, tuple[str, dict[str, object]]] = {
    "at once": ("dpsgd", {"delay": 0}),
    "a step late": ("dpsgd", {}),
    "to three peers": ("dpsgd", {"topology": "complete", "codec": "int8:32"}),
    "random pairs": ("dpsgd", {"topology": "random_pairs", "every": 2, "delay": 2}),
    "compressed differences": ("choco", {}),
    "an outer step": ("diloco", {"every": 3, "delay": 2}),
    "two phases": ("delayed_diloco", {"every": 4, "delay": 3, "fragments": 2, "reduce": "all_to_all"}),
    "eager": ("delayed_diloco", {"every": 3, "delay": "round", "landing": "eager", "outer_lr": 0.5}),
    "pure": ("delayed_diloco", {"every": 3, "delay": "round", "landing": "pure", "outer_lr": 0.25}),
    "gradients averaged": ("allreduce", {}),
    "gradients tracked": ("gradient_tracking", {}),
    "both compressed": ("beer", {}),
    "four phases": ("chebyshev", {"every": 4, "delay": 2}),
    "one way": ("push_sum", {"graph": "cycle"}),
    "error feedback": ("deepsqueeze", {"delay": 0}),
    "a budget of rounds": ("single_merge", {"schedule": "budget:5"}),
    "continuous momentum": ("a2cid2", {}),
    "random edges": ("dpsgd", {"topology": "random_edges", "graph": "ring"}),
    "a server's mean for two": ("semi_s2s", {}),
    "a server's mean for all": ("semi_s2a", {}),
}


def problem() -> tuple[Tensor, list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(3)
    start = torch.rand(WIDTH, generator=draw) * 2 - 1
    a = [0.25 + 1.75 * torch.rand(WIDTH, generator=draw) for _ in range(ISLANDS)]
    c = [torch.rand(WIDTH, generator=draw) * 2 - 1 for _ in range(ISLANDS)]
    return start, a, c


def live(recipe: str, axes: Mapping[str, object]) -> list[tuple[Tensor, int, int]]:
    """Parameters, bytes sent and received of islands that have a thread each."""
    start, a, c = problem()

    def island(connection: Connection) -> tuple[Tensor, int, int]:
        model = Model(start, a[connection.node], c[connection.node], CUT)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        budget = resolve(recipe, axes, ISLANDS).schedule != "every"
        changes: dict[str, object] = {"bucket_bytes": 256, **axes, **({"total_steps": STEPS} if budget else {})}
        with dtrain.join(model, optimizer, recipe=recipe, link=connection, seed=5, **changes) as sync:  # pyright: ignore[reportArgumentType]
            for _ in range(STEPS):
                sgd_step(model, optimizer)
        return model.flat(), sync.stats().wire_bytes_sent, sync.stats().wire_bytes_received

    return run_islands(ISLANDS, island)


def virtual(recipe: str, axes: Mapping[str, object], link: LinkModel, compute_s: Mapping[int, float]) -> Simulation:
    start, a, c = problem()
    plan = assemble(with_steps(resolve(recipe, {"bucket_bytes": 256, **axes}, ISLANDS), STEPS), 5, ISLANDS)
    simulation = Simulation(
        plan, ISLANDS, [("left", (CUT,)), ("right", (WIDTH - CUT,))], Quadratic(a, c, start),
        lr=LR, link=VirtualLink(link, ISLANDS, 1), compute_s=compute_s.__getitem__,
    )  # fmt: skip
    simulation.run(STEPS)
    return simulation


@pytest.mark.parametrize("case", CASES)
def test_islands_on_the_virtual_clock_are_live_ones_bit_for_bit(case: str) -> None:
    """Wherever their wires are late: a fast link and equal islands, and one on which wires overtake each other and islands are
    steps apart."""
    recipe, axes = CASES[case]
    want = live(recipe, axes)
    fast = LinkModel()
    slow = LinkModel(Way(20_000.0, 0.1), jitter_s=0.3, loss=0.2, between={(0, 1): Way(5_000.0, 1.0)})
    for link, compute_s in ((fast, dict.fromkeys(range(ISLANDS), 0.1)), (slow, {0: 0.05, 1: 0.4, 2: 0.0, 3: 0.1})):
        got = virtual(recipe, axes, link, compute_s)
        for node, (x, sent, received) in enumerate(want):
            assert torch.equal(got.parameters[node], x), f"island {node}"
            assert (got.accounts[node].wire_bytes_sent, got.accounts[node].wire_bytes_received) == (sent, received)


def test_live_islands_train_while_a_simulation_runs() -> None:
    """Wires that leave an island are checked, also those of islands that join in the middle of a simulation without checksums."""
    recipe, axes = CASES["a step late"]
    start, a, c = problem()
    want, trained = live(recipe, axes), list[list[tuple[Tensor, int, int]]]()

    def compute_s(node: int) -> float:
        if not trained:
            trained.append(live(recipe, axes))
        return 0.1

    plan = assemble(resolve(recipe, axes, ISLANDS), 5, ISLANDS)
    simulation = Simulation(
        plan, ISLANDS, [("x", (WIDTH,))], Quadratic(a, c, start), lr=LR, link=VirtualLink(LinkModel(), ISLANDS, 1),
        compute_s=compute_s,
    )  # fmt: skip
    simulation.run(3)
    (got,) = trained
    assert all(torch.equal(x, y) for (x, _, _), (y, _, _) in zip(want, got, strict=True))


def accounts(recipe: str, axes: Mapping[str, object], n: int, numel: int, steps: int, step_s: float) -> list[Account]:
    """On RATE and RTT, with nothing drawn."""
    plan = assemble(resolve(recipe, axes, n), 0, n)
    link = VirtualLink(LinkModel(Way(RATE, RTT_S)), n, 0)
    simulation = Simulation(plan, n, [("x", (numel,))], Still(numel), lr=0.0, link=link, compute_s=lambda node: step_s)
    virtual_s = simulation.run(steps)
    for account in simulation.accounts:
        # An instant belongs to computing or to waiting. Sums of at most 2 steps terms, each rounded.
        assert account.ended_s == pytest.approx(account.compute_s + account.waited_s, rel=4 * steps * EPS)
        assert account.ended_s <= virtual_s
    return simulation.accounts


RATE, RTT_S = 1e6, 0.04
EPS = 2.0**-53
NUMEL = 1000
FLIGHT_S = (HEADER_BYTES + 4 * NUMEL) * 8 / RATE + RTT_S / 2
"""0.052256 s: one wire of NUMEL fp32."""


def test_a_pair_waits_for_bytes_and_half_a_round_trip() -> None:
    for account in accounts("dpsgd", {"delay": 0}, 2, NUMEL, 10, 0.1):
        assert account.waited_s == pytest.approx(10 * FLIGHT_S, rel=100 * EPS)
        assert account.wire_bytes_sent == account.wire_bytes_received == 10 * (HEADER_BYTES + 4 * NUMEL)
        assert account.rounds == 10


@pytest.mark.parametrize("delay", [1, 2, 3])
@pytest.mark.parametrize("step_s", [0.1, 0.03, 0.01, 0.0])
def test_a_delay_hides_so_many_steps_of_a_flight(step_s: float, delay: int) -> None:
    """Rounds start after steps 4, 8, ... 4 k, and the last step is the one before which the k-th lands."""
    k = 5
    for account in accounts("dpsgd", {"every": 4, "delay": delay}, 2, NUMEL, 4 * k + delay, step_s):
        # Times of up to 3 s are rounded at each of some hundred events.
        assert account.waited_s == pytest.approx(k * max(0.0, FLIGHT_S - delay * step_s), abs=1000 * EPS)


def test_a_round_that_flies_at_the_end_is_waited_for() -> None:
    for account in accounts("dpsgd", {}, 2, NUMEL, 6, 0.03):
        assert account.waited_s == pytest.approx(5 * (FLIGHT_S - 0.03) + FLIGHT_S, rel=1000 * EPS)


def test_two_phases_wait_twice_and_peers_share_an_uplink() -> None:
    """All-reduce of n islands: parts of 1/n go to n - 1 peers, then their means do."""
    n, numel = 4, 4096 * 4  # parts are cut at multiples of a codec's grain
    phase_s = (n - 1) * (HEADER_BYTES + 4 * numel // n) * 8 / RATE + RTT_S / 2
    for account in accounts("allreduce", {}, n, numel, 3, 0.1):
        assert account.waited_s == pytest.approx(3 * 2 * phase_s, rel=1000 * EPS)
        assert account.wire_bytes_sent == 3 * 2 * (n - 1) * (HEADER_BYTES + 4 * numel // n)


def job(*changes: str) -> Virtual:
    return simulate_job(parse_job({}, ["sim.problem=quadratic", "sim.numel=40", "train.steps=8", "islands.count=6", *changes]))


def test_a_job_tells_its_schedule_how_long_it_is() -> None:
    assert {account.rounds for account in job("sync.recipe=single_merge", "train.steps=20").accounts} == {4}, "20 % of 20"


@pytest.mark.parametrize("recipe", ["allreduce", "fedavg", "dpsgd"])
def test_one_straggler_of_factor_two_halves_the_speed_of_all(recipe: str) -> None:
    """Where all wait for all in each step. The link takes no time, and eight times 0.2, added, is exactly twice 0.1's."""
    axes = {
        "allreduce": (),
        "fedavg": ("sync.every=1",),
        "dpsgd": ("sync.topology=complete", "sync.delay=0"),
    }[recipe]
    even = job(f"sync.recipe={recipe}", "sim.step_s=0.1", *axes)
    uneven = job(f"sync.recipe={recipe}", "sim.step_s=0.1", "sim.stragglers=1", *axes)
    assert uneven.virtual_s == 2 * even.virtual_s
    assert sorted(account.waited_s > 0 for account in uneven.accounts) == [False] + [True] * 5
    assert [account.compute_s for account in uneven.accounts].count(even.virtual_s) == 5


def test_a_share_of_stragglers_is_drawn_by_the_seed() -> None:
    def slow(seed: int) -> list[int]:
        found = job("sync.recipe=local", "sim.step_s=1", "sim.stragglers=0.5", "sim.straggler_factor=3", f"job.seed={seed}")
        assert {account.compute_s for account in found.accounts} == {8.0, 24.0}
        return [node for node, account in enumerate(found.accounts) if account.compute_s == 24.0]

    assert all(len(slow(seed)) == 3 for seed in range(3))
    assert len({tuple(slow(seed)) for seed in range(10)}) > 1


NOISY = ("sync.recipe=dpsgd", "sim.step_s=0.1", "sim.step_noise=0.3", "sim.jitter=20ms", "sim.loss=0.1", "link.rate=1mbit")


def test_a_run_follows_from_its_seed() -> None:
    one, two, other = job(*NOISY), job(*NOISY), job(*NOISY, "job.seed=1")
    assert (one.virtual_s, one.accounts, one.end, one.resent_bytes) == (two.virtual_s, two.accounts, two.end, two.resent_bytes)
    assert one.virtual_s != other.virtual_s


def test_steps_are_noisy_around_their_mean() -> None:
    """A factor exp(s z - s^2 / 2) has the mean 1 and the variance exp(s^2) - 1."""
    count, steps, sigma = 40, 100, 0.5
    noisy = job("sync.recipe=local", "sim.step_s=1", f"sim.step_noise={sigma}", f"islands.count={count}", f"train.steps={steps}")
    mean = sum(account.compute_s for account in noisy.accounts) / (count * steps)
    assert abs(mean - 1) < 5 * math.sqrt((math.exp(sigma**2) - 1) / (count * steps))  # five standard deviations of the mean


@pytest.mark.parametrize("wire_bytes", [100, 1448, 40_032])
@pytest.mark.parametrize("loss", [0.01, 0.3])
def test_lost_packets_cost_the_bytes_and_the_round_trips_of_the_formula(loss: float, wire_bytes: int) -> None:
    wires, rtt_s = 2000, 0.5
    link = VirtualLink(LinkModel(Way(None, rtt_s), loss=loss), 2, 7)
    late = np.array([link.arrival_s(0.0, 0, 1, wire_bytes) for _ in range(wires)]) - rtt_s / 2
    k = math.ceil(wire_bytes / PACKET_BYTES)
    generations = sum(1 - (1 - loss**g) ** k for g in range(1, 200))
    # Five standard deviations of the mean. A packet is sent 1 + G times, G geometric with the variance p / (1 - p)^2; that of the
    # generations is taken from the sample.
    assert abs(late.mean() / rtt_s - generations) < 5 * late.std() / rtt_s / math.sqrt(wires)
    deviation = wire_bytes / k * math.sqrt(k * loss / (1 - loss) ** 2 / wires)
    assert abs(link.resent_bytes[0] / wires - wire_bytes * loss / (1 - loss)) < 5 * deviation
    assert link.resent_bytes[1] == 0.0


def test_what_is_sent_again_takes_the_uplink_too() -> None:
    link = VirtualLink(LinkModel(Way(1e6, 0.0), loss=0.3), 2, 7)
    last_s = [link.arrival_s(0.0, 0, 1, 40_000) for _ in range(100)][-1]
    assert last_s == pytest.approx((100 * 40_000 + link.resent_bytes[0]) * 8 / 1e6, rel=200 * EPS)


def test_jitter_is_late_and_never_early() -> None:
    link = VirtualLink(LinkModel(Way(None, 1.0), jitter_s=0.25), 2, 7)
    late = np.array([link.arrival_s(0.0, 0, 1, 9) for _ in range(4000)]) - 0.5
    assert late.min() >= 0
    assert abs(late.mean() - 0.25) < 5 * 0.25 / math.sqrt(4000)  # an exponential's deviation is its mean


def test_an_uplink_sends_one_wire_after_another_and_a_link_may_be_another() -> None:
    link = VirtualLink(LinkModel(Way(8e3, 2.0), between={(0, 2): Way(8e2, 10.0)}), 3, 0)
    assert link.arrival_s(0.0, 0, 1, 1000) == 1.0 + 1.0
    assert link.arrival_s(0.5, 0, 2, 1000) == 1.0 + 10.0 + 5.0
    assert link.arrival_s(20.0, 0, 1, 500) == 20.5 + 1.0
    assert link.arrival_s(0.0, 2, 0, 1000) == 10.0 + 5.0
    assert link.arrival_s(0.0, 1, 2, 1000) == 1.0 + 1.0


def test_consensus_is_exact_after_a_period_and_the_gap_is_a_sum_of_squares() -> None:
    """One-peer exponential over 2^k islands; and f - f* against its definition in numpy."""
    apart = job("sim.problem=consensus", "sync.recipe=dpsgd", "sync.delay=0", "islands.count=8", "train.steps=3")
    assert apart.start is not None
    assert apart.end is not None
    # Uniform in [-1, 1): variance 1/3, of which 1 - 1/8 is left around the mean of 8.
    assert apart.start.consensus_distance == pytest.approx(math.sqrt(40 / 3 * 7 / 8), rel=0.2)
    assert apart.end.consensus_distance < 40 * 3 * 2.0**-24
    start, a, c = problem()
    A, C, x = torch.stack(a).double().numpy(), torch.stack(c).double().numpy(), start.double().numpy()

    def f(x: np.ndarray) -> float:
        return float((A / 2 * (x - C) ** 2).sum(axis=1).mean())

    best = (A * C).sum(axis=0) / A.sum(axis=0)
    assert Quadratic(a, c, start).gap(start) == pytest.approx(f(x) - f(best), rel=1e-9)  # fp64, differences of a like size

"""Is a simulation whose islands are shared out, each share on a clock of its own, the one on one clock, bit for bit?

Shares are threads here, over the sockets that they have between processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from dtrain.algorithm import Algorithm
from dtrain.assemble import Plan, assemble
from dtrain.bucket import Bucket, Layout
from dtrain.errors import NonFinite, PeerLost, WireError
from dtrain.link import Link, Peers
from dtrain.recipes import resolve, with_steps
from dtrain.virtual import Simulation
from dtrain.virtual_link import LinkModel, VirtualLink, Way
from dtrain.virtual_problem import Still, drawn_quadratic
from dtrain.virtual_sockets import Gone, Line, carry
from dtrain.virtual_windows import Failure, windows

NUMEL, STEPS, LR, ISLANDS = 150, 6, 0.125, 6
SHAPES = [("left", (70,)), ("right", (NUMEL - 70,))]
"""Two buckets of at most 320 bytes."""

RECIPES: Mapping[str, tuple[str, dict[str, object]]] = {
    "at once": ("dpsgd", {"delay": 0}),
    "a step late": ("dpsgd", {}),
    "two peers": ("dpsgd", {"topology": "ring", "codec": "int8:32"}),
    "random pairs": ("dpsgd", {"topology": "random_pairs", "every": 2, "delay": 2}),
    "compressed differences": ("choco", {}),
    "two phases": ("delayed_diloco", {"every": 4, "delay": 3, "fragments": 2, "reduce": "all_to_all"}),
    "gradients averaged": ("allreduce", {}),
    "gradients tracked": ("gradient_tracking", {}),
    "both compressed": ("beer", {}),
    "four phases": ("chebyshev", {"every": 4, "delay": 2}),
    "a server's mean for all": ("semi_s2a", {}),
}
SAME = dict.fromkeys(range(ISLANDS), 0.125)
UNLIKE = {0: 0.125, 1: 0.25, 2: 0.0, 3: 0.125, 4: 0.5, 5: 0.25}
Timed = tuple[LinkModel, Mapping[int, float]]
LINKS: Mapping[str, Timed] = {
    "no time": (LinkModel(), SAME),
    # Times are multiples of 2^-10 s, and many events of unlike islands meet: 1,024 bytes take an eighth of a second.
    "a rate": (LinkModel(Way(65_536.0, 0.0)), UNLIKE),
    "a rate and a way": (LinkModel(Way(65_536.0, 0.25)), UNLIKE),
    "noise": (
        LinkModel(Way(20_000.0, 0.1), jitter_s=0.3, loss=0.2, between={(0, 1): Way(5_000.0, 1.0), (2, 5): Way(None, 0.02)}),
        UNLIKE,
    ),
}
ALL_APART: Timed = LinkModel(Way(20_000.0, 0.0), jitter_s=0.3, loss=0.2), SAME
"""A window has one event."""
FEW_EVENTS = ("a step late",)
SPLITS = ([0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1], [0, 1, 2, 2, 1, 0], [1, 0, 0, 0, 0, 0])


def made(plan: Plan, model: LinkModel, compute_s: Mapping[int, float], nodes: Sequence[int]) -> tuple[Simulation, VirtualLink]:
    problem, link = drawn_quadratic(ISLANDS, NUMEL, 3), VirtualLink(model, ISLANDS, 1)
    simulation = Simulation(
        plan, ISLANDS, SHAPES, problem, lr=LR, link=link, compute_s=compute_s.__getitem__, nodes=nodes
    )  # fmt: skip
    return simulation, link


def planned(recipe: str, axes: Mapping[str, object]) -> Plan:
    return assemble(with_steps(resolve(recipe, {"bucket_bytes": 320, **axes}, ISLANDS), STEPS), 5, ISLANDS)


def shared(
    parts: Sequence[Simulation], owners: Sequence[int], model: LinkModel, steps: int = STEPS
) -> list[Failure | None]:
    ends: dict[tuple[int, int], Line] = {}
    for a, b in combinations(range(len(parts)), 2):
        one, other = socket.socketpair()
        ends[a, b], ends[b, a] = Line(b, one), Line(a, other)

    def live(own: int) -> Failure | None:
        lines = [ends[own, other] for other in range(len(parts)) if other != own]
        try:
            return carry(windows(parts[own], steps, owners, own, model.least_s), lines, own, parts[own])
        finally:  # so that nobody waits for a share that has failed
            for line in lines:
                line.close()

    with ThreadPoolExecutor(len(parts)) as threads:
        found = [threads.submit(live, own) for own in range(len(parts))]
        return [one.result(timeout=60) for one in found]


@pytest.mark.parametrize("case", RECIPES)
def test_shares_are_the_whole_bit_for_bit(case: str) -> None:
    """Parameters, accounts, and what was sent again; whatever the link, whoever is slow, and whoever is where."""
    timed = [*LINKS.values(), ALL_APART] if case in FEW_EVENTS else [*LINKS.values()]
    for turn, (model, compute_s) in enumerate(timed):
        whole, link = made(planned(*RECIPES[case]), model, compute_s, range(ISLANDS))
        virtual_s = whole.run(STEPS)
        owners = SPLITS[(turn + list(RECIPES).index(case)) % len(SPLITS)]
        own = [[node for node in range(ISLANDS) if owners[node] == share] for share in range(max(owners) + 1)]
        parts = [made(planned(*RECIPES[case]), model, compute_s, nodes) for nodes in own]
        assert shared([part for part, _ in parts], owners, model) == [None] * len(parts)
        for nodes, (part, of_part) in zip(own, parts, strict=True):
            assert part.stuck() is None
            for node, x, account in zip(nodes, part.parameters, part.accounts, strict=True):
                assert torch.equal(x, whole.parameters[node]), f"island {node}"
                assert account == whole.accounts[node], f"island {node}"
                assert of_part.resent_bytes[node] == link.resent_bytes[node]
        assert max(account.ended_s for part, _ in parts for account in part.accounts) == virtual_s


def own_method(send: Callable[[Bucket, Link], Iterator[None]], num_islands: int, **axes: object) -> Plan:
    """A plan whose rounds are ``send``, and whose landing is nothing."""

    def bind(layout: Layout, peers: Peers) -> Algorithm:
        return Algorithm(lambda b: {}, lambda b, state, link: send(b, link), lambda b, state: None)

    return replace(assemble(resolve("dpsgd", {"delay": 0, **axes}, num_islands), 0, num_islands), methods=(bind,))


def wire(wire_bytes: int) -> Tensor:
    return torch.zeros(wire_bytes, dtype=torch.uint8)


def test_wires_of_one_time_are_taken_in_the_order_of_their_islands() -> None:
    """Islands 0 and 1 post to island 2 at once, one in each bucket, and 2 answers each, over one uplink: 0 first, whichever of
    the two lives with 2. 800 and 80 bytes at 6,400 bit/s take 1 and 0.1 s."""

    def send(b: Bucket, link: Link) -> Iterator[None]:
        asks: int = b.index
        if link.node == asks:
            link.post(2, wire(8))
        if link.node == 2:
            link.expect(asks, 8)
        yield
        if link.node == 2:
            link.post(asks, wire(800 if asks == 0 else 80))
        if link.node == asks:
            link.expect(2, 800 if asks == 0 else 80)
        yield

    plan, model = own_method(send, 3, bucket_bytes=16), LinkModel(Way(6400.0, 0.0))
    for owners in ([0, 0, 0], [0, 1, 1], [0, 1, 0], [1, 1, 0]):
        parts = [
            Simulation(
                plan, 3, [("x", (4,)), ("y", (4,))], Still(8), lr=0.0, link=VirtualLink(model, 3, 0), compute_s=lambda node: 1.0,
                nodes=[node for node in range(3) if owners[node] == share],
            )
            for share in range(max(owners) + 1)
        ]  # fmt: skip
        assert shared(parts, owners, model, steps=1) == [None] * len(parts)
        waited_s = {node: account.waited_s for part in parts for node, account in zip(part.nodes, part.accounts, strict=True)}
        assert waited_s == pytest.approx({0: 0.01 + 1.0, 1: 0.01 + 1.0 + 0.1, 2: 0.01}, rel=1e-12)


class Odd(Exception):
    """One that cannot be copied."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize(
    ("error", "arrives"),
    [
        (NonFinite("inf"), NonFinite("inf")),
        (WireError("9 bytes, not 8"), WireError("9 bytes, not 8")),
        (PeerLost([3, 4], "gone"), PeerLost([3, 4], "gone")),
        (Odd(1, 2), RuntimeError("Odd: 1 and 2")),
    ],
)
def test_the_first_error_in_virtual_time_is_everybodys(error: Exception, arrives: Exception) -> None:
    """Island 1 fails in its second step, at 1 s; island 0 in its first, at 2 s. In one window of 5 s they are one."""

    def send(b: Bucket, link: Link) -> Iterator[None]:
        rounds[link.node] += 1
        if link.node == 0:
            raise NonFinite("too late")
        if rounds[link.node] == 2:
            raise error
        yield

    model, plan = LinkModel(Way(None, 10.0)), own_method(send, 2)
    for owners in ([0, 1], [1, 0]):
        rounds = [0, 0]
        parts = [
            Simulation(
                plan, 2, [("x", (4,))], Still(4), lr=0.0, link=VirtualLink(model, 2, 0), compute_s=[2.0, 0.5].__getitem__,
                nodes=[owners.index(share)],
            )
            for share in range(2)
        ]  # fmt: skip
        for share, failure in enumerate(shared(parts, owners, model)):
            assert failure is not None
            assert failure.time_s == 1.0
            own = owners[1] == share
            want = error if own else arrives
            assert (type(failure.error), str(failure.error)) == (type(want), str(want))
            if isinstance(want, PeerLost):
                assert getattr(failure.error, "islands", None) == (3, 4)
            assert own or "raise error" in "".join(failure.error.__notes__), "where it was raised"


def test_whoever_is_left_learns_that_another_is_gone() -> None:
    one, other = socket.socketpair()
    line = Line(1, one)
    other.sendall(b"half a length"[:4])
    other.close()
    with pytest.raises(Gone):
        line.receive()
    with pytest.raises(Gone):
        line.send(bytes(1 << 22))
    line.close()

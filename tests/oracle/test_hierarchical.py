"""Is a reduce over groups the reduce of the groups' means, to the bit, and does one copy a group cross the far link?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain.bucket import Layout, Span
from dtrain.codec import State, by_name, plain
from dtrain.hierarchical import hierarchical
from dtrain.link import Link, Peers
from dtrain.low_rank import low_rank
from dtrain.reduce import BoundReduce, Reduce, all_to_all, gather
from dtrain.topology.static import complete
from dtrain.wire import HEADER_BYTES

CPU = torch.device("cpu")
LAYOUT = Layout((Span("w", (9, 20), 0, 0, 180), Span("b", (33,), 180, 180, 213)))
PATHS: dict[str, Reduce] = {
    "gather": gather(by_name("int4:64", error_feedback=True)),
    "all_to_all": all_to_all(by_name("int4:64", error_feedback=True)),
    "low_rank": low_rank(plain("int4:32"), lambda s: 3 if len(s.shape) == 2 else 0, feedback_decay=1.0),
    "low_rank of no matrix": low_rank(plain("int8:64"), lambda s: 0, feedback_decay=0.5),
}


def exchange(paths: list[BoundReduce], xs: list[Tensor], states: list[State]) -> tuple[list[Tensor], list[tuple[int, int, int]]]:
    """One round, phase by phase: what each island ends with, and (source, target, bytes) of all wires."""
    n, sent = len(xs), list[tuple[int, int, int]]()
    links = [Link(node, n, complete(0, node, n)) for node in range(n)]
    outs = [x.clone() for x in xs]
    runs = [path.run(out, out, state, link) for path, out, state, link in zip(paths, outs, states, links, strict=True)]
    alive = dict(enumerate(runs))
    while alive:
        for node in alive:
            links[node].new_phase()
        ended = [node for node, run in alive.items() if next(run, "end") == "end"]
        for node in alive:
            links[node].inbox = {}
        for node in alive:
            for peer, wire in links[node].outbox:
                links[peer].inbox[node] = wire.clone()
                sent.append((node, peer, wire.numel()))
        alive = {node: run for node, run in alive.items() if node not in ended}
        for node in alive:
            assert {peer: wire.numel() for peer, wire in links[node].inbox.items()} == links[node].expected
            for peer, check in links[node].checks.items():
                check(links[node].inbox[peer])
    return outs, sent


def mean_in_order(xs: list[Tensor]) -> Tensor:
    out = torch.zeros_like(xs[0])
    for x in xs:
        out.add_(x, alpha=1 / len(xs))
    return out


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("groups", "islands", "owner"), [(2, 2, 0), (2, 2, 1), (3, 4, 2)])
def test_owners_do_what_islands_alone_do_and_all_end_with_their_bits(name: str, groups: int, islands: int, owner: int) -> None:
    """Over rounds: what the codec lost comes later, and owners alone keep it."""
    n, path = groups * islands, PATHS[name]
    paths = [hierarchical(path, islands, owner)(LAYOUT, Peers(node, n)) for node in range(n)]
    plainly = [path(LAYOUT, Peers(group, groups)) for group in range(groups)]
    states, alone = ([p.init(CPU) for p in of] for of in (paths, plainly))
    assert [bool(state) for state in states] == [node % islands == owner for node in range(n)]
    g = torch.Generator().manual_seed(3)
    for _ in range(3):
        xs = [torch.randn(LAYOUT.numel, generator=g) for _ in range(n)]
        means = [mean_in_order(xs[k * islands : (k + 1) * islands]) for k in range(groups)]
        outs, sent = exchange(paths, xs, states)
        wanted, across = exchange(plainly, means, alone)
        assert all(torch.equal(out, wanted[node // islands]) for node, out in enumerate(outs))
        far = [(a // islands, b // islands, size) for a, b, size in sent if a // islands != b // islands]
        assert sorted(far) == sorted(across), "of a group's payload the path's own bytes cross the far link, and no more"
        assert {node % islands for a, b, _ in sent if a // islands != b // islands for node in (a, b)} == {owner}
        near = [size for a, b, size in sent if a // islands == b // islands]
        assert near == [HEADER_BYTES + 4 * LAYOUT.numel] * (2 * groups * (islands - 1))


@pytest.mark.parametrize("path", [gather, all_to_all])
def test_without_loss_it_is_the_mean_of_all_islands(path: type) -> None:
    n, islands, u = 12, 4, 2.0**-24
    paths = [hierarchical(path(plain("identity")), islands, 1)(LAYOUT, Peers(node, n)) for node in range(n)]
    xs = list(torch.rand(n, LAYOUT.numel, generator=torch.Generator().manual_seed(4)) * 2 - 1)
    outs, _ = exchange(paths, xs, [p.init(CPU) for p in paths])
    assert all(torch.equal(out, outs[0]) for out in outs)
    # Two means of 4 and 3 terms: each weight and each product and sum is rounded, of values up to 1.
    torch.testing.assert_close(outs[0].double(), torch.stack(xs).double().mean(0), rtol=0, atol=3 * (4 + 3) * u)

"""Do gather and all-to-all bring the mean to every island, in equal bits and for the bytes they promise? Is anything lost?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dtrain.bucket import Layout, Span
from dtrain.codec import Codec, State, by_name
from dtrain.link import Link, Peers
from dtrain.reduce import BoundReduce, Reduce, all_to_all, gather
from dtrain.topology.static import complete
from dtrain.wire import HEADER_BYTES

U = 2.0**-24
"""Unit roundoff of fp32."""
CPU = torch.device("cpu")
CODECS = ("identity", "bf16", "int8:64", "int4:32")
SHAPES = ((1,), (7,), (63,), (4097,), (5, 130, 64, 1, 4097, 300))
"""Parameters of a bucket; the last has several, whole blocks and broken ones."""
Path = Callable[[Codec], Reduce]


class Sent(NamedTuple):
    source: int
    target: int
    phase: int
    wire: Tensor


def layout_of(numels: tuple[int, ...]) -> Layout:
    spans, begin = [], 0
    for k, numel in enumerate(numels):
        spans.append(Span(f"p{k}", (numel,), begin, begin, begin + numel))
        begin += numel
    return Layout(tuple(spans))


def bind(path: Path, codec: Codec, layout: Layout, n: int) -> list[BoundReduce]:
    return [path(codec)(layout, Peers(node, n)) for node in range(n)]


def exchange(paths: list[BoundReduce], xs: list[Tensor], states: list[State]) -> tuple[list[Tensor], list[Sent]]:
    """One round in lockstep: what each island ends with, and all wires."""
    n = len(xs)
    links = [Link(node, n, complete(0, node, n)) for node in range(n)]
    outs = [torch.full_like(x, torch.nan) for x in xs]
    runs = [
        path.run(x.clone(), out, state, link) for path, x, out, state, link in zip(paths, xs, outs, states, links, strict=True)
    ]
    sent: list[Sent] = []
    phase = 0
    while True:
        for link in links:
            link.new_phase()
        more = [next(run, "end") is None for run in runs]
        assert len(set(more)) == 1
        if not more[0]:
            return outs, sent
        for link in links:
            link.inbox = {}
        for link in links:
            for peer, wire in link.outbox:
                links[peer].inbox[link.node] = wire
                sent.append(Sent(link.node, peer, phase, wire.clone()))
        for link in links:
            assert {peer: wire.numel() for peer, wire in link.inbox.items()} == link.expected
        phase += 1


def error_of(codec: str, M: float) -> float:
    """What one encoding of values up to M may lose: half a step of the bf16-rounded scale, or half an ulp.

    x / scale is at most q_max / (1 - 2^-9) < q_max + 1/2, so the clamp costs no more than rounding does; computing the quotient
    adds q_max 4 u of a step, far below the 1.001.
    """
    q_max = {"int8:64": 127, "int4:32": 7}
    if codec in q_max:
        return 1.001 * M / q_max[codec] * (1 + 2.0**-9) / 2
    return M * 2.0**-9 if codec == "bf16" else 0.0


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("path", [gather, all_to_all])
def test_every_island_ends_with_the_mean_in_equal_bits(path: Path, n: int, codec: str, error_feedback: bool) -> None:
    g = torch.Generator().manual_seed(n)
    for numels in SHAPES:
        layout = layout_of(numels)
        paths = bind(path, by_name(codec, error_feedback=error_feedback), layout, n)
        xs = [torch.rand(layout.numel, generator=g) * 2 - 1 for _ in range(n)]
        outs, _ = exchange(paths, xs, [p.init(CPU) for p in paths])
        assert all(torch.equal(out, outs[0]) for out in outs)
        # |x| <= 1. The senders lose once; the owner of a part encodes their mean again. Sums of n weighted terms: 3 n u.
        first = error_of(codec, 1.0)
        second = error_of(codec, 1.0 + first) if path is all_to_all else 0.0
        mean = torch.stack(xs).double().mean(dim=0)
        assert float((outs[0] - mean).abs().max()) <= first + second + 3 * n * U * 2


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_bytes_an_island_sends(n: int, codec: str) -> None:
    layout = layout_of((20_011,))
    bound = by_name(codec, error_feedback=False)
    w = bound.bind(layout).wire_bytes
    xs = [torch.ones(layout.numel) for _ in range(n)]
    for path in (gather, all_to_all):
        _, sent = exchange(bind(path, bound, layout, n), xs, [{} for _ in range(n)])
        counts = [sum(s.wire.numel() for s in sent if s.source == node) for node in range(n)]
        if path is gather:
            assert counts == [(n - 1) * w] * n
        else:
            # Parts end on blocks, so together they cost no byte more than the whole, but a header each.
            assert sum(counts) - 2 * n * (n - 1) * HEADER_BYTES == 2 * (n - 1) * (w - HEADER_BYTES)
            # An island sends w + (n - 2) times its part; a part is within a grain of w / n: an element, or a block and its scale.
            grain_bytes = {"identity": 4, "bf16": 2, "int8:64": 66, "int4:32": 18}[codec]
            assert all(abs(count - 2 * (n - 1) * (HEADER_BYTES + (w - HEADER_BYTES) / n)) <= n * grain_bytes for count in counts)


ROUNDS = 50


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("codec", ["bf16", "int8:64", "int4:32"])
def test_error_feedback_conserves_at_sender_and_owner(codec: str, n: int) -> None:
    """sum sent + residual = sum of inputs, for every part that an island sends, and for the owner's second encoding."""
    layout = layout_of((5, 130, 64, 300))
    feedback = by_name(codec, error_feedback=True)
    paths = bind(all_to_all, feedback, layout, n)
    states = [p.init(CPU) for p in paths]
    cuts = layout.cuts(n, feedback.grain)
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    codecs = [feedback.bind(layout.part(p.start, p.stop)) for p in parts]
    g = torch.Generator().manual_seed(n)
    inputs = torch.zeros(n, layout.numel, dtype=torch.float64)
    by_sender, by_owner = torch.zeros_like(inputs), torch.zeros(layout.numel, dtype=torch.float64)
    drift = torch.rand(n, layout.numel, generator=g) * 0.1
    for _ in range(ROUNDS):
        xs = [(drift[i] + 0.9 * (torch.rand(layout.numel, generator=g) * 2 - 1)).clamp(-1, 1) for i in range(n)]
        outs, sent = exchange(paths, xs, states)
        inputs += torch.stack(xs).double()
        by_owner += outs[0].double()
        for s in sent:
            if s.phase == 0:
                # A code times a bf16 scale has at most 15 bits: decoding into zeros is exact.
                decoded = torch.zeros(parts[s.target].stop - parts[s.target].start)
                codecs[s.target].decode_add(s.wire, decoded, weight=1.0)
                by_sender[s.source, parts[s.target]] += decoded
    # |x| <= 1 and |residual| < 1, so each of the roundings in residual + x and residual - sent is below 2 u.
    bound = ROUNDS * 2 * 2 * U
    kept = torch.stack([torch.cat([states[i][f"to{j}.residual"] for j in range(n)]) for i in range(n)]).double()
    for i in range(n):
        for j in range(n):
            if i != j:
                gap = by_sender[i, parts[j]] + kept[i, parts[j]] - inputs[i, parts[j]]
                assert float(gap.abs().max()) <= bound
    # The owner's input is the mean of what the senders sent: mean(inputs) - mean(residuals). Its mean adds 3 n u 2 a round.
    owned = torch.cat([states[j]["owner.residual"] for j in range(n)]).double()
    gap = by_owner + owned - (inputs - kept).mean(dim=0)
    assert float(gap.abs().max()) <= 2 * bound + ROUNDS * 3 * n * U * 2
    # And the residuals are what one encoding loses, however many rounds there were.
    assert float(kept.abs().max()) <= error_of(codec, 2.0)
    assert float(owned.abs().max()) <= error_of(codec, 4.0)


def test_without_error_feedback_the_same_sums_drift_apart() -> None:
    layout = layout_of((130,))
    codec = by_name("int4:32", error_feedback=False)
    x = torch.rand(130, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(130, dtype=torch.float64)
    for _ in range(ROUNDS):
        outs, _ = exchange(bind(all_to_all, codec, layout, 2), [x, x], [{}, {}])
        total += outs[0].double()
    assert float((total - ROUNDS * x.double()).abs().max()) > 1.0


def test_random_rounding_of_sender_and_owner_cancels_over_rounds() -> None:
    """Both round by chance, each off by at most half a step in standard deviation: after T rounds of the same values an element's
    mean is off by at most sqrt(2 / 4 / T) steps (and the mean of magnitudes by no more, Jensen). If the owner drew the sender's
    bits again, 0.055 steps would stay for good."""
    rounds, layout = 800, layout_of((1024,))
    paths = bind(all_to_all, by_name("int4:1024:stochastic", error_feedback=False), layout, 2)
    xs = [torch.rand(layout.numel, generator=torch.Generator().manual_seed(node)) * 2 - 1 for node in range(2)]
    states = [p.init(CPU) for p in paths]
    total = torch.zeros(layout.numel, dtype=torch.float64)
    for _ in range(rounds):
        total += exchange(paths, xs, states)[0][0]
    off = (total / rounds - torch.stack(xs).double().mean(0)).abs().mean()
    assert float(off) <= (0.5 / rounds) ** 0.5 * 1.2 / 7, "a step is the largest over 7; 1.2 for the mean of 1,024 elements"

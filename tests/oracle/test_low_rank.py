"""Do products of two thin matrices bring the mean to every island, in equal bits, for the bytes they promise, and lose nothing?

The rendering of DiLoCo over PowerSGD below is float64, and projects by singular vectors: what a round sends depends on the space
that the columns of P span alone, not on how they were made orthonormal."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dtrain
from dtrain.bucket import Layout, Span
from dtrain.codec import State, by_name
from dtrain.connect import Connection, connect_local
from dtrain.errors import WireError
from dtrain.link import Link, Peers
from dtrain.low_rank import _needed, low_rank
from dtrain.matrices import check_rank, rank_of
from dtrain.plan.candidates import candidates
from dtrain.plan.sent import sent
from dtrain.recipes import resolve
from dtrain.reduce import BoundReduce
from dtrain.topology.static import complete
from dtrain.wire import HEADER_BYTES
from tests.islands import run_islands
from tests.oracle.test_reduce import CPU, U, exchange

SHAPES = {"bias": (5,), "tall": (40, 16), "gain": (130,), "wide": (20, 30)}
"""Two matrices, neither of whose factors has columns of whole blocks."""


def layout_of(shapes: dict[str, tuple[int, ...]]) -> Layout:
    spans, begin = [], 0
    for name, shape in shapes.items():
        spans.append(Span(name, shape, begin, begin, begin + math.prod(shape)))
        begin += math.prod(shape)
    return Layout(tuple(spans))


LAYOUT = layout_of(SHAPES)


def of_rank(rank: int | None) -> Callable[[Span], int]:
    """None: as many columns as the matrix has directions."""
    return lambda s: 0 if len(s.shape) < 2 else min(s.shape) if rank is None else rank


def bind(codec: str, rank: int | None, n: int, *, error_feedback: bool = True) -> list[BoundReduce]:
    plain = by_name(codec, error_feedback=False)
    path = low_rank(plain, of_rank(rank), feedback_decay=1.0 if error_feedback else None)
    return [path(LAYOUT, Peers(node, n)) for node in range(n)]


def drawn(n: int, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(LAYOUT.numel, generator=g) * 2 - 1 for _ in range(n)]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_with_all_directions_nothing_is_lost(n: int) -> None:
    """Errors of products of 40 terms of 1, and of a basis of 20 or 16 columns, are below 40 x 20 u in all."""
    paths = bind("identity", None, n)
    states = [p.init(CPU) for p in paths]
    for seed in range(3):
        xs = drawn(n, seed)
        outs, _ = exchange(paths, xs, states)
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert float((outs[0] - torch.stack(xs).mean(0)).abs().max()) < 1e-5 < 40 * 20 * U


@pytest.mark.parametrize("codec", ["identity", "bf16", "int4:64", "e3m0:32:stochastic"])
@pytest.mark.parametrize("n", [1, 3])
def test_what_is_not_sent_goes_out_later_and_all_end_with_the_same_bits(codec: str, n: int) -> None:
    """sum of results + mean residual = sum of mean inputs, whatever the codec loses of either factor. A round rounds the residual
    (below 16 in all) in three places and the result in n + 2, each sum of 4 products one more."""
    rounds, paths = 20, bind(codec, 4, n)
    states = [p.init(CPU) for p in paths]
    total, given = torch.zeros(LAYOUT.numel, dtype=torch.float64), torch.zeros(LAYOUT.numel, dtype=torch.float64)
    for seed in range(rounds):
        xs = drawn(n, seed)
        outs, _ = exchange(paths, xs, states)
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert all(torch.equal(states[0][key], state[key]) for state in states for key in state if key.startswith("warm"))
        total, given = total + outs[0], given + torch.stack(xs).double().mean(0)
    kept = torch.stack([state["residual"] for state in states]).double().mean(0)
    assert 1 < float(kept.abs().max()) < 16
    assert float((total + kept - given).abs().max()) <= rounds * (3 + n + 2 + 5) * 16 * U


def test_what_is_given_each_round_comes_out_of_a_rank_of_4() -> None:
    """Of a constant x the residual stays within what one round may leave, where without feedback as much is lost each round."""
    rounds = 60
    for feedback in (True, False):
        paths = bind("int4:64", 4, 2, error_feedback=feedback)
        states, xs = [p.init(CPU) for p in paths], drawn(2, 7)
        total = torch.zeros(LAYOUT.numel)
        for _ in range(rounds):
            total += exchange(paths, xs, states)[0][0]
        lost = float((total - rounds * torch.stack(xs).mean(0)).norm() / torch.stack(xs).mean(0).norm())
        assert (lost < 8) if feedback else (lost > rounds / 4)


def test_nothing_given_at_first_is_no_end() -> None:
    """Q becomes zero; any basis stands in for P's, by which Q starts anew. A matrix of rank 4 then goes in two rounds."""
    paths, g = bind("identity", 4, 2), torch.Generator().manual_seed(0)
    states, x = [p.init(CPU) for p in paths], torch.zeros(LAYOUT.numel)
    for _ in range(2):
        exchange(paths, [x, x], states)
    assert not states[0]["warm.tall"].any()
    for s in LAYOUT.spans:
        if len(s.shape) == 2:
            x[s.start : s.stop] = (torch.rand(s.shape[0], 4, generator=g) @ torch.rand(4, s.shape[1], generator=g)).flatten()
    came = [exchange(paths, [x * k, x * k], states)[0][0] for k in (1, 0, 0)]
    assert float((came[0] - x).abs().max()) > 0.1
    assert float((sum(came, torch.zeros_like(x)) - x).abs().max()) < 1e-5


def test_of_what_is_not_finite_all_directions_are_needed() -> None:
    q = torch.ones(3, 5)
    assert _needed(q, 5) == 1
    q[1, 2] = float("nan")
    assert _needed(q, 5) == 3


@pytest.mark.parametrize(
    ("directions", "rank", "power", "want"), [(40, 10, 0.0, 38), (20, 10, -1.0, 19), (40, 10, -4.0, 2), (10, 10, 0.0, 10)]
)
def test_what_is_left_behind_counts_as_if_it_were_as_large_as_the_least_that_came(
    directions: int, rank: int, power: float, want: int
) -> None:
    """Squared sizes i^power. Flat ones need 95 % of all directions, though what came would be held by 95 % of its own."""
    sizes = [i**power for i in range(1, rank + 1)]
    sizes += [sizes[-1]] * (directions - rank)
    assert want == next(n for n in range(1, directions + 1) if sum(sizes[:n]) >= 0.95 * sum(sizes))
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    q = turn @ torch.diag(torch.tensor(sizes[:rank], dtype=torch.float64).sqrt()) @ torch.eye(rank, 12, dtype=torch.float64)
    assert _needed(q, directions) == want


def test_a_rank_that_fell_rises_again_to_what_it_was_at_first() -> None:
    """Rounds of one direction, then of flat ones: 24, down to the fewest, and back."""
    m, most = 48, 24
    path = low_rank(by_name("identity", error_feedback=False), of_rank(most), feedback_decay=1.0, adapts=True)
    bound = path(Layout((Span("w", (m, m), 0, 0, m * m),)), Peers(0, 1))
    state, flat, ranks = bound.init(CPU), torch.eye(m), list[int]()
    for t in range(30):
        x = (torch.diag(flat[0]) if t < 12 else flat).flatten()
        exchange([bound], [x], [state])
        ranks.append(int(state["ranks"][0]))
    assert ranks[:4] == [24] * 4
    assert ranks[11] == 8
    assert ranks[-1] == 24


def test_a_rank_that_adapts_falls_to_what_is_needed_and_is_resumed_so() -> None:
    """Of two matrices by 12 columns one has two directions, and goes by 8 after the first rounds; the other has all, anew each
    round. What is not sent still goes out later, and all islands, and those that go on from a saved state, do as each other."""
    plain, rounds, g = by_name("int8:32", error_feedback=False), 9, torch.Generator().manual_seed(1)
    path = low_rank(plain, of_rank(12), feedback_decay=1.0, adapts=True)
    paths = [path(LAYOUT, Peers(node, 2)) for node in range(2)]
    states = [p.init(CPU) for p in paths]
    tall = torch.rand(40, 2, generator=g) @ torch.rand(2, 16, generator=g)
    total, given, lengths = torch.zeros(LAYOUT.numel), torch.zeros(LAYOUT.numel), []
    again: list[Tensor] = []
    for seed in range(rounds):
        xs = drawn(2, seed)
        for x in xs:
            x[5 : 5 + 640] = tall.flatten()
        if seed == 7:
            fresh = [path(LAYOUT, Peers(node, 2)) for node in range(2)]
            again = exchange(fresh, xs, [{key: value.clone() for key, value in state.items()} for state in states])[0]
        outs, wires = exchange(paths, xs, states)
        assert torch.equal(outs[0], outs[1])
        assert seed < 7 or torch.equal(outs[0], again[0]) == (seed == 7)
        lengths.append([wire.wire.numel() for wire in wires if wire.source == 0])
        total, given = total + outs[0], given + sum(xs, torch.zeros_like(total)) / 2
    assert states[0]["ranks"].tolist() == states[1]["ranks"].tolist() == [0, 8, 0, 12]
    kept = (states[0]["residual"] + states[1]["residual"]) / 2
    assert float((total + kept - given).abs().max()) <= rounds * 3 * 14 * 16 * U
    # Four columns of 40 numbers and two scales each, and of 16 and one; and what island 0 says of two matrices.
    assert lengths[0][2] == HEADER_BYTES + 4 * 2
    assert lengths == 5 * [lengths[0]] + 4 * [[lengths[0][0] - 4 * 44, lengths[0][1] - 4 * 18, lengths[0][2]]]


@pytest.mark.parametrize("codec", ["identity", "int4:64"])
def test_bytes_of_both_wires(codec: str) -> None:
    """r (m + k) numbers of each matrix; columns of 16 to 40 numbers have a scale each, of 2 bytes."""
    n, r = 3, 4
    _, wires = exchange(bind(codec, r, n), drawn(n, 0), [p.init(CPU) for p in bind(codec, r, n)])
    first, second = 135 + r * (40 + 20), r * (16 + 30)
    want = [HEADER_BYTES + 4 * first, HEADER_BYTES + 4 * second]
    if codec != "identity":  # a bias of 5, a gain in 3 blocks
        codes = (3 + 65 + r * (20 + 10), r * (8 + 15))
        want = [HEADER_BYTES + 2 * (1 + 3 + 2 * r) + codes[0], HEADER_BYTES + 2 * 2 * r + codes[1]]
    assert [{w.wire.numel() for w in wires if w.phase == phase} for phase in (0, 1)] == [{want[0]}, {want[1]}]
    assert len(wires) == 2 * n * (n - 1)


def test_the_papers_setting_is_a_thousand_times_fewer_bytes() -> None:
    """Rank 2048 of 8192 x 8192 halves it, and 4 bits are a quarter of fp16 but for a scale of 2 bytes in 64; every 125 steps."""
    shapes, fp16 = {"w": (8192, 8192)}, 2 * 8192**2
    half, coded = (
        sent(resolve("dilocox", {"rank": 2048, "codec": codec}, 2), shapes, 2).mean_round_bytes - 2 * HEADER_BYTES
        for codec in ("bf16", "int4:64")
    )
    assert half == fp16 / 2
    assert fp16 / (coded / 125) == 1000 * 4 / 4.25


def test_wires_that_arrive_are_checked_in_both_phases() -> None:
    paths = bind("int4:64", 4, 2)
    links = [Link(node, 2, complete(0, node, 2)) for node in range(2)]
    runs = [p.run(x, x.clone(), p.init(CPU), link) for p, x, link in zip(paths, drawn(2, 0), links, strict=True)]
    for _ in range(2):
        for link, run in zip(links, runs, strict=True):
            link.new_phase()
            next(run)
        (_, wire), check = links[1].outbox[0], links[0].checks[1]
        check(wire)
        broken = wire.clone()
        broken[-1] ^= 1
        for other, said in ((broken, "checksum"), (wire[:-1], "bytes")):
            with pytest.raises(WireError, match=said):
                check(other)
        for link, peer in zip(links, reversed(links), strict=True):
            link.inbox = {peer.node: peer.outbox[0][1].clone()}
    assert [next(run, "end") for run in runs] == ["end"] * 2


@pytest.mark.parametrize(
    ("name", "shape", "rank", "sent_by"),
    [
        ("blocks.0.qkv.weight", (192, 64), 32, 32),
        ("blocks.0.out.weight", (64, 64), 32, 0),  # 32 (64 + 64) is no less than 64 x 64
        ("blocks.0.out.weight", (64, 64), 31, 31),
        ("blocks.0.up.weight", (4, 1000), 4, 0),
        ("blocks.0.up.weight", (4, 1000), 3, 3),
        ("norm.weight", (64,), 2, 0),
        ("conv.weight", (64, 64, 3), 2, 0),
        ("embedding.weight", (256, 64), 2, 0),
        ("model.embed_tokens.weight", (256, 64), 2, 0),
        ("transformer.wte.weight", (256, 64), 2, 0),
        ("head.weight", (256, 64), 2, 0),
        ("lm_head.weight", (256, 64), 2, 0),
        ("attention.heads.weight", (256, 64), 2, 2),
    ],
)
def test_which_parameters_are_sent_so(name: str, shape: tuple[int, ...], rank: int, sent_by: int) -> None:
    assert rank_of(name, shape, rank) == sent_by


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"w": (37, 11), "v": (130,), "u": (30, 2)}, "sync.rank = 9: no matrix .* use sync.rank = 8 or less, or sync.reduce"),
        ({"v": (130,), "head.weight": (64, 64)}, "sync.rank = 9: the model has no matrix but embeddings and heads"),
    ],
)
def test_a_rank_for_no_matrix_is_refused(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_rank(shapes, 9)
    assert "dilocox" not in {r.name for r in candidates(resolve(None, {}, 2), 2, shapes=shapes)}


def test_a_rank_that_a_matrix_has_is_not_refused() -> None:
    check_rank({"w": (37, 11), "v": (130,)}, 8)
    assert "dilocox" in {r.name for r in candidates(resolve(None, {}, 2), 2, shapes={"w": (64, 256)})}


def test_join_refuses_a_rank_for_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"sync\.rank = 9: no matrix of the model .* use sync\.rank = 8 or less"):
        dtrain.join(nn.Linear(11, 37), [], recipe="dilocox", rank=9, link=connect_local(1)[0])


LR, EVERY, ROUNDS, RANK = 0.125, 4, 5, 3
OUTER = {"outer_lr": 0.4, "outer_momentum": 0.6}


class Problem(NamedTuple):
    """Of ``tall`` and ``gain``, flat: x starts at ``start``; island i has the loss sum a_i / 2 (x - c_i)^2."""

    start: Tensor
    a: Tensor
    c: Tensor


M, K, WIDTH = 40, 16, 40 * 16 + 130


def problem(n: int) -> Problem:
    g = torch.Generator().manual_seed(n)
    return Problem(*(torch.rand(*size, WIDTH, generator=g) + 0.5 for size in ((), (n,), (n,))))


class Model(nn.Module):
    def __init__(self, p: Problem, node: int) -> None:
        super().__init__()
        self.tall = nn.Parameter(p.start[: M * K].view(M, K).clone())
        self.gain = nn.Parameter(p.start[M * K :].clone())
        self._a, self._c = p.a[node], p.c[node]

    def flat(self) -> Tensor:
        return torch.cat((self.tall.flatten(), self.gain))


def islands_of_dtrain(p: Problem, n: int, **axes: Any) -> tuple[Tensor, State]:
    """(rounds, n, width): x after each round's step; and the state that island 0 began with."""

    def island(connection: Connection) -> tuple[Tensor, State]:
        model, seen = Model(p, connection.node), []
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="dilocox", every=EVERY, rank=RANK, link=connection, **OUTER, **axes) as sync:
            began = {key: value.clone() for key, value in sync.state_dict().items()}
            for step in range(ROUNDS * EVERY):
                optimizer.zero_grad()
                (0.5 * model._a * (model.flat() - model._c).square()).sum().backward()
                optimizer.step()
                if (step + 1) % EVERY == 0:
                    seen.append(model.flat().detach().clone())
        return torch.stack(seen), began

    islands = run_islands(n, island)
    return torch.stack([x for x, _ in islands], dim=1), islands[0][1]


def reduced(d: list[Tensor], e: list[Tensor], q: Tensor) -> tuple[Tensor, list[Tensor], Tensor, float]:
    """PowerSGD's mean of d, what each island keeps of its matrix, the space for the next round; and the condition of P."""
    full = [d_i[: M * K].view(M, K) + e_i for d_i, e_i in zip(d, e, strict=True)]
    left, sizes, _ = torch.linalg.svd(torch.stack([m @ q for m in full]).mean(0), full_matrices=False)
    q_of = [m.T @ left for m in full]
    q = torch.stack(q_of).mean(0)
    e = [m - left @ q_i.T for m, q_i in zip(full, q_of, strict=True)]
    return torch.cat(((left @ q.T).flatten(), torch.stack(d).mean(0)[M * K :])), e, q, float(sizes[0] / sizes[-1])


def paper(p: Problem, n: int, q: Tensor, landing: str) -> tuple[Tensor, float]:
    """Nesterov on PowerSGD's mean, of ``late`` a round later; and the worst condition of a P. q: (k, r)."""
    p, lr, mu = Problem(*(v.double() for v in p)), OUTER["outer_lr"], OUTER["outer_momentum"]
    thetas, u = [p.start.clone() for _ in range(n)], [torch.zeros_like(p.start) for _ in range(n)]
    e, late = [torch.zeros(M, K, dtype=torch.float64)] * n, [torch.zeros_like(p.start)] * n
    x, sent, delta, worst, seen = thetas, thetas, torch.zeros_like(p.start), 0.0, []
    for t in range(ROUNDS):
        for _ in range(EVERY):
            x = [x_i - LR * a * (x_i - c) for x_i, a, c in zip(x, p.a, p.c, strict=True)]
        if landing == "late" and t > 0:
            u = [mu * u_i + delta for u_i in u]
            thetas = [theta - lr * (delta + mu * u_i) for theta, u_i in zip(thetas, u, strict=True)]
            x = [theta + x_i - sent_i for theta, x_i, sent_i in zip(thetas, x, sent, strict=True)]
        d, sent = [theta - x_i for theta, x_i in zip(thetas, x, strict=True)], x
        delta, e, q, condition = reduced(d, e, q)
        worst = max(worst, condition)
        if landing != "late":
            g = [late_i + d_i / n if landing == "eager" else delta for late_i, d_i in zip(late, d, strict=True)]
            late = [delta - d_i / n for d_i in d]
            u = [mu * u_i + g_i for u_i, g_i in zip(u, g, strict=True)]
            x = thetas = [theta - lr * (g_i + mu * u_i) for theta, g_i, u_i in zip(thetas, g, u, strict=True)]
        seen.append(torch.stack(x))
    return torch.stack(seen), worst


LANDINGS: dict[str, dict[str, Any]] = {
    "eager": {"landing": "eager"}, "in time": {"landing": "keep", "delay": 0}, "late": {},
}  # fmt: skip
"""``late`` is what the recipe does where nothing is said."""


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("landing", LANDINGS)
def test_it_is_its_paper(n: int, landing: str) -> None:
    """A product of 40 terms of at most 2 rounds 80 u; the space that P spans turns by as much times P's condition, and what is
    sent of M (below 2 x 40 in norm) with it. Five rounds, each of which may double what came before."""
    p = problem(n)
    got, began = islands_of_dtrain(p, n, codec="identity", **LANDINGS[landing])
    q = next(value for key, value in began.items() if key.endswith("warm.tall")).T.double()
    want, worst = paper(p, n, q, landing)
    limit = 2**ROUNDS * worst * 80 * U * 80
    far = float((got.double() - want).abs().max())
    assert far <= limit
    for other in (paper(p, n, q.roll(1, 0), landing)[0], paper(p, n, q[:, :-1], landing)[0]):
        assert float((other - want).abs().max()) > 100 * max(far, 1e-6), "another space is another result"


@pytest.mark.parametrize("error_feedback", [True, False])
def test_islands_that_wait_for_a_round_hold_the_same_bits_after_it(error_feedback: bool) -> None:
    """Buckets of 256 numbers would cut the matrix, which stays whole."""
    got, _ = islands_of_dtrain(problem(3), 3, delay=0, landing="keep", error_feedback=error_feedback, bucket_bytes=1024)
    assert all(torch.equal(got[:, 0], got[:, node]) for node in range(3))

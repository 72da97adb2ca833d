"""Are products that islands must agree on exact, and is none left to a library's order or a user's precision?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.bucket import whole
from dtrain.codec import plain
from dtrain.link import Link, Peers
from dtrain.low_rank import low_rank
from dtrain.same_products import exact_product, orthonormal, product, root, subtract_product
from dtrain.topology import Round

R, M, K = 12, 75, 41


def drawn(*shape: int, salt: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(salt))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def halved(x: list[float]) -> float:
    """The first half, the longer one, plus the second."""
    while len(x) > 1:
        half = (len(x) + 1) // 2
        x = [a + b for a, b in zip(x, x[half:], strict=False)] + x[len(x) - half : half]
    return x[0]


def by_hand(p: Tensor) -> list[list[float]]:
    """Gram-Schmidt of Python's floats, which are IEEE 754's doubles."""
    rows = p.double().tolist()
    for j, row in enumerate(rows):
        length = math.sqrt(halved([v * v for v in row]))
        row[:] = [v / length for v in row]
        for other in rows[j + 1 :]:
            share = halved([v * w for v, w in zip(other, row, strict=True)])
            other[:] = [w - share * v for v, w in zip(row, other, strict=True)]
    exponent = math.frexp(max(abs(v) for row in rows for v in row))[1]
    return [[round(math.ldexp(v, 24 - exponent)) * math.ldexp(1.0, exponent - 24) for v in row] for row in rows]


def test_a_basis_has_the_bits_of_plain_arithmetic_and_is_a_qr() -> None:
    p = drawn(R, M) * torch.logspace(0, -4, R)[:, None]
    found = orthonormal(p)
    assert found.tolist() == by_hand(p)
    basis, weights = np.linalg.qr(p.double().numpy().T)
    # Errors of the solver are a condition number of 1e4 x 1e-16; to a multiple of 2^-24 it rounds by as much.
    assert np.abs(found.numpy() - (basis * np.sign(np.diag(weights))).T).max() < 2.0**-24


def test_a_root_is_the_nearest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As numpy's is, by the processor's own instruction; of torch's with MKL one of 70 is its neighbour, and here every one."""
    monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.nextafter(x**0.5, torch.full_like(x, 2)))
    x = torch.rand(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(root(x).numpy(), np.sqrt(x.numpy()))


@pytest.mark.parametrize("directions", [0, 1, 5])
def test_where_directions_are_missing_others_stand_in(directions: int) -> None:
    p = drawn(R, directions) @ drawn(directions, M, salt=1)
    found = orthonormal(p).double()
    assert (found @ found.T - torch.eye(R)).abs().max() < M * 2.0**-24
    left = p.double() - p.double() @ found[:directions].T @ found[:directions]
    assert left.abs().max() < 1e-5, "the first span what there is"
    assert torch.equal(found, orthonormal(p).double())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_a_product_that_all_reckon_is_exact(scale: float) -> None:
    p, q = orthonormal(drawn(R, M)), scale * drawn(R, K, salt=1) * torch.logspace(0, -6, R)[:, None]
    out, turned = torch.empty(M, K), torch.empty(M, K)
    exact_product(p, q, out)
    p_unit, unit = (math.ldexp(1.0, math.frexp(float(x.abs().max()))[1] - bits) for x, bits in ((p, 24), (q, 22)))
    whole_p, whole_q = ([[round(v / size) for v in row] for row in x.tolist()] for x, size in ((p, p_unit), (q, unit)))
    for i, j in ((0, 0), (17, 40), (74, 3)):
        total = sum(whole_p[k][i] * whole_q[k][j] for k in range(R))
        assert float(out[i, j]) == float(np.float32(total * (unit * p_unit)))
    order = torch.randperm(R, generator=torch.Generator().manual_seed(3))
    exact_product(p[order], q[order], turned)
    assert torch.equal(out, turned)
    want = p.double().T @ q.double()
    assert (out.double() - want).abs().max() <= 0.5 * unit * float(p.abs().sum(0).max()) + 2.0**-24 * float(want.abs().max())


def test_an_islands_own_products_are_rounded_once() -> None:
    a, b, p, q = drawn(R, M), drawn(M, K, salt=1), drawn(R, M, salt=2), drawn(R, K, salt=3)
    out, left = torch.empty(R, K), drawn(M, K, salt=4)
    want, less = (a.double() @ b.double()).float(), (left.double() - p.double().T @ q.double()).float()
    product(a, b, out)
    subtract_product(p, q, left)
    for found, exact in ((out, want), (left, less)):
        assert (found - exact).abs().max() <= 2.0**-23 * exact.abs().max()
        assert (found == exact).float().mean() > 0.99


class Watch(TorchDispatchMode):
    """Which products are of which numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "dot", "mv", "linalg_qr"):
            self.seen.add((name, args[0].dtype))
        return func(*args, **(kwargs or {}))


def landed() -> tuple[Tensor, Tensor]:
    """Two rounds of an island that is alone: what lands, and its residual."""
    path = low_rank(plain("int4:32"), lambda s: 4, feedback_decay=1.0)(whole("w", drawn(64, 48)), Peers(0, 1))
    state, out = path.init(torch.device("cpu")), torch.empty(64 * 48)
    for index in range(2):
        for _ in path.run(drawn(64 * 48, salt=index), out, state, Link(0, 1, Round(1.0, (), ()), index)):
            pass
    return out, state["residual"]


def test_no_product_is_of_fp32_so_that_no_setting_changes_it(threads: None) -> None:
    with Watch() as watch:
        found = landed()
    assert {dtype for _, dtype in watch.seen} == {torch.float64}
    before = torch.get_float32_matmul_precision()
    for precision, count in (("high", 1), ("medium", 2), ("highest", 2)):
        torch.set_num_threads(count)
        torch.set_float32_matmul_precision(precision)
        try:
            again = landed()
        finally:
            torch.set_float32_matmul_precision(before)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

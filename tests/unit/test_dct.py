"""Is the transform orthonormal and lossless, are the largest coefficients kept, and is what is no wire of it refused?"""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from torch import Tensor

from dtrain.bucket import Bucket, Layout, Span, flatten, make_buckets, whole
from dtrain.codec import BoundCodec, by_name
from dtrain.dct import matrix
from dtrain.errors import NonFinite, WireError
from dtrain.wire import HEADER_BYTES

CPU = torch.device("cpu")
U = 2.0**-24


def bind(layout: Layout, name: str) -> BoundCodec:
    return by_name(name, error_feedback=False).bind(layout)


def encode(bound: BoundCodec, x: Tensor) -> Tensor:
    wire = bound.new_wire(CPU)
    wire[HEADER_BYTES:] = 0xA5  # whatever was there must not show through
    bound.encode(x, wire, {})
    bound.check(wire)
    return wire


def decode(bound: BoundCodec, wire: Tensor, numel: int) -> Tensor:
    y = torch.zeros(numel)
    bound.decode_add(wire, y, weight=1.0)
    return y


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    spans, start = [], 0
    for k, shape in enumerate(shapes):
        n = math.prod(shape)
        spans.append(Span(f"p{k}", shape, start, start, start + n))
        start += n
    return Layout(tuple(spans))


def normal(numel: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 37, 64])
def test_the_matrix_is_orthonormal_and_the_dct(n: int) -> None:
    d = matrix(n, CPU)
    torch.testing.assert_close(d @ d.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    for k in range(n):
        for i in (0, n // 2, n - 1):
            want = math.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt((1 if k == 0 else 2) / n)
            assert float(d[k, i]) == pytest.approx(want, abs=1e-14)


SHAPES = ((5,), (64, 64), (130,), (128, 192), (65, 70), (3, 20, 100), (1, 64), (200, 1))


@pytest.mark.parametrize("chunk", [8, 64])
def test_with_all_coefficients_nothing_is_lost(chunk: int) -> None:
    """But the rounding of a coefficient to fp32, and of what comes back: |error| <= u |c| + u |x| in the 2-norm of a chunk, which
    the transform keeps."""
    layout = layout_of(*SHAPES)
    x = normal(layout.numel)
    bound = bind(layout, f"dct:{chunk**2}/{chunk}")
    y = decode(bound, encode(bound, x), layout.numel)
    assert float((y - x).abs().max()) <= 2 * U * chunk * float(x.abs().max())


def chunks_of(shape: tuple[int, ...], side: int) -> list[tuple[int, int]]:
    def cut(n: int) -> list[int]:
        return [min(side, n - k) for k in range(0, n, side)]

    columns = shape[-1]
    rows = math.prod(shape) // columns
    return [(a, b) for a in cut(rows) for b in cut(columns)]


@pytest.mark.parametrize(("k", "side"), [(1, 8), (32, 64), (31, 64), (4096, 64)])
def test_wire_bytes_are_what_the_format_says(k: int, side: int) -> None:
    """A value of 4 bytes and an index of 12 bits, min(K, a b) of a chunk."""
    for shapes in (*((shape,) for shape in SHAPES), SHAPES):
        kept = sum(min(k, a * b) for shape in shapes for a, b in chunks_of(shape, side))
        assert bind(layout_of(*shapes), f"dct:{k}/{side}").wire_bytes == HEADER_BYTES + 4 * kept + 3 * math.ceil(kept / 2)


def test_the_largest_coefficients_of_each_chunk_are_kept() -> None:
    """Beside the double sum itself, chunk by chunk, for a matrix that has all four sorts of chunks."""
    rows, columns, k, side = 20, 11, 5, 8
    x = normal(rows * columns)
    bound = bind(layout_of((rows, columns)), f"dct:{k}/{side}")
    got = decode(bound, encode(bound, x), rows * columns).view(rows, columns)
    want, m = torch.zeros(rows, columns, dtype=torch.float64), x.view(rows, columns).double()
    for top in range(0, rows, side):
        for left in range(0, columns, side):
            part = m[top : top + side, left : left + side]
            a, b = part.shape
            basis = torch.einsum("ki,lj->klij", matrix(a, CPU), matrix(b, CPU)).reshape(a * b, a, b)
            c = torch.einsum("pij,ij->p", basis, part)
            best = c.abs().topk(min(k, a * b)).indices
            want[top : top + side, left : left + side] = torch.einsum("p,pij->ij", c[best], basis[best])
    assert float((got - want).abs().max()) <= 4 * U * side * float(x.abs().max())
    assert float((got - m).abs().max()) > 0.1


def test_a_cosine_needs_one_number() -> None:
    """As DeMo has it for a matrix: the same for all squares of a row and column of them."""
    column = (math.pi / 128 * (2 * torch.arange(64.0) + 1) * 3).cos()
    x = torch.outer(column, torch.ones(64)).repeat(2, 3)
    bound = bind(layout_of((128, 192)), "dct:1/64")
    y = decode(bound, encode(bound, x.reshape(-1)), x.numel()).view(128, 192)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    assert bound.wire_bytes == HEADER_BYTES + 6 * 4 + 9


def buckets_of(shapes: tuple[tuple[int, ...], ...], bucket_bytes: int) -> list[Bucket]:
    flat = flatten((f"p{k}", torch.nn.Parameter(torch.zeros(shape))) for k, shape in enumerate(shapes))
    return make_buckets(flat, num_fragments=1, bucket_bytes=bucket_bytes, num_ranks=1, with_grad=False)


def test_where_a_bucket_cuts_a_matrix_whole_rows_stay_squares() -> None:
    """4,096 elements of rows of 100: 40 rows and 96 of the 41st; then the 4 that are left of it, 40 rows, and 92."""
    parts = [b.layout for b in buckets_of(((100, 100),), 4 * 4096)]
    assert [(s.offset, s.numel) for part in parts for s in part.spans] == [(0, 4096), (4096, 4096), (8192, 1808)]
    sizes = [
        [40 * 64, 40 * 36, 64, 32],
        [4, 40 * 64, 40 * 36, 64, 28],
        [8, 18 * 64, 18 * 36],
    ]
    x = normal(10_000)
    for part, chunks in zip(parts, sizes, strict=True):
        kept = sum(min(9, n) for n in chunks)
        assert bind(part, "dct:9/64").wire_bytes == HEADER_BYTES + 4 * kept + 3 * math.ceil(kept / 2)
        own = x[: part.numel]
        bound = bind(part, "dct:4096/64")
        torch.testing.assert_close(decode(bound, encode(bound, own), part.numel), own, rtol=0, atol=2 * U * 64 * 5)


def test_a_matrix_within_a_bucket_is_coded_as_if_it_were_alone() -> None:
    layout, name = layout_of((70, 70), (9,), (64, 130)), "dct:7/64"
    x = normal(layout.numel)
    bound = bind(layout, name)
    together = decode(bound, encode(bound, x), layout.numel)
    for s in layout.spans:
        alone, part = bind(layout_of(s.shape), name), x[s.start : s.stop]
        assert torch.equal(together[s.start : s.stop], decode(alone, encode(alone, part), s.numel))


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_error_feedback_keeps_what_it_lost(decay: float) -> None:
    """sum sent + e_T = sum of inputs - (1 - beta) sum_{t < T} e_t; a round rounds beta e, its sum with x, and what is left."""
    rounds, most, layout = 10, 0.0, layout_of((20, 30), (33,))
    bound = by_name("dct:5/8", error_feedback=True, feedback_decay=decay).bind(layout)
    state, wire = bound.init(CPU), bound.new_wire(CPU)
    kept = torch.zeros(layout.numel, dtype=torch.float64)
    for seed in range(rounds):
        kept -= (1 - decay) * state["residual"].double()
        x = 0.3 + normal(layout.numel, seed)
        bound.encode(x, wire, state)
        y = decode(bound, wire, layout.numel)
        kept += x.double() - y.double()
        most = max(most, *(float(v.abs().max()) for v in (x, y, state["residual"] + y)))
    assert float((state["residual"] - kept).abs().max()) <= rounds * 3 * U * most
    assert float(state["residual"].abs().max()) > 0.5


def sealed(wire: Tensor, values: dict[int, int]) -> Tensor:
    """A wire whose sender made it so, its checksum and all."""
    bad = wire.clone()
    for at, value in values.items():
        bad[HEADER_BYTES + at] = value
    said = zlib.crc32(bytes(bad[HEADER_BYTES:].tolist()), zlib.crc32(bytes(bad[:24].tolist())))
    bad[24:HEADER_BYTES] = torch.tensor(list(said.to_bytes(8, "little")), dtype=torch.uint8)
    return bad


def test_what_is_no_wire_of_it_is_refused() -> None:
    """Two values, 0.0 and 1.0 say, at 8 bytes; then two indices in three."""
    x = normal(50)
    bound = bind(whole("x", x), "dct:2/64")
    wire = encode(bound, x)
    assert wire.numel() == HEADER_BYTES + 11
    for at in (0, 6, 8, 12, 16, 24, HEADER_BYTES + 1, HEADER_BYTES + 9):
        bad = wire.clone()
        bad[at] ^= 1
        with pytest.raises(WireError, match="header is of another codec" if at < 24 else "checksum does not fit"):
            bound.check(bad)
    with pytest.raises(WireError, match=f"a wire of {wire.numel() - 1} bytes, {wire.numel()} were agreed"):
        bound.check(wire[:-1])
    with pytest.raises(WireError, match="header is of another codec"):
        bind(layout_of((5, 10)), "dct:2/64").check(wire)
    bound.check(sealed(wire, {8: 7, 9: 0, 10: 1}))  # 7 and 16
    indices = ({8: 16, 9: 0, 10: 1}, {8: 17, 9: 0, 10: 1}, {8: 7, 9: 2 << 4, 10: 3})  # the same twice; falling; 50 of 50
    for values in (*indices, {2: 0x80, 3: 0x7F}):  # an inf
        with pytest.raises(WireError, match="a wire that codec dct:2/64 makes inf or NaN of"):
            bound.check(sealed(wire, values))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_never_encoded(bad: float) -> None:
    x = torch.ones(600)
    x[-1] = bad
    for feedback in (False, True):
        bound = by_name("dct:2/8", error_feedback=feedback).bind(whole("x", x))
        with pytest.raises(NonFinite, match="inf or NaN"):
            bound.encode(x, bound.new_wire(CPU), bound.init(CPU))


@pytest.mark.parametrize("name", ["dct:0/64", "dct:32", "dct:32/128", "dct:65/8", "dct:32/64:8", "dct:4/12", "dct:"])
def test_a_name_that_is_none_is_one_clear_line(name: str) -> None:
    with pytest.raises(ValueError, match=r'write "dct:K/CHUNK"') as caught:
        by_name(name, error_feedback=False)
    assert "\n" not in str(caught.value)

"""Does codebook8 lose no more than its bins are wide, keep a block's sum, and refuse what is no code of it?"""

from __future__ import annotations

import math
import zlib

import pytest
import torch
from torch import Tensor

from dtrain.bucket import Layout, Span, whole
from dtrain.codec import BoundCodec, by_name
from dtrain.errors import NonFinite, WireError
from dtrain.wire import HEADER_BYTES

CPU = torch.device("cpu")
U = 2.0**-24
BF16_ROUNDING = 2.0**-8 / (1 + 2.0**-8)
"""Of a value, at most: 8 significant bits, to the nearest."""
NAME = "codebook8:512"


def layout_of(*numels: int) -> Layout:
    spans, start = [], 0
    for k, n in enumerate(numels):
        spans.append(Span(f"p{k}", (n,), start, start, start + n))
        start += n
    return Layout(tuple(spans))


def bind(layout: Layout, name: str = NAME) -> BoundCodec:
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


def test_wire_bytes_are_what_the_format_says() -> None:
    """A block: a mean of 4 bytes, min(256, n) of 2, n codes."""
    for numels in ((1,), (255,), (256,), (257,), (512,), (513, 1, 1300), (512, 512, 3, 1024)):
        blocks = [min(512, n - k) for n in numels for k in range(0, n, 512)]
        want = sum(4 + 2 * min(256, n) + n for n in blocks)
        assert bind(layout_of(*numels)).wire_bytes == HEADER_BYTES + want
    assert bind(layout_of(4096 * 9), "codebook8").wire_bytes == HEADER_BYTES + 9 * (4 + 512 + 4096)
    assert all(bind(layout_of(n)).wire_bytes - HEADER_BYTES <= 4 + 4 * n for n in range(1, 600)), "no more than a mean above fp32"


@pytest.mark.parametrize("numel", [1, 2, 3, 100, 255, 256, 257, 511, 512, 1300])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_a_value_within_6_sigmas_is_off_by_a_bin_at_most(numel: int, mean: float) -> None:
    """It and the mean of its bin lie in one bin. Then bf16 rounds that mean, 6 sigma at most; and fp32 rounds the block's mean
    and distances from it, of values up to M: 4 u M, and bins' edges, by less than a thousandth of a bin."""
    x = mean + torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    bound = bind(whole("x", x))
    off = (decode(bound, encode(bound, x), numel) - x).double().abs()
    for k in range(0, numel, 512):
        block = x[k : k + 512].double()
        sigma = float(block.std(unbiased=False))
        near = (block - block.mean()).abs() <= 5.9 * sigma
        bound_of_bin = 1.001 * 12 * sigma / 256 + 6 * sigma * BF16_ROUNDING + 4 * U * float(block.abs().max())
        assert float(off[k : k + 512][near].max()) <= bound_of_bin
    if numel == 1300:
        assert float(off.max()) > 0.2 * 12 / 256, "it does lose something"


def test_a_code_is_the_mean_of_its_bin_and_clips_no_sum() -> None:
    """One value far outside alone in its bin comes back; two there come back as their mean; and so the block's sum is kept."""
    x = torch.randn(512, generator=torch.Generator().manual_seed(1)).clamp(-2, 2)
    for far in ((60.0,), (60.0, 80.0), (60.0, -90.0, 80.0)):
        y = x.clone()
        y[: len(far)] = torch.tensor(far)
        bound = bind(whole("x", y))
        got = decode(bound, encode(bound, y), 512)
        high = [v for v in far if v > 0]
        for k, value in enumerate(far):
            want = sum(high) / len(high) if value > 0 else value
            assert float(got[k]) == pytest.approx(want, rel=1.1 * BF16_ROUNDING)
        # Each of the 256 means is rounded by bf16, of magnitudes that sum up to |y|_1.
        assert abs(float((got - y).double().sum())) <= 1.1 * BF16_ROUNDING * float((y - y.mean()).abs().sum())


def test_256_bins_are_all_used_and_as_wide_as_is_said() -> None:
    """4,096 values evenly over +-6 sigmas cannot be (sigma would be larger), but one block's bins can be seen: values that are w
    apart get codes one apart, and those beyond 6 sigmas the outermost."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2))
    x[:40] = torch.linspace(-40.0, 40.0, 40)
    bound = bind(whole("x", x), "codebook8:4096")
    wire = encode(bound, x)
    codes = wire[HEADER_BYTES + 4 + 512 :].double()
    mean, sigma = float(x.double().mean()), float(x.double().std(unbiased=False))
    bins = ((x.double() - mean) / (12 * sigma / 256)).floor().clamp(-128, 127)
    there = bins.unique()
    assert {float(there.min()), float(there.max())} == {-128.0, 127.0}
    places = torch.searchsorted(there, bins).double()
    assert int((codes != places).sum()) <= 2, "a value at an edge may go to either side in fp32"


@pytest.mark.parametrize("value", [0.0, -0.0, 3.5, 1e-42, 1e-38, 1e30, -3e37, 3e38])
def test_equal_values_come_back(value: float) -> None:
    x = torch.full((700,), value)
    bound = bind(whole("x", x))
    torch.testing.assert_close(decode(bound, encode(bound, x), 700), x, rtol=2.0**-20, atol=1e-44)


def test_large_and_tiny_values_are_coded_as_ordinary_ones_are() -> None:
    """A power of two scales all but what is rounded near the ends of fp32's range."""
    x = torch.randn(512, generator=torch.Generator().manual_seed(3))
    bound = bind(whole("x", x))
    want = decode(bound, encode(bound, x), 512)
    for scale in (2.0**-100, 2.0**60, 2.0**110):
        torch.testing.assert_close(decode(bound, encode(bound, scale * x), 512) / scale, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("numels", [(1, 1), (63, 65), (512, 512, 10), (1300, 64, 1, 7), (3, 1024, 5)])
def test_a_parameter_is_coded_as_if_it_were_alone(numels: tuple[int, ...]) -> None:
    layout = layout_of(*numels)
    g = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, generator=g) * 1000.0**k for k, n in enumerate(numels)]
    bound = bind(layout)
    together = decode(bound, encode(bound, torch.cat(parts)), layout.numel)
    for s, part in zip(layout.spans, parts, strict=True):
        alone = bind(whole("x", part))
        assert torch.equal(together[s.start : s.stop], decode(alone, encode(alone, part), part.numel()))


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_error_feedback_keeps_what_it_lost(decay: float) -> None:
    """sum sent + e_T = sum of inputs - (1 - beta) sum_{t < T} e_t; a round rounds beta e, its sum with x, and what is left."""
    rounds, most = 10, 0.0
    bound = by_name(NAME, error_feedback=True, feedback_decay=decay).bind(whole("x", torch.zeros(600)))
    state, wire = bound.init(CPU), bound.new_wire(CPU)
    kept = torch.zeros(600, dtype=torch.float64)
    for k in range(rounds):
        kept -= (1 - decay) * state["residual"].double()
        x = 0.3 + torch.randn(600, generator=torch.Generator().manual_seed(k))
        bound.encode(x, wire, state)
        y = decode(bound, wire, 600)
        kept += x.double() - y.double()
        most = max(most, *(float(v.abs().max()) for v in (x, y, state["residual"] + y)))
    assert float((state["residual"] - kept).abs().max()) <= rounds * 3 * U * most
    assert float(state["residual"].abs().max()) > 0.01


def test_what_is_no_wire_of_it_is_refused() -> None:
    x = torch.randn(600, generator=torch.Generator().manual_seed(4))
    bound = bind(whole("x", x))
    wire = encode(bound, x)
    for at in (0, 3, 4, 6, 12, 16, 24, 40, HEADER_BYTES + 2 * 4 + 5, wire.numel() - 1):
        bad = wire.clone()
        bad[at] ^= 1
        with pytest.raises(WireError, match="header is of another codec" if at < 24 else "checksum does not fit"):
            bound.check(bad)
    with pytest.raises(WireError, match=f"a wire of {wire.numel() - 1} bytes, {wire.numel()} were agreed"):
        bound.check(wire[:-1])
    for other in (bind(whole("x", x), "codebook8:1024"), bind(layout_of(88, 512))):
        with pytest.raises(WireError):
            other.check(wire)


class Sealed:
    """A wire whose sender made it, its checksum and all."""

    def __init__(self, numel: int) -> None:
        x = torch.randn(numel, generator=torch.Generator().manual_seed(5))
        self.bound = bind(whole("x", x))
        self.wire = encode(self.bound, x)

    def changed(self, values: dict[int, int]) -> Tensor:
        bad = self.wire.clone()
        for at, value in values.items():
            bad[HEADER_BYTES + at] = value
        said = zlib.crc32(bytes(bad[HEADER_BYTES:].tolist()), zlib.crc32(bytes(bad[:24].tolist())))
        bad[24:HEADER_BYTES] = torch.tensor(list(said.to_bytes(8, "little")), dtype=torch.uint8)
        return bad


def test_a_sealed_wire_with_a_code_behind_its_codebook_or_a_nan_is_refused() -> None:
    """A mean, 100 means of two bytes, 100 codes."""
    sealed = Sealed(100)
    sealed.bound.check(sealed.changed({204: 99}))
    for values in ({204: 100}, {303: 255}, {2: 0x80, 3: 0x7F}, {202: 0xC0, 203: 0x7F}):
        if 203 in values:
            values |= {303: 99}
        with pytest.raises(WireError, match="a wire that codec codebook8:512 makes inf or NaN of"):
            sealed.bound.check(sealed.changed(values))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_never_encoded(bad: float) -> None:
    x = torch.ones(600)
    x[-1] = bad
    far_apart = torch.linspace(-1.0, 1.0, 600) * torch.finfo(torch.float32).max
    for feedback in (False, True):
        bound = by_name(NAME, error_feedback=feedback).bind(whole("x", x))
        for values in (x, far_apart):
            with pytest.raises(NonFinite, match="inf or NaN"):
                bound.encode(values, bound.new_wire(CPU), bound.init(CPU))


@pytest.mark.parametrize("name", ["codebook8:256", "codebook8:8192", "codebook8:600", "codebook8:512:stochastic", "codebook8:"])
def test_a_name_that_is_none_is_one_clear_line(name: str) -> None:
    with pytest.raises(ValueError, match=r'write "codebook8:BLOCK"') as caught:
        by_name(name, error_feedback=False)
    assert "\n" not in str(caught.value)

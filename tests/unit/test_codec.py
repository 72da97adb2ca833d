"""Does every codec lose no more than its rounding, keep blocks within parameters, and refuse what must not pass?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dtrain.bucket import Layout, Span, whole
from dtrain.codec import BoundCodec, State, by_name
from dtrain.errors import NonFinite, WireError
from dtrain.wire import HEADER_BYTES

CPU = torch.device("cpu")
NAMES = ("identity", "bf16", "int8:64", "int8:32", "int4:64", "int4:32", "int4:128")
Q_MAX = {"int8": 127, "int4": 7}
BF16_ROUNDING = 2.0**-8 / (1 + 2.0**-8)
"""Of a value, at most: 8 significant bits, to the nearest."""


def bind(name: str, layout: Layout, *, error_feedback: bool = False) -> tuple[BoundCodec, State]:
    bound = by_name(name, error_feedback=error_feedback).bind(layout)
    return bound, bound.init(CPU)


def encode(bound: BoundCodec, x: Tensor, state: State) -> Tensor:
    wire = bound.new_wire(CPU)
    wire[HEADER_BYTES:] = 0xA5  # whatever was there must not show through
    bound.encode(x, wire, state)
    return wire


def decode(bound: BoundCodec, wire: Tensor, numel: int) -> Tensor:
    y = torch.zeros(numel)
    bound.decode_add(wire, y, weight=1.0)
    return y


def layout_of(*numels: int) -> Layout:
    spans, start = [], 0
    for k, n in enumerate(numels):
        spans.append(Span(f"p{k}", (n,), start, start, start + n))
        start += n
    return Layout(tuple(spans))


def allowed_error(name: str, x: Tensor) -> Tensor:
    """Half a step of the block's rounded scale; half an ulp of bf16; nothing.

    bf16 has 8 significant bits, so rounding moves a value by at most U = 2^-8 / (1 + 2^-8) of itself. The scale is at most
    max / q_max (1 + U). If it was rounded down, max / scale is at most q_max / (1 - U) = q_max (1 + 2^-8) < q_max + 1/2, so the
    clamp loses less than half a step too. Computing x / scale in fp32 adds at most q_max 2^-22 < 1/1000 of half a step.
    """
    base, _, block = name.partition(":")
    if base == "identity":
        return torch.zeros_like(x)
    if base == "bf16":
        return x.abs() * BF16_ROUNDING
    out = torch.empty_like(x)
    for k in range(0, x.numel(), int(block)):
        part = slice(k, k + int(block))
        out[part] = x[part].abs().max() / Q_MAX[base] * (1 + BF16_ROUNDING) / 2 * 1.001
    return out


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_of_every_size(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    for n in range(1, 131):
        x = torch.randn(n, generator=g) * 10.0 ** float(torch.randint(-6, 7, (1,), generator=g))
        bound, state = bind(name, whole("x", x))
        y = decode(bound, encode(bound, x, state), n)
        assert ((y.double() - x.double()).abs() <= allowed_error(name, x.double())).all()


@pytest.mark.parametrize("name", NAMES)
def test_wire_bytes_are_what_the_format_says(name: str) -> None:
    base, _, block = name.partition(":")
    for numels in ((1,), (63,), (64,), (65, 1, 130), (64, 64, 3, 128)):
        bits = {"identity": 32, "bf16": 16, "int8": 8, "int4": 4}[base]
        want = sum(math.ceil(n * bits / 8) + (2 * math.ceil(n / int(block)) if block else 0) for n in numels)
        assert bind(name, layout_of(*numels))[0].wire_bytes == HEADER_BYTES + want


def test_casts_are_torchs() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    for name, dtype in (("identity", torch.float32), ("bf16", torch.bfloat16)):
        bound, state = bind(name, whole("x", x))
        assert torch.equal(encode(bound, x, state)[HEADER_BYTES:].view(dtype), x.to(dtype))


@pytest.mark.parametrize("name", ["int8:64", "int4:64"])
def test_the_largest_of_a_block_keeps_its_sign_and_comes_back_within_bf16(name: str) -> None:
    """Its code is +-q_max, so it is off by what its scale is: the rounding of a bf16."""
    x = torch.randn(640, generator=torch.Generator().manual_seed(2))
    bound, state = bind(name, whole("x", x))
    y = decode(bound, encode(bound, x, state), 640)
    rows, back = x.view(-1, 64), y.view(-1, 64)
    at = rows.abs().argmax(dim=1, keepdim=True)
    largest, got = rows.gather(1, at), back.gather(1, at)
    assert ((got - largest).abs() <= largest.abs() * BF16_ROUNDING * 1.001).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zeros_stay_zeros(name: str, zero: float) -> None:
    x = torch.full((130,), zero)
    x[64] = 5.0  # the second block is not zero
    bound, state = bind(name, whole("x", x))
    y = decode(bound, encode(bound, x, state), 130)
    assert not y[:64].any()
    assert not y[65:].any()
    assert float(y[64]) == pytest.approx(5.0, rel=BF16_ROUNDING)


@pytest.mark.parametrize("name", ["int8:64", "int4:64"])
def test_blocks_too_small_for_a_scale_become_zeros(name: str) -> None:
    """1 / scale overflows below 2^-128; the block's values, all under q_max 2^-128, are sent as zeros, not as 0 * inf."""
    for largest in (1e-45, 1e-41, 1e-38, 3e-38):
        x = torch.tensor([largest, 0.0, -largest / 2, largest / 3] * 16)
        bound, state = bind(name, whole("x", x))
        y = decode(bound, encode(bound, x, state), 64)
        assert not y[1::4].any()
        assert float((y - x).abs().max()) <= float(x.abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("numels", [(1, 1), (63, 65), (64, 64, 10), (130, 64, 1, 7), (3, 128, 5)])
def test_a_parameter_is_coded_as_if_it_were_alone(name: str, numels: tuple[int, ...]) -> None:
    """So no block crosses from one parameter into the next, and a huge neighbour costs a small one nothing."""
    layout = layout_of(*numels)
    g = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, generator=g) * 1000.0**k for k, n in enumerate(numels)]
    bound, state = bind(name, layout)
    together = decode(bound, encode(bound, torch.cat(parts), state), layout.numel)
    for span, part in zip(layout.spans, parts, strict=True):
        alone, own = bind(name, whole("x", part))
        assert torch.equal(together[span.start : span.stop], decode(alone, encode(alone, part, own), part.numel()))


@pytest.mark.parametrize("name", NAMES)
def test_decode_add_adds_the_weighted_value(name: str) -> None:
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(130, generator=g), torch.randn(130, generator=g)
    bound, state = bind(name, whole("x", x))
    wire = encode(bound, x, state)
    want = y.double() - 0.3 * decode(bound, wire, 130).double()
    bound.decode_add(wire, y, weight=-0.3)
    # The weight, its product with scale or value, with the code, and the sum are rounded: 4 u of values below 8.
    assert float((y - want).abs().max()) <= 4 * 2.0**-24 * 8


@pytest.mark.parametrize("name", ["bf16", "int8:64", "int4:64"])
def test_error_feedback_keeps_what_was_lost(name: str) -> None:
    g = torch.Generator().manual_seed(5)
    layout = layout_of(70, 64, 3)
    bound, state = bind(name, layout, error_feedback=True)
    residual = torch.zeros(layout.numel)
    for _ in range(5):
        x = torch.randn(layout.numel, generator=g)
        y = decode(bound, encode(bound, x, state), layout.numel)
        lost = residual.double() + x.double() - y.double()
        residual = state["residual"].clone()
        assert float((residual - lost).abs().max()) <= 3 * 2.0**-24 * 8
        assert residual.any()


@pytest.mark.parametrize("name", ["int4:64", "sign:64", "topk:4/64:2"])
def test_feedback_that_decays_forgets_its_share_and_no_more(name: str) -> None:
    """sum sent + e_T = sum of inputs - (1 - beta) sum_{t < T} e_t, in float64, beta as fp32 has it."""
    g, rounds = torch.Generator().manual_seed(6), 40
    layout, beta = layout_of(70, 64, 3), float(torch.tensor(0.95))
    bound = by_name(name, error_feedback=True, feedback_decay=0.95).bind(layout)
    state = bound.init(CPU)
    kept, forgotten = (torch.zeros(layout.numel, dtype=torch.float64) for _ in range(2))
    most = 0.0
    for _ in range(rounds):
        forgotten += (1 - beta) * state["residual"].double()
        x = 0.3 + torch.randn(layout.numel, generator=g)
        y = decode(bound, encode(bound, x, state), layout.numel)
        kept += x.double() - y.double()
        most = max(most, *(float(v.abs().max()) for v in (x, y, state["residual"], state["residual"] + y)))
    # A round rounds beta e, its sum with x, and what is left without y.
    bound_of_rounding = rounds * 3 * 2.0**-24 * most
    assert float((state["residual"] - (kept - forgotten)).abs().max()) <= bound_of_rounding
    assert float(forgotten.abs().max()) > 100 * bound_of_rounding, "it does forget"


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_never_encoded(name: str, bad: float, error_feedback: bool) -> None:
    for at in (0, 63, 64, 129):
        x = torch.ones(130)
        x[at] = bad
        bound, state = bind(name, whole("x", x), error_feedback=error_feedback)
        with pytest.raises(NonFinite, match="inf or NaN"):
            encode(bound, x, state)


def test_what_overflows_bf16_is_refused() -> None:
    x = torch.tensor([1.0, torch.finfo(torch.float32).max])
    bound, state = bind("bf16", whole("x", x))
    with pytest.raises(NonFinite):
        encode(bound, x, state)
    bound, state = bind("int4:32", whole("x", x))
    y = decode(bound, encode(bound, x, state), 2)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("error_feedback", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_wire_of_another_length_is_refused(name: str, error_feedback: bool) -> None:
    x = torch.ones(130)
    bound, state = bind(name, whole("x", x), error_feedback=error_feedback)
    wire = encode(bound, x, state)
    for other in (wire[:-1], wire[:0], torch.cat((wire, wire[:1]))):
        with pytest.raises(WireError, match=f"{other.numel()} bytes, {wire.numel()} were agreed"):
            bound.check(other)


_UNKNOWN = ("", "int16", "int4:3", "int4:16", "int4:0", "int4:1", "int8:", "int8:x", "int8:-64", "int4:8192", "bf16:64")


@pytest.mark.parametrize("name", _UNKNOWN)
def test_an_unknown_codec_is_one_clear_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"codec {name!r}") as caught:
        by_name(name, error_feedback=False)
    assert "\n" not in str(caught.value)


def test_the_default_block_is_64() -> None:
    assert by_name("int4", error_feedback=False) == by_name("int4:64", error_feedback=False)
    assert by_name("int8", error_feedback=True) == by_name("int8:64", error_feedback=True)

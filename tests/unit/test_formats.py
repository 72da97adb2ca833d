"""Do the formats mean what WIRE.md says? Written again in numpy from the page alone, and by what each promises."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtrain.kernels import Coded, Format, Noise, operations, zones

Array = NDArray[np.float64]

CPU = torch.device("cpu")
N, BLOCK = 517, 64
"""Eight blocks and a short one."""


def coded(x: Tensor, fmt: Format, noise: Noise | None = None) -> Coded:
    body = torch.full((2 * fmt.num_scales(x.numel()) + fmt.code_bytes(x.numel()),), 0xA5, dtype=torch.uint8)
    (part,) = zones(body, fmt, [x.numel()])
    operations(CPU).encode(x, part, fmt, noise)
    return part


def decoded(x: Tensor, fmt: Format, noise: Noise | None = None) -> Tensor:
    y = torch.zeros(x.numel())
    operations(CPU).decode_add(coded(x, fmt, noise), y, 1.0, fmt)
    return y


def sample() -> Tensor:
    g = torch.Generator().manual_seed(11)
    return torch.randn(N, generator=g) * torch.exp2(torch.randint(-3, 3, (N,), generator=g).float()) + 0.25


def blocks(x: Array) -> list[Array]:
    return [x[k : k + BLOCK] for k in range(0, N, BLOCK)]


def nibbles(codes: Tensor) -> Array:
    return np.stack((codes.numpy() & 15, codes.numpy() >> 4), axis=1).reshape(-1)[:N].astype(np.float64)


def near(got: Array, want: Array, rel: float = 2.0**-8) -> bool:
    """Within a bf16's rounding."""
    return bool((np.abs(got - want) <= rel * np.abs(want) + 1e-30).all())


def test_e3m0_is_the_nearest_power_of_two() -> None:
    x = sample().double().numpy()
    part = coded(sample(), Format("e3m0", BLOCK))
    scales, codes = part.scales.double().numpy(), nibbles(part.codes)
    assert near(scales, np.array([np.abs(b).max() for b in blocks(x)]))
    levels = np.array([0.0, *(2.0**k for k in range(-6, 1))])
    of = np.repeat(scales, BLOCK)[:N]
    nearest = np.abs(np.abs(x / of)[:, None] - levels).argmin(axis=1)
    assert (codes % 8 == nearest).all(), "no value of this sample lies half way"
    assert ((codes >= 8) == (x < 0)).all()
    assert (decoded(sample(), Format("e3m0", BLOCK)).double().numpy() == np.sign(x) * levels[nearest] * of).all()


def test_lut4_is_the_normal_s_bins_about_the_mean() -> None:
    def phi(z: float) -> float:
        return math.exp(-z * z / 2) / math.sqrt(2 * math.pi) if math.isfinite(z) else 0.0

    def cdf(z: float) -> float:
        return (1 + math.erf(z / math.sqrt(2))) / 2

    edges = [-math.inf, *(0.375 * k for k in range(-7, 8)), math.inf]
    means = np.array([(phi(a) - phi(b)) / (cdf(b) - cdf(a)) for a, b in pairwise(edges)])
    x = sample().double().numpy()
    part = coded(sample(), Format("lut4", BLOCK))
    mean, sigma = part.scales.double().numpy().reshape(-1, 2).T
    assert near(sigma, np.array([b.std() for b in blocks(x)]), rel=2.0**-7), "about the mean as it was rounded"
    assert np.abs(mean - np.array([b.mean() for b in blocks(x)])).max() <= 2.0**-8 * np.abs(mean).max()
    m, s = (np.repeat(v, BLOCK)[:N] for v in (mean, sigma))
    bins = np.clip(np.floor((x - m) / (0.375 * s) + 8), 0, 15).astype(int)
    assert (nibbles(part.codes) == bins).mean() > 0.999, "one on an edge may fall to either side"
    got = decoded(sample(), Format("lut4", BLOCK)).double().numpy()
    assert np.abs(got - (m + means[bins] * s)).max() <= 0.375 * s.max()
    assert np.median(np.abs(got - (m + means[bins] * s))) <= 4 * 2.0**-24 * 64


def test_sign_is_a_bit_and_the_mean_magnitude() -> None:
    x = sample().double().numpy()
    part = coded(sample(), Format("sign", BLOCK))
    assert near(part.scales.double().numpy(), np.array([np.abs(b).mean() for b in blocks(x)]))
    bits = np.unpackbits(part.codes.numpy(), bitorder="little")
    assert (bits[:N] == (x < 0)).all()
    assert not bits[N:].any()


@pytest.mark.parametrize(("k", "chunk", "bits"), [(64, 4096, 2), (64, 4096, 8), (8, 64, 2), (4, 128, 8)])
def test_topk_keeps_the_largest(k: int, chunk: int, bits: int) -> None:
    x = torch.randn(2 * chunk + 37, generator=torch.Generator().manual_seed(k))
    got = decoded(x, Format("topk", chunk, k, bits))
    for start in range(0, x.numel(), chunk):
        part, back = x[start : start + chunk].double(), got[start : start + chunk].double()
        kept = part.abs().argsort(descending=True, stable=True)[: min(k, part.numel())]
        largest = part[kept]
        mask = torch.zeros_like(part, dtype=torch.bool)
        mask[kept] = True
        assert not back[~mask].any()
        if bits == 8:
            assert (back[kept] - largest).abs().max() <= largest.abs().max() / 127 * 0.51
        elif part.numel() >= k:
            mean = largest.abs().mean()
            for side in (largest.abs() < mean, largest.abs() >= mean):
                want = largest[side].abs().mean() * largest[side].sign()
                assert torch.allclose(back[kept][side], want, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int4", "e3m0", "lut4", "sign"])
def test_random_rounding_is_right_on_average_and_within_a_step(kind: Any) -> None:
    """Hoeffding: the mean of T draws in a range r is off by more than r sqrt(ln(2 N / p) / (2 T)) anywhere with probability p."""
    fmt, draws = Format(kind, BLOCK), 400
    x = sample()
    if kind == "lut4":  # unbiased between its outermost levels
        x = torch.cat([b.clamp(b.mean() - 2 * b.std(), b.mean() + 2 * b.std()) for b in x.split(BLOCK)])
    each = torch.stack([decoded(x, fmt, Noise(seed, 2**33 + 5)) for seed in range(draws)]).double()
    largest = torch.cat([torch.full_like(b, float(b.abs().max())) for b in x.split(BLOCK)]).double()
    # The gap between the codes on either side: a step; of e3m0 the value itself, rounded down, or 2^-6; of lut4 the widest, 0.53
    # sigma; of sign from - to +. Scales are rounded, so 1 % more.
    gap = {
        "int8": largest / 127,
        "int4": largest / 7,
        "e3m0": torch.maximum(x.abs().double(), largest / 64),
        "lut4": 0.53 * torch.cat([torch.full_like(b, float(b.std(correction=0))) for b in x.split(BLOCK)]).double(),
        "sign": 2 * largest,
    }[kind]
    assert (each.amax(0) - each.amin(0) <= 1.01 * gap).all()
    off = (each.mean(0) - x.double()).abs()
    bound = 1.01 * gap * math.sqrt(math.log(2 * N / 1e-6) / (2 * draws))
    # The largest of a block may lie above its rounded scale by 2^-8 of itself, where codes end.
    assert (off <= bound + x.abs().double() * 2.0**-7 + 1e-6).all()
    assert float((each.amax(0) - each.amin(0)).max()) > 0
    assert torch.equal(decoded(x, fmt, Noise(3, 7)), decoded(x, fmt, Noise(3, 7)))


@pytest.mark.parametrize("kind", ["e3m0", "lut4", "sign"])
def test_coding_loses_less_than_there_was(kind: Any) -> None:
    """What error feedback and CHOCO need of a codec: |x - C(x)| < |x|, also for blocks of one large value, or of equal ones."""
    for x in (sample(), torch.eye(BLOCK)[3] * 9.0, torch.full((BLOCK,), -0.3), torch.zeros(BLOCK)):
        y = decoded(x, Format(kind, BLOCK))
        assert float((x - y).norm()) <= float(x.norm()) * (1 - 1e-3) + 1e-12


def test_a_constant_block_of_the_statistical_code_comes_back() -> None:
    x = torch.full((BLOCK,), -0.3125)
    assert torch.equal(decoded(x, Format("lut4", BLOCK)), x)

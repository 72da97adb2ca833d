"""Does no codec lose more of a vector than is said of it, and how much is lost usually?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.bucket import whole
from dtrain.codec import by_name
from dtrain.codec_name import parse
from dtrain.contraction import most_lost, most_moved, usually_lost
from tests.oracle.test_stability import choco_step

BLOCKS = [f"{base}:{block}" for base in ("int8", "int4", "e3m0", "lut4", "sign") for block in (32, 64, 4096)]
TOPK = ["topk:64/4096:2", "topk:64/4096:8", "topk:512/4096:8", "topk:4/64:2", "topk:64/64:2"]
NAMES = ["identity", "bf16", *BLOCKS, *(f"{name}:stochastic" for name in BLOCKS), *TOPK, "codebook8:512", "codebook8:4096"]
NAMES += ["dct:4/64"]
REPEATS = 6


def lost(name: str, x: Tensor) -> tuple[float, float]:
    """Of |x|^2 in the mean of what is drawn, and 6 standard errors of that mean."""
    bound = by_name(name, error_feedback=False).bind(whole("x", x))
    state, wire = bound.init(x.device), bound.new_wire(x.device)
    off = []
    for _ in range(REPEATS if parse(name).stochastic else 1):
        bound.encode(x, wire, state)
        got = torch.zeros_like(x)
        bound.decode_add(wire, got, weight=1.0)
        off.append(float((got.double() - x.double()).square().sum() / x.double().square().sum()))
    return float(np.mean(off)), 6 * float(np.std(off)) / len(off) ** 0.5


def hard_vectors() -> list[Tensor]:
    """Of 4096: one value a block of 64, or in all, beside others of so many sizes; alike; decaying; heavy-tailed."""
    draw = torch.Generator().manual_seed(3)
    normal = torch.randn(4096, generator=draw)
    sizes = [0.0, *(p / q for q in (7, 127) for p in (0.05, 0.11, 0.35, 0.498, 0.52)), 2.0**-7 - 1e-5, 0.26, 1.0]
    found = [normal, normal**3, normal / normal.flip(0), torch.sign(normal), torch.arange(1, 4097.0) ** -0.7]
    for every in (32, 64, 4096):
        for size in sizes:
            x = torch.full((4096,), size) * torch.sign(normal)
            x[::every] = 1.0
            found.append(x)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_vector_loses_more_than_is_said(name: str) -> None:
    """1e-6: fp32."""
    said = most_lost(parse(name))
    found = [lost(name, x) for x in hard_vectors()]
    assert all(mean - errors <= said + 1e-6 for mean, errors in found)
    worst = max(mean for mean, _ in found)
    assert worst >= said / 8 or name.startswith("topk"), "the bound is of this codec"


def test_which_codecs_are_no_contraction() -> None:
    none = {name for name in NAMES if most_lost(parse(name)) >= 1}
    assert none == {"int4:4096:stochastic", *(f"sign:{block}:stochastic" for block in (32, 64, 4096))}
    for name in none:
        assert max(lost(name, x)[0] for x in hard_vectors()) > 1


@pytest.mark.parametrize("name", [name for name in NAMES if most_lost(parse(name)) < 1 and not name.startswith("topk")])
def test_normal_values_lose_what_is_usual(name: str) -> None:
    """1 % for what 65,536 of them, and their largest, are by chance."""
    x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(5))
    said = usually_lost(parse(name))
    assert lost(name, x)[0] <= 1.01 * said
    assert said <= most_lost(parse(name)) or said < 0.1


@pytest.mark.parametrize("a", [0.1, 0.5, 1.0, 1.5, 1.9])
def test_the_worst_loss_alternates_and_grows_beyond_the_bound(a: float) -> None:
    """e = -r v at each step, by CHOCO's own lines on two islands, whose disagreement has one direction: the root of largest
    modulus of z^2 - (1 - a - r (1 + a)) z - r passes -1 where r = (2 - a) / (2 + a)."""
    r = (2 - a) / (2 + a)
    for factor, grows in ((0.999, False), (1.001, True)):
        loss = factor * r
        roots = np.roots([1.0, -(1 - a - loss * (1 + a)), -loss])
        assert (np.abs(roots).max() > 1) == grows
    assert most_moved(parse("identity")) == 2.0
    w = np.full((2, 2), 0.5)
    x = np.array([1.0, -1.0])
    state = choco_step(np.concatenate((x, x, w @ x, 0 * x)), w, a, late=False)
    np.testing.assert_allclose(state[:2], (1 - a) * x, atol=1e-12)

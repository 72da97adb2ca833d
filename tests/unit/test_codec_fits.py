"""Is each codec that would drive islands apart refused, with what to do instead, and none that is in use?"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from dtrain.algorithms.multi_gossip import spectral_radius
from dtrain.codec_fits import largest_move
from dtrain.codec_name import parse
from dtrain.contraction import most_moved
from dtrain.recipes import resolve

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"codec": "topk:64/4096:2"}, "is too large for sync.codec") for name in ("choco", "beer", "deepsqueeze")),
    ("choco", {"codec": "topk:512/4096:8"}, "gamma is not below 0.187; use gamma=0.187 or less, or a codec that loses less"),
    ("choco", {"codec": "sign:64"}, 'sync.gamma = 0.9 .* over sync.topology = "ring" .* use gamma=0.371 or less'),
    ("choco", {"codec": "int4:64", "topology": "graph", "graph": "random_regular:4"}, "use gamma=0.771 or less"),
    *(
        (name, {"codec": codec}, 'can lose more than all of what it is given.*use "int8:64"')
        for name in ("choco", "beer", "deepsqueeze", "gradient_tracking", "dpsgd", "push_sum", "multi_gossip", "a2cid2")
        for codec in ("sign:64:stochastic", "int4:4096:stochastic")
    ),
    *(
        (name, {"codec": "int4:64", "error_feedback": True}, 'apart: .* use sync.recipe = "deepsqueeze" or "choco"')
        for name in ("dpsgd", "push_sum", "multi_gossip", "chebyshev", "decent_adam", "semi_s2s")
    ),
    ("choco", {"error_feedback": True}, "has no effect"),
    *((name, {"codec": "codebook8:512"}, "codes differences by the project's own kernels") for name in ("choco", "beer")),
    *(("chebyshev", {"codec": codec}, "magnify what it loses, by .* a round") for codec in ("sign:64", "topk:64/4096:2")),
    ("chebyshev", {"codec": "sign:64", "gossip_steps": 8}, 'fewer gossip_steps, or sync.recipe = "multi_gossip"'),
    *(
        ("dpsgd", {"codec": codec, "topology": "complete", "reduce": reduce}, "would round the parameters themselves")
        for codec in ("bf16", "int8:64")
        for reduce in ("gather", "all_to_all")
    ),
    ("multi_gossip", {"topology": "random_pairs"}, "mixes several times by one matrix"),
    *((name, {"topology": "complete"}, "whose first step is the exact mean") for name in ("multi_gossip", "chebyshev")),
]
TAKEN: list[tuple[str, dict[str, Any]]] = [
    *((name, {"codec": codec}) for name in ("choco", "beer") for codec in ("identity", "bf16", "int8:64", "int4:64", "e3m0:64")),
    ("choco", {"codec": "sign:64", "gamma": 0.37}),
    ("choco", {"codec": "topk:64/4096:2", "gamma": 0.02}),
    ("deepsqueeze", {"codec": "topk:64/4096:2", "gamma": 0.03}),
    *((name, {"codec": codec}) for name in ("deepsqueeze", "chebyshev") for codec in ("int4:64", "codebook8:4096")),
    *(("chebyshev", {"codec": codec}) for codec in ("bf16", "int8:64", "int4:64")),
    ("dpsgd", {"codec": "sign:64"}),
    ("dpsgd", {"topology": "complete", "reduce": "all_to_all"}),
    ("diloco", {"codec": "sign:64:stochastic", "error_feedback": True}),
    ("multi_gossip", {"topology": "complete", "gossip_steps": 1}),
    ("multi_gossip", {"topology": "graph", "graph": "rings:2", "server": "sampled:2:5"}),
]


@pytest.mark.parametrize(("name", "axes", "why"), REFUSED)
def test_it_is_refused_in_one_line(name: str, axes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as caught:
        resolve(name, axes, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "axes"), TAKEN)
def test_it_is_taken(name: str, axes: dict[str, Any]) -> None:
    resolve(name, axes, 16)


@pytest.mark.parametrize("codec", ["sign:64", "topk:512/4096:8", "topk:64/4096:2"])
def test_the_gamma_that_is_named_is_taken_and_little_more_is_not(codec: str) -> None:
    with pytest.raises(ValueError, match="use gamma=") as caught:
        resolve("choco", {"codec": codec}, 16)
    (said,) = re.findall(r"use gamma=([0-9.]+) or less", str(caught.value))
    resolve("choco", {"codec": codec, "gamma": float(said)}, 16)
    with pytest.raises(ValueError, match="is too large"):
        resolve("choco", {"codec": codec, "gamma": 1.06 * float(said)}, 16)


def test_how_far_a_round_moves() -> None:
    """1 - lambda_n: a ring's is 1 - (1 + 2 cos(pi)) / 3, a hypercube's of 4 sides 2 x 4 / 5, one mean of all, or of two, 1."""
    for topology, want in (("ring", 4 / 3), ("hypercube", 8 / 5), ("complete", 1.0), ("random_pairs", 1.0)):
        assert largest_move(topology, None, False, 16) == pytest.approx(want, rel=1e-12)
    assert largest_move("graph", "random_regular:4", False, 16) == 2.0, "drawn by a seed that is not known here"
    r = math.sqrt(1 - 2 / math.pi)
    assert most_moved(parse("sign:64")) == pytest.approx(2 * (1 - r) / (1 + r), rel=1e-12)
    assert most_moved(parse("topk:64/4096:8")) == 2 / 64


@pytest.mark.parametrize("alone", [0.0, 0.4, 3.0])
def test_the_radius_is_that_of_the_whole_matrix(alone: float) -> None:
    """All is at least 0; with ``alone`` = 3 the largest stands on the diagonal, where no row joins."""
    draw = np.random.default_rng(5)
    diagonal, left, right = draw.random(30) * 0.4, draw.random((4, 30)), draw.random((4, 30)) / 30
    diagonal[7], left[:, 7] = alone, 0.0
    want = np.abs(np.linalg.eigvals(np.diag(diagonal) + left.T @ right)).max()
    assert spectral_radius(diagonal, left, right) == pytest.approx(want, rel=1e-12)
    assert want == pytest.approx(alone) or alone < 3


def test_a_radius_of_the_diagonal_alone() -> None:
    nothing = np.zeros((2, 3))
    assert spectral_radius(np.array([0.2, 0.5, 0.1]), nothing, nothing) == 0.5

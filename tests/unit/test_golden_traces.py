"""Does every recipe still go where it went? Against tests/golden/traces.json, bit for bit where a CPU's model does not matter."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tests.golden.traces import ROUGH, differences, islands_of, recorded, trace_of, trains


@pytest.mark.parametrize("recipe", trains())
def test_a_recipe_goes_where_it_went(recipe: str) -> None:
    """A change that is meant to change bits says so by ``python -m tests.golden.traces``."""
    if recipe not in ROUGH and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without fused multiply-adds a CPU has other bits")
    islands = islands_of(recipe)
    assert not differences(recipe, recorded()[recipe], trace_of(recipe, islands))
    merged = islands.pop("merged")
    assert all(torch.equal(x, merged[0]) for x in merged)
    assert not any(torch.equal(a, b) for a, b in pairwise(islands.values())), "it is still under way"


def test_no_other_recipe_is_recorded() -> None:
    assert list(recorded()) == trains()
    assert set(ROUGH) <= set(trains())


@pytest.mark.parametrize("recipe", ["diloco", "muloco"])
def test_what_went_elsewhere_is_named_with_its_place(recipe: str) -> None:
    """The last bit of an element that no one sees, where bits count; twice as much as is allowed, where they do not."""
    x = {"step 3": torch.linspace(-1, 1, 30).view(2, 15), "merged": torch.ones(2, 15)}
    want = trace_of(recipe, x)
    assert differences(recipe, want, trace_of(recipe, x)) == []
    moved = {at: value.clone() for at, value in x.items()}
    if recipe in ROUGH:
        moved["step 3"][1, 0] += 2 * ROUGH[recipe]
    else:
        moved["step 3"][1, 7] = math.nextafter(float(moved["step 3"][1, 7]), 2.0) + 2.0**-24
    (said,) = differences(recipe, want, trace_of(recipe, moved))
    assert said.startswith(f"{recipe}, step 3: ")
    assert differences(recipe, want, {"step 3": want["step 3"]})

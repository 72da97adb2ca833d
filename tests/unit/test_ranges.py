"""Does every element of a bucket come from one rank, and go back to all that hold it?"""

from __future__ import annotations

import random

import pytest

from dtrain.bucket import Layout, Span
from dtrain.island.ranges import Held, first_holders, pieces


def layout_of(*spans: tuple[int, int]) -> Layout:
    """Spans of (first element of the model, elements), side by side in a bucket."""
    out, at = [], 0
    for k, (first, numel) in enumerate(spans):
        out.append(Span(f"w{k}", (numel,), first, at, at + numel))
        at += numel
    return Layout(tuple(out))


def test_two_halves_of_a_parameter_meet_a_bucket_that_begins_inside_it() -> None:
    layout = layout_of((6, 4), (30, 2))  # elements 6..9 and 30, 31 of the model
    ranks = [[Held(0, 8), Held(30, 31)], [Held(8, 16), Held(31, 40)]]
    first, second = first_holders(layout, ranks)
    assert first == [(0, slice(6, 8), slice(0, 2)), (1, slice(0, 1), slice(4, 5))]
    assert second == [(0, slice(0, 2), slice(2, 4)), (1, slice(0, 1), slice(5, 6))]


@pytest.mark.parametrize("seed", range(20))
def test_each_element_is_given_once_and_handed_back_to_all(seed: int) -> None:
    """Against sets of numbers: random cuts, some parts on several ranks."""
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, 60), 7))
    parts = [Held(a, b) for a, b in zip([0, *cuts], [*cuts, 60], strict=True)]
    ranks: list[list[Held]] = [[] for _ in range(4)]
    for part in parts:
        for n in rng.sample(range(4), rng.randint(1, 4)):
            ranks[n].append(part)
    layout = layout_of((5, 20), (25, 10), (50, 8))
    model = [*range(5, 35), *range(50, 58)]
    given = [0] * layout.numel
    for n, found in enumerate(first_holders(layout, ranks)):
        for held, inside, here in found:
            elements = range(ranks[n][held].start + inside.start, ranks[n][held].start + inside.stop)
            assert model[here] == list(elements)
            for at in range(here.start, here.stop):
                given[at] += 1
                assert not any(element in range(*part) for m in range(n) for part in ranks[m] for element in [model[at]])
    assert given == [1] * layout.numel
    for own in ranks:
        back = {at for held, _, here in pieces(layout, own) for at in range(here.start, here.stop)}
        assert back == {at for at, element in enumerate(model) if any(element in range(*part) for part in own)}


def test_what_no_rank_holds_is_named() -> None:
    with pytest.raises(ValueError, match=r"no rank of the island holds 2 elements of parameter w0"):
        first_holders(layout_of((0, 10)), [[Held(0, 4)], [Held(6, 10)]])

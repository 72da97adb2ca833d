"""Do parameters stay views of flat storage, and are buckets cut by the model alone, never through a block?"""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import nn

from dtrain.bucket import GRAIN, Bucket, Flat, Layout, Span, flatten, make_buckets
from dtrain.bucket_bytes import largest_bytes
from dtrain.codec import by_name
from dtrain.wire import HEADER_BYTES


class Tied(nn.Module):
    """An embedding that is also the head, a frozen parameter, odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 5)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.mid = nn.Linear(5, 5)
        self.head = nn.Linear(5, 37, bias=False)
        self.head.weight = self.embed.weight


def random_layout(rng: random.Random) -> Layout:
    spans, start, base = [], 0, rng.randrange(1000)
    for k in range(rng.randint(1, 8)):
        numel = rng.choice([1, 2, 63, 64, 65, 4096, rng.randint(1, 10_000)])
        spans.append(Span(f"p{k}", (numel,), base + start, start, start + numel))
        start += numel
    return Layout(tuple(spans))


def make(numels: list[int], *, fragments: int = 1, ranks: int = 1, bucket_bytes: int | None = None) -> tuple[Flat, list[Bucket]]:
    model = nn.ParameterList(nn.Parameter(torch.randn(n)) for n in numels)
    flat = flatten(model.named_parameters())
    return flat, make_buckets(flat, num_fragments=fragments, bucket_bytes=bucket_bytes, num_ranks=ranks, with_grad=False)


def test_flattening_keeps_values_and_makes_views() -> None:
    model = Tied()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = flatten(model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    storage = flat.storages[0]
    wanted = torch.cat([before[name].reshape(-1) for name in flat.names])
    assert torch.equal(storage, wanted)
    storage.add_(1)
    for name, p in zip(flat.names, flat.parameters, strict=True):
        assert torch.equal(p, before[name] + 1)


def test_parameters_stay_views_through_training_and_loading() -> None:
    model = Tied()
    flat = flatten(model.named_parameters())
    places = [p.data_ptr() for p in flat.parameters]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.head(model.mid(model.embed(torch.arange(37)))).square().sum().backward()
        optimizer.step()
    model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()})
    assert [p.data_ptr() for p in flat.parameters] == places
    assert torch.equal(flat.storages[0], torch.cat([p.detach().reshape(-1) for p in flat.parameters]))


def test_tied_weights_are_there_once_and_stay_tied() -> None:
    model = Tied()
    flat = flatten(model.named_parameters(remove_duplicate=False))
    assert flat.names == ("embed.weight", "mid.weight", "mid.bias")
    assert flat.numel == 37 * 5 + 25 + 5
    flat.storages[0].zero_()
    assert model.head.weight is model.embed.weight
    assert not model.head.weight.any()


def test_each_dtype_has_a_storage_of_its_own() -> None:
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3).to(torch.bfloat16), nn.Linear(3, 3)])
    flat = flatten(model.named_parameters())
    assert [(s.dtype, s.numel()) for s in flat.storages] == [(torch.float32, 24), (torch.bfloat16, 12)]
    buckets = make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=True)
    for b in buckets:
        assert b.g is not None
        assert b.g.dtype == torch.float32


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameters that require a gradient"):
        flatten(model.named_parameters())


def test_too_many_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes = 4 cuts the model into 5000 buckets"):
        make([1] * 5000, bucket_bytes=4)


MIB = 2**20


@pytest.mark.parametrize(
    ("model", "largest"),
    [
        (MIB, MIB // 2),  # below it messages cost more than bytes
        (16 * MIB, 2 * MIB),
        (64 * MIB, 8 * MIB),
        (100 * MIB, 8 * MIB),
        (256 * MIB, 16 * MIB),
        (1024 * MIB, 64 * MIB),
        (5200 * MIB, 64 * MIB),
    ],
)
def test_a_bucket_is_an_eighth_of_a_small_model_and_a_sixteenth_of_a_large_one(model: int, largest: int) -> None:
    assert largest_bytes(model) == largest
    flat = flatten([("p", nn.Parameter(torch.empty(model // 4, device="meta")))])
    buckets = make_buckets(flat, num_fragments=1, bucket_bytes=None, num_ranks=1, with_grad=False)
    assert len(buckets) == math.ceil(model / largest)
    assert max(b.layout.numel for b in buckets) <= largest / 4


NUMELS = [3, 50_000, 64, 4097, 12_288, 1, 9000]


@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("bucket_bytes", [None, 20_000])
def test_the_cut_does_not_depend_on_the_number_of_ranks(fragments: int, bucket_bytes: int | None) -> None:
    numels = NUMELS if bucket_bytes else [12 * n for n in NUMELS]  # MIN_BUCKET_BYTES would leave one bucket
    _, one = make(numels, fragments=fragments, bucket_bytes=bucket_bytes)
    assert len(one) > 4
    for ranks in (2, 3, 7):
        _, many = make(numels, fragments=fragments, bucket_bytes=bucket_bytes, ranks=ranks)
        assert [(b.fragment, b.layout) for b in many] == [(b.fragment, b.layout) for b in one]
        owners = [b.owner for b in many]
        assert owners == sorted(owners)
        assert set(owners) <= set(range(ranks))
        largest = max(b.layout.numel for b in many)
        for rank in range(ranks):
            carried = sum(b.layout.numel for b in many if b.owner == rank)
            # A bucket goes where its middle lies, so each end of a rank's share is off by at most half a bucket.
            assert abs(carried - sum(numels) / ranks) <= largest


@pytest.mark.parametrize("fragments", [1, 2, 3, 5])
def test_buckets_tile_the_model_and_are_cut_on_grains(fragments: int) -> None:
    flat, buckets = make(NUMELS, fragments=fragments, bucket_bytes=20_000)
    starts = dict(zip(flat.names, (sum(NUMELS[:k]) for k in range(len(NUMELS))), strict=True))
    position = 0
    for b in buckets:
        assert b.x.data_ptr() == flat.storages[0].data_ptr() + 4 * position
        assert b.x.numel() == b.layout.numel
        for span in b.layout.spans:
            assert span.global_offset == position + span.start
            assert (span.global_offset - starts[span.name]) % GRAIN == 0
        position += b.layout.numel
    assert position == sum(NUMELS)
    assert [b.fragment for b in buckets] == sorted(b.fragment for b in buckets)
    assert {b.fragment for b in buckets} == set(range(fragments))
    assert [b.index for b in buckets] == list(range(len(buckets)))


def test_parts_of_a_layout_keep_names_offsets_and_order() -> None:
    rng = random.Random(0)
    for _ in range(200):
        layout = random_layout(rng)
        a, b = sorted(rng.choices(range(layout.numel + 1), k=2))
        part = layout.part(a, b)
        assert part.numel == b - a
        by_position = [(s.name, s.global_offset + k) for s in layout.spans for k in range(s.numel)]
        assert [(s.name, s.global_offset + k) for s in part.spans for k in range(s.numel)] == by_position[a:b]
        assert all(left.stop == right.start for left, right in pairwise(part.spans))


def test_cuts_are_even_and_never_within_a_grain() -> None:
    rng = random.Random(1)
    for _ in range(300):
        layout = random_layout(rng)
        n, grain = rng.randint(1, 9), rng.choice([1, 2, 32, 64, 4096])
        cuts = layout.cuts(n, grain)
        assert len(cuts) == n + 1
        assert (cuts[0], cuts[-1]) == (0, layout.numel)
        assert list(cuts) == sorted(cuts)
        allowed = {s.start + k for s in layout.spans for k in range(0, s.numel, grain)} | {layout.numel}
        assert set(cuts) <= allowed
        # Rounded to the nearest multiple, or to a nearer end of the span.
        assert all(abs(cut - layout.numel * k / n) <= grain / 2 + 1 for k, cut in enumerate(cuts))


@pytest.mark.parametrize("fragments", [1, 3])
def test_what_is_kept_whole_lies_in_one_bucket_whatever_the_number_of_ranks(fragments: int) -> None:
    """Also where it is larger than a bucket may be; others are cut as ever."""
    flat, _ = make(NUMELS)

    def cut(ranks: int) -> list[Layout]:
        buckets = make_buckets(
            flat, num_fragments=fragments, bucket_bytes=20_000, num_ranks=ranks, with_grad=False,
            keeps_whole=lambda s: s.name in ("1", "4"),
        )  # fmt: skip
        assert [b.fragment for b in buckets] == sorted(b.fragment for b in buckets)
        return [b.layout for b in buckets]

    assert cut(1) == cut(2) == cut(5)
    spans = [s for layout in cut(1) for s in layout.spans]
    assert [s.numel for s in spans if s.name in ("1", "4")] == [50_000, 12_288]
    assert [s.numel for s in spans if s.name == "6"] == [4096, 9000 - 4096]
    assert sum(s.numel for s in spans) == sum(NUMELS)


@pytest.mark.parametrize("codec", ["identity", "bf16", "int8:64", "int4:64", "int4:4096"])
def test_wire_bytes_do_not_depend_on_ranks_or_islands(codec: str) -> None:
    bound = by_name(codec, error_feedback=False)
    totals = set()
    for ranks in (1, 2, 3):
        _, buckets = make(NUMELS, ranks=ranks)
        totals.add(sum(bound.bind(b.layout).wire_bytes - HEADER_BYTES for r in range(ranks) for b in buckets if b.owner == r))
        for b in buckets:
            for islands in (2, 3, 5):
                cuts = b.layout.cuts(islands, bound.grain)
                parts = [bound.bind(b.layout.part(x, y)).wire_bytes - HEADER_BYTES for x, y in pairwise(cuts)]
                assert sum(parts) == bound.bind(b.layout).wire_bytes - HEADER_BYTES
    assert len(totals) == 1
    # As if each parameter were coded alone.
    assert totals == {sum(bound.bind(Layout((Span("p", (n,), 0, 0, n),))).wire_bytes - HEADER_BYTES for n in NUMELS)}

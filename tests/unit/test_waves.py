"""Is no more of a round at hand and under way than has to be, and is each island's order the same?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain import exact, join, waves
from dtrain.bucket import Bucket, flatten, make_buckets
from dtrain.codec import by_name
from dtrain.connect import Connection
from dtrain.island.replicas import Alone, Island
from dtrain.link import Link, Peers
from dtrain.reduce import all_to_all
from dtrain.topology.static import complete
from tests.islands import run_islands
from tests.oracle.test_reduce import layout_of


def buckets(num_ranks: int, num_lanes: int = 4, count: int = 11) -> list[Bucket]:
    flat = flatten([("x", nn.Parameter(torch.zeros(4096 * count)))])
    return make_buckets(
        flat, num_fragments=1, bucket_bytes=4 * 4096, num_ranks=num_ranks, num_lanes=num_lanes, with_grad=False
    )


def test_waves_have_each_bucket_once_and_of_each_lane_one() -> None:
    order = waves.waves(buckets(4))
    assert sorted(b.index for wave in order for b in wave) == list(range(11))
    assert all(len({b.lane for b in wave}) == len(wave) for wave in order)


def test_islands_of_any_ranks_launch_in_one_order() -> None:
    """Else one would wait for what another launches after what it waits for itself."""
    assert len({tuple(tuple(b.index for b in wave) for wave in waves.waves(buckets(ranks))) for ranks in (1, 2, 4)}) == 1


def said(order: Sequence[waves.Wave]) -> list[tuple[str, int]]:
    heard: list[tuple[str, int]] = []
    waves.in_turn(
        order, lambda wave: heard.append(("begin", wave[0].index)), lambda wave: heard.append(("end", wave[0].index))
    )
    return heard


def test_two_waves_fly_while_the_next_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    order = [[b] for b in buckets(1, 1, count=4)]
    assert [word for word, _ in said(order)] == ["begin"] * 4 + ["end"] * 4, "small ones do not wait for each other"
    monkeypatch.setattr(waves, "FLYING_BYTES", 0)
    begin, end = "begin", "end"
    assert said(order) == [(begin, 0), (begin, 1), (end, 0), (begin, 2), (end, 1), (begin, 3), (end, 2), (end, 3)]
    monkeypatch.setattr(waves, "FLYING_BYTES", 3 * 4 * 4096)
    assert [word for word, _ in said(order)] == [begin, begin, begin, end, begin, end, end, end]


def test_the_plan_knows_what_share_is_at_hand_and_flies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waves, "FLYING_BYTES", 0)
    of = buckets(2, 2, count=16)  # 8 a rank
    assert waves.at_once(of) == (1 / 8, 2 / 8)


@pytest.mark.parametrize("codec", ["identity", "int4:64"])
def test_a_link_that_keeps_nothing_brings_the_same_bytes_in_wires_that_nobody_writes_again(codec: str) -> None:
    layout, cpu = layout_of((4096, 300)), torch.device("cpu")
    kept, fresh = (all_to_all(by_name(codec, error_feedback=False))(layout, Peers(0, 2)) for _ in range(2))
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number in range(2):
        x, sent = torch.randn(layout.numel, generator=torch.Generator().manual_seed(number)), []
        for path, keeps_nothing in ((kept, False), (fresh, True)):
            link = Link(0, 2, complete(0, 0, 2), keeps_nothing=keeps_nothing)
            next(path.run(x.clone(), x.clone(), path.init(cpu), link))
            wire = link.outbox[0][1]
            assert any(wire is own for own in link.fresh) == keeps_nothing
            sent.append(wire)
        assert torch.equal(*sent)
        before.append((sent[1], sent[1].clone()))
    for wire, then in before:
        assert torch.equal(wire, then)
    assert before[0][0].data_ptr() != before[1][0].data_ptr()


class Parted(Alone):
    """One rank that has the buckets' elements while they are at hand, and elsewhere what a rank holds of the parameters."""

    whole = False

    def __init__(self, held: torch.Tensor) -> None:
        self._held = held.split(4096)  # as buckets are
        self._now: set[int] = set()
        self.most = 0
        """Buckets at hand at once."""

    @contextmanager
    def at_hand(self, buckets: Sequence[Bucket], *, changes: bool) -> Iterator[None]:
        for b in buckets:
            b.x.data = self._held[b.index].clone()
            self._now.add(b.index)
        self.most = max(self.most, len(self._now))
        try:
            yield
            if changes:
                for b in buckets:
                    self._held[b.index].copy_(b.x)
        finally:
            for b in buckets:
                b.x.data = torch.empty(0)
                self._now.remove(b.index)


@pytest.mark.parametrize("recipe", ["diloco", "push_sum"])
def test_islands_of_parts_start_train_and_merge_with_the_bits_of_whole_ones(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different starts; ``push_sum`` moves the parameters before an average, and hears of it afterwards. The second island is
    whole each time."""
    monkeypatch.setattr(waves, "FLYING_BYTES", 0)
    most: list[int] = []

    def run(parted: bool) -> list[list[torch.Tensor]]:
        def island(connection: Connection) -> list[torch.Tensor]:
            draw = torch.Generator().manual_seed(connection.node)
            model = nn.Linear(128, 256, bias=False)
            model.register_buffer("mean", torch.full((3,), float(connection.node)))
            with torch.no_grad():
                model.weight.copy_(torch.randn(model.weight.shape, generator=draw))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            ranks = Parted(model.weight.detach().view(-1)) if parted and connection.node == 0 else Alone()
            link, seen = replace(connection, ranks=ranks), list[torch.Tensor]()
            with join(model, optimizer, recipe=recipe, every=2, bucket_bytes=4 * 4096, codec="identity", link=link) as sync:
                seen.append(model.weight.detach().clone())
                for _ in range(3):
                    model.weight.grad = torch.randn(model.weight.shape, generator=draw)
                    optimizer.step()
                with sync.merged():
                    seen.append(model.weight.detach().clone())
                seen.append(model.weight.detach().clone())
                seen.append(torch.tensor(sync.merge()))
                seen += [model.weight.detach().clone(), model.get_buffer("mean").clone()]
            if isinstance(ranks, Parted):
                most.append(ranks.most)
            return seen

        return run_islands(2, island)

    for whole, parted in zip(run(False), run(True), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))
    assert most == [2], "as many as fly, of 8"


def test_an_exact_average_of_a_whole_island_goes_in_waves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all wires and means of it are there at once, twice the model beside what trains."""
    orders = list[list[int]]()

    def in_turn_at_hand(ranks: Island, order: Sequence[waves.Wave], begin: Callable[..., None], end: Callable[..., None]) -> None:
        orders.append([len(wave) for wave in order])
        waves.in_turn_at_hand(ranks, order, begin, end)

    def island(connection: Connection) -> None:
        model = nn.Linear(128, 256, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        axes: dict[str, Any] = {"recipe": "diloco", "every": 2, "bucket_bytes": 4 * 4096, "codec": "identity"}
        with join(model, optimizer, link=connection, **axes) as sync:
            sync.consensus_distance()
            sync.merge()

    monkeypatch.setattr(exact, "in_turn_at_hand", in_turn_at_hand)
    run_islands(2, island)
    assert orders == [[1] * 8] * 6, "of both islands the start, the distance and the merge"


def test_ranks_with_buckets_of_their_own_wait_for_them_together() -> None:
    """A stage may have more of them than another, and for each wave all ranks of an island wait at once."""
    of = buckets(1, 1, count=3)
    stages, replicas = Alone(), Alone()
    stages.num_ranks = 2
    replicas.num_ranks = replicas.num_replicas = 2
    assert [len(wave) for wave in waves.waves_of_average(stages, of)] == [3]
    assert [len(wave) for wave in waves.waves_of_average(replicas, of)] == [1, 1, 1]
    assert waves.waves_of_average(replicas, []) == [[]], "what goes beside the last wave goes in any case"

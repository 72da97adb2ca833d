"""Which buckets of a round are at hand at once, and which under way? All where a rank has the parameters anyway. Where ranks hold
parts of these, one bucket of each lane is gathered at a time, a wave, and is let go before the next one is; and of a round
that is waited for a few waves fly. So go the start and an exact average, whose waves stay at hand while they fly, on every
island but one of plain stages: no more than a few buckets' wires and means are there beside what trains. Where all islands do
so, what a rank needs for a round is as much as these waves are, not as the model. Beside an island that launches all at once
it may be more, up to all wires of the round: what that one sends may come before its wave does, and where a path needs no
answer to what one has sent (gather, gossip), one's own wires may still be on their way when their wave has landed.

Waves are launched in an order that all islands share, whatever their ranks, as lanes are the same everywhere, and no island waits
for a wave before it has launched all that come before. So whatever it waits for others have launched, or are about to: of the
waves that are not through yet the first is waited for by nobody who has not launched it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import TYPE_CHECKING

from dtrain.bucket import Bucket
from dtrain.core import Flight, Lane
from dtrain.island.replicas import Island
from dtrain.spans import span

if TYPE_CHECKING:
    from dtrain.rounds import Level

Wave = Sequence[Bucket]

FLYING = 2
"""Waves at least, so that the link has one while another lands and the next is gathered."""
FLYING_BYTES = 8 * 2**20
"""Of fp32 parameters, not of wires, on the rank that has the least, at least: small waves do not wait for each other's round
trip, and memory is a few times this whatever the codec. Uncoded wires of it fill 0.7 Gbit/s for 100 ms, those of an island of 4
a link of 4 times that; int4 is an eighth as long, and fills an eighth of such a link: a faster one waits for round trips."""


def waves(buckets: Sequence[Bucket]) -> list[Wave]:
    """One bucket of each lane at a time."""
    lanes = defaultdict[int, list[Bucket]](list)
    for b in buckets:
        lanes[b.lane].append(b)
    return [[b for b in wave if b is not None] for wave in zip_longest(*(lanes[lane] for lane in sorted(lanes)))]


def waves_of(ranks: Island, buckets: Sequence[Bucket]) -> list[Wave]:
    """All buckets at once where a rank has the parameters anyway."""
    return [buckets] if ranks.whole else waves(buckets)


def waves_of_average(ranks: Island, buckets: Sequence[Bucket]) -> list[Wave]:
    """All at once where each rank has buckets of its own, whole: some have more of them, and for a wave all wait together."""
    own = ranks.whole and ranks.num_replicas < ranks.num_ranks
    return [buckets] if own or not buckets else waves(buckets)


def each_at_hand(ranks: Island, buckets: Sequence[Bucket], *, changes: bool) -> Iterator[Wave]:
    """One wave after another, each at hand until the next is asked for; the island's ranks go through them together."""
    for wave in waves_of(ranks, buckets):
        with ranks.at_hand(wave, changes=changes):
            yield wave


def in_turn(order: Iterable[Wave], begin: Callable[[Wave], None], end: Callable[[Wave], None]) -> None:
    """Begin each wave, and end the oldest as soon as enough others fly."""
    flying = deque[Wave]()
    for wave in order:
        while len(flying) >= FLYING and _least_bytes(flying) >= FLYING_BYTES:
            end(flying.popleft())
        begin(wave)
        flying.append(wave)
    for wave in flying:
        end(wave)


def in_turn_at_hand(ranks: Island, order: Iterable[Wave], begin: Callable[[Wave], None], end: Callable[[Wave], None]) -> None:
    """``in_turn``, each wave at hand from its begin to its end, which may change it."""
    hands = deque[ExitStack]()
    with ExitStack() as failed:  # lets those go that fly then

        def take(wave: Wave) -> None:
            hand = ExitStack()
            failed.push(hand)
            hand.enter_context(ranks.at_hand(wave, changes=True))
            hands.append(hand)
            begin(wave)

        def give_back(wave: Wave) -> None:
            end(wave)
            hands.popleft().close()

        in_turn(order, take, give_back)


def at_once(buckets: Sequence[Bucket]) -> tuple[float, float]:
    """The largest share of a rank's elements at hand at once, and under way where they are waited for, where ranks hold parts."""
    held = defaultdict[int, int](int)
    for b in buckets:
        held[b.owner] += b.layout.numel
    flying, most = defaultdict[int, int](int), [0.0, 0.0]

    def begin(wave: Wave) -> None:
        at_hand = defaultdict[int, int](int)
        for b in wave:
            at_hand[b.owner] += b.layout.numel
            flying[b.owner] += b.layout.numel
        for k, elements in enumerate((at_hand, flying)):
            most[k] = max(most[k], *(n / held[owner] for owner, n in elements.items()))

    def end(wave: Wave) -> None:
        for b in wave:
            flying[b.owner] -= b.layout.numel

    in_turn(waves(buckets), begin, end)
    return most[0], most[1]


def _least_bytes(flying: Iterable[Wave]) -> int:
    each = defaultdict[int, int](int)
    for wave in flying:
        for b in wave:
            each[b.owner] += 4 * b.layout.numel
    return min(each.values())


Launch = Callable[[Sequence[Flight]], None]


class Waves:
    """Starts and lands one rank's rounds; the island's ranks call each method together."""

    def __init__(self, ranks: Island, launch: Launch, wait_for: Launch, left: Callable[[], bool]) -> None:
        """``wait_for``: returns when these flights of all ranks are done; ``left``: whether a peer has left, so that nothing more
        is launched, as all ranks know after they waited."""
        self._ranks, self._launch, self._wait_for, self._left = ranks, launch, wait_for, left

    def fly(self, level: Level, buckets: Sequence[Bucket], flights: Sequence[Flight]) -> bool:
        """Launch the flights, which are of these buckets, and land them where they are waited for; returns whether they are."""
        core = level.core

        def begin(wave: Wave) -> None:
            numbers = {b.index for b in wave}
            own = [flight for flight in flights if flight.bucket in numbers]
            if self._left():
                for flight in own:
                    flight.drop()
                return
            with self._ranks.at_hand(wave, changes=core.plan.moves):
                self._launch(own)

        def end(wave: Wave) -> None:
            lanes = lanes_in(wave, core.due(core.step))
            self._wait_for(flights_of(lanes))
            self.land(level, wave, lanes)

        if core.delay_steps > 0 or core.plan.graph is not None:
            for wave in waves_of(self._ranks, buckets):
                begin(wave)
            return False
        in_turn(waves_of(self._ranks, buckets), begin, end)
        core.adapt(core.step)
        return True

    def land(self, level: Level, buckets: Sequence[Bucket], lanes: Sequence[Lane]) -> None:
        """Land what is here, of these buckets."""
        with span("land"):
            for wave in each_at_hand(self._ranks, buckets, changes=True):
                for lane in lanes_in(wave, lanes):
                    level.core.land(lane)


def flights_of(lanes: Sequence[Lane]) -> list[Flight]:
    """What they have in the air."""
    return [lane.flight for lane in lanes if lane.flight is not None]


def lanes_in(wave: Wave, lanes: Sequence[Lane]) -> list[Lane]:
    numbers = {b.index for b in wave}
    return [lane for lane in lanes if lane.bucket.index in numbers]

"""In which order do the rounds of a job's levels start and land? A job without levels has one, and the order is its own.

Where rounds land before an update, nearer levels land first. After an update nearer levels start last, so that what they send is
where the far level's round began; but a nearer level that waits for its rounds has ended one before. What a level adds to the
parameters commutes with what another adds: where one pass over the parameters lands near rounds, updates and encodes the next
ones (``fused.py``), far rounds land before it and start after it, and only those that take the parameters' place where they
begin (``levels.replaces``) keep that pass from its encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.optim import Optimizer

from dtrain.assemble import Plan, cut
from dtrain.bucket import MAX_BUCKETS, Bucket, Flat
from dtrain.connect import Connection
from dtrain.core import Core, Lane
from dtrain.levels import replaces
from dtrain.link import Peers
from dtrain.moments import with_moments
from dtrain.recipe import Recipe
from dtrain.waves import Wave, each_at_hand, lanes_in

_NAMES = ("near", "far")


@dataclass(frozen=True, slots=True)
class Level:
    core: Core
    buckets: Sequence[Bucket]
    """Of all ranks of the island; the core has this rank's."""

    def fragments_due(self, step: int, num_ranks: int) -> set[int]:
        """The fragments of which rounds land at this step, on whatever rank: each finds the same answer without asking."""
        return {lane.bucket.fragment for lane in self.core.due(step)} if num_ranks == 1 else self.core.landing(step)


class Rounds:
    """All levels of one rank, the nearest first."""

    def __init__(
        self, recipe: Recipe, plans: Sequence[Plan], cuts: Sequence[Sequence[Bucket]], connection: Connection
    ) -> None:
        node = connection.node
        self._ranks = connection.ranks
        of_level: list[tuple[Peers, range | None]] = [(Peers(node, connection.num_nodes, plans[-1].pace.shares), None)]
        if recipe.near is not None:
            group = group_of(recipe, node)
            of_level.insert(0, (Peers(node - group.start, len(group)), group))
        self.levels = tuple(
            Level(Core(plan, self._own(buckets), peers, connection.ranks.total, islands), buckets)
            for plan, buckets, (peers, islands) in zip(plans, cuts, of_level, strict=True)
        )

        for level in self.levels:  # ranks that hold parts have room for a part of a round alone
            level.core.keeps_nothing = not self._ranks.whole
            level.core.lanes.sort(key=lambda lane: lane.bucket.index)

    def _own(self, buckets: Sequence[Bucket]) -> Iterator[Bucket]:
        """This rank's, each at hand until the next is asked for."""
        for wave in each_at_hand(self._ranks, buckets, changes=False):
            yield from (b for b in wave if b.owner == self._ranks.replica)

    @property
    def first(self) -> Core:
        """The nearest level's: the only one that may rewrite gradients, or share the optimizer's pass."""
        return self.levels[0].core

    @property
    def last(self) -> Core:
        """Whose peers are all islands."""
        return self.levels[-1].core

    @property
    def step(self) -> int:
        return self.first.step

    @step.setter
    def step(self, step: int) -> None:
        for level in self.levels:
            level.core.step = step

    @property
    def lanes(self) -> list[Lane]:
        return [lane for level in self.levels for lane in level.core.lanes]

    @property
    def landings(self) -> range:
        """The steps at which what flies now may land."""
        return range(self.step, max(level.core.last_landing for level in self.levels) + 1)

    def in_flight(self) -> list[Lane]:
        return [lane for level in self.levels for lane in level.core.in_flight()]

    def starting(self) -> Iterator[Level]:
        """In the order in which they start after an update."""
        near, *further = self.levels
        if near.core.plan.delay_steps == 0:
            yield near
        yield from further
        if near.core.plan.delay_steps > 0:
            yield near

    def replaced(self, step: int) -> bool:
        """Whether a further level's round that begins after ``step`` takes the parameters' place there."""
        return any(replaces(level.core.plan.recipe) and level.core.begun(step) for level in self.levels[1:])

    def drained(self) -> None:
        """All that flew has landed, what a run that this one goes on with had in the air among it."""
        for level in self.levels:
            level.core.adapt(self.step)

    def rest(self, before: Callable[[Wave], None]) -> None:
        """All parameters are about to become the islands' exact mean. ``before``: is shown the nearest level's buckets while they
        are as they were."""
        for level in self.levels:
            for wave in each_at_hand(self._ranks, level.buckets, changes=True):
                if level is self.levels[0]:
                    before(wave)
                for lane in lanes_in(wave, level.core.lanes):
                    lane.rest()

    def merged(self) -> None:
        """All parameters are the islands' exact mean now."""
        for level in self.levels:
            for wave in each_at_hand(self._ranks, level.buckets, changes=False):
                for lane in lanes_in(wave, level.core.lanes):
                    lane.merged()

    def state_dict(self) -> dict[str, Tensor]:
        if len(self.levels) == 1:
            return self.first.state_dict()
        named = zip(_NAMES, self.levels, strict=True)
        return {f"{name}.{key}": value for name, level in named for key, value in level.core.state_dict().items()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Raises ValueError, with nothing changed, where ``saved`` is of another recipe or another cut of the model."""
        parts = [saved]
        if len(self.levels) > 1:
            parts = [{k.removeprefix(f"{name}."): v for k, v in saved.items() if k.startswith(f"{name}.")} for name in _NAMES]
        checked = [level.core.checked(part) for level, part in zip(self.levels, parts, strict=True)]
        for level, part in zip(self.levels, checked, strict=True):
            level.core.load(part)


def group_of(recipe: Recipe, node: int) -> range:
    """The islands of one's group; none without levels."""
    if recipe.near is None:
        return range(0)
    first = node - node % recipe.near.islands
    return range(first, first + recipe.near.islands)


def cut_levels(
    plans: Sequence[Plan], flat: Flat, optimizers: Sequence[Optimizer], connection: Connection
) -> list[list[Bucket]]:
    """The buckets of each level, all of different numbers, by which their wires are named, and their lanes for the transport;
    raises ValueError for too many."""
    cuts: list[list[Bucket]] = []
    ranks = connection.ranks
    num_ranks, num_lanes = ranks.num_replicas, connection.num_lanes if ranks.num_replicas == ranks.num_ranks else 1
    for plan in plans:
        buckets = cut(plan.recipe, flat, num_ranks=num_ranks, num_lanes=num_lanes, with_grad=plan.rewrites_gradients)
        if plan.recipe.moments is not None:
            buckets = with_moments(plan.recipe.name, buckets, flat, optimizers)
        before = sum(map(len, cuts))
        if before + len(buckets) > MAX_BUCKETS:
            raise ValueError(
                f"bucket_bytes cuts the model into {before + len(buckets)} buckets, those of both levels together; at most "
                f"{MAX_BUCKETS}: raise it"
            )
        cuts.append([replace(b, index=before + b.index) for b in buckets] if before else buckets)
    connection.lanes.update({b.index: b.lane for buckets in cuts for b in buckets})
    return cuts

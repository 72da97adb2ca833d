"""Which rounds start, fly and land at which step? The heart without thread, clock or socket.

traffic.py carries its flights, over a real link or in one process; the steps are the same, so the bits are. For a
round that starts after step t with a delay of d steps: d = 0 lands at once; d > 0 lands before the update of step t
+ d. Where pairs meet when both are ready (``meetings.py``) d says nothing: a round lands as soon as all of it is here.

Where H adapts (DiLoCoX, arXiv 2506.21263), round t, which is sent with r_t columns, starts H_t steps before round t + 1:
    alpha_t = r_t / r_1;   H_t = alpha_t H_1, rounded up.
r_t counts those of all matrices of an island's model. Round t - 1 leaves it, on all islands alike (``low_rank.py``), and has
landed when round t starts, so that H_t is known by then. A shorter exchange hides behind fewer steps; what goes whole in it, as
embeddings do, is as long as before, and may have to be waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.algorithm import Algorithm
from dtrain.assemble import Plan
from dtrain.bucket import Bucket
from dtrain.codec import State, Update
from dtrain.link import Link, Peers, carried
from dtrain.schedule import Control
from dtrain.transport.base import ROUND, Tag
from dtrain.wire import same_header

_SPACED = ("rounds at steps that all share", "meetings of two that are ready")


class Flight:
    """A generator whose wires are under way: one round of one bucket, or an exchange of the start or the merge."""

    __slots__ = (
        *("_generator", "bucket", "done", "dropped", "error", "index", "kind", "link", "matched", "overdue", "phase", "step"),
        "undecided",
    )

    def __init__(self, generator: Iterator[None], link: Link, *, kind: int, index: int, bucket: int, step: int) -> None:
        self.link = link
        self.kind = kind
        self.index = index
        self.bucket = bucket
        self.step = step
        self.phase = -1
        self.done = False
        self.dropped = False
        self.matched = True
        """False while it waits for somebody to exchange its wires with."""
        self.undecided = False
        """Whether it is open whose wires it takes (``roll_call.py``)."""
        self.overdue = False
        """Whether its wires are waited for, though it may land at any step."""
        self.error: Exception | None = None
        self._generator = generator

    def tag(self) -> Tag:
        return Tag(self.kind, self.index, self.bucket, self.phase)

    def advance(self) -> None:
        """Run to the next yield; afterwards link.outbox is to be posted and link.expected to be waited for, or it is
        done."""
        self.phase += 1
        if self.phase:
            self.link.new_phase()
        try:
            next(self._generator)
        except StopIteration:
            self.done = True

    def drop(self) -> None:
        """Give the round up: a peer that it needs has left."""
        self.done = self.dropped = True


class Lane:
    """One bucket with its algorithm, state, and the round that flies."""

    __slots__ = ("algorithm", "bucket", "flight", "land_step", "round", "state")

    def __init__(self, bucket: Bucket, algorithm: Algorithm) -> None:
        self.bucket = bucket
        self.algorithm = algorithm
        self.state: State = algorithm.init(bucket)
        self.round = 0
        self.land_step = -1
        self.flight: Flight | None = None

    def rest(self) -> None:
        """All parameters are about to become the islands' exact mean."""
        if self.algorithm.rest is not None:
            self.algorithm.rest(self.bucket, self.state)

    def merged(self) -> None:
        """All parameters are the islands' exact mean now."""
        if self.algorithm.merged is not None:
            self.algorithm.merged(self.bucket, self.state)


class Adapted(NamedTuple):
    """What of an island's rounds does not stay as it began; None where it does."""

    every_steps: int | None = None
    """H: steps from the start of the last rounds to that of the next."""
    rank_mean: float | None = None
    """Of the next rounds, over all matrices of the island's model that go as products."""


class Core:
    """All lanes that this rank carries, and the step count."""

    def __init__(
        self, plan: Plan, buckets: Iterable[Bucket], peers: Peers,
        island_sum: Callable[[Sequence[float]], Sequence[float]] = tuple, islands: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """``buckets``: each at hand until the next is asked for. ``island_sum``: element by element over the ranks of the island,
        which all call it; of one rank the values. ``islands``: which the peers are, where they are not all."""
        self.plan, self.control = plan, plan.control
        self.peers = peers
        self.step = 0
        self.keeps_nothing = False
        """Whether rounds make what they need beside State, and let it go (``Link.keeps_nothing``)."""
        self._islands = islands
        self.lanes = [Lane(b, plan.methods[b.index % len(plan.methods)](b.layout, peers)) for b in buckets]
        if not plan.rewrites_gradients and any(lane.algorithm.grad is not None for lane in self.lanes):
            raise ValueError(f'{plan.recipe.name}: a method with grad is run where its row says payload = "gradients" only')
        self._island_sum = island_sum
        self._columns_at_first = self._columns = self._matrices = 0
        self._loaded_at = 0
        """The step of the state that this goes on with."""
        self._loaded: dict[int, set[int]] = {}
        """Which fragments' rounds were in the air there, on whatever rank, by the updates before which they land."""
        self.adapt()
        self._columns_at_first = self._columns

    def start_gradients(self) -> list[Flight]:
        """The exchange that rewrites the gradients of step + 1; one flight a bucket, finished before the update."""
        flights = []
        for lane in self.lanes:
            if lane.algorithm.grad is not None:
                link = self._link(lane)
                generator, link = self._over(lane.algorithm.grad(lane.bucket, lane.state, link), link)
                flights.append(
                    Flight(generator, link, kind=ROUND, index=lane.round, bucket=lane.bucket.index, step=self.step + 1)
                )
                lane.round += 1
        return flights

    def start_rounds(self) -> list[Flight]:
        """The rounds that start now, after step ``self.step``."""
        if self.plan.every_adapts and self.begun(self.step):
            every = -(-self.plan.control.every * self._columns // self._columns_at_first)
            self.control = Control(max(self.plan.recipe.least_every, every), self.step)
        return [self.start(lane, self.step) for lane in self.lanes if self.starts(lane, self.step)]

    @property
    def delay_steps(self) -> int:
        """Of the rounds that started last."""
        whole = self.plan.every_adapts and self.plan.recipe.delay == "round"
        return self.control.every if whole else self.plan.delay_steps

    def adapt(self, step: int = 0) -> None:
        """What was due at ``step`` has landed, on each rank of the island: H of the rounds that start next follows from it."""
        self._landed_at = step
        if self.plan.ranks is not None:
            own = [rank for lane in self.lanes for rank in self.plan.ranks(lane.state)]
            self._columns, self._matrices = map(int, self._island_sum([sum(own), len(own)]))

    def adapted(self, step: int | None = None) -> Adapted:
        """What the last rounds that landed have left; nothing where a ``step`` is given and none were due there."""
        if self.plan.ranks is None or step not in (None, self._landed_at):
            return Adapted()
        return Adapted(self.control.every if self.plan.every_adapts else None, self._columns / self._matrices)

    def begun(self, step: int) -> set[int]:
        """The fragments of which rounds start after ``step``, on whatever rank: each finds the same answer without asking."""
        return {f for f in range(self.plan.recipe.fragments) if self.plan.when(step, f, self.control)}

    def landing(self, step: int) -> set[int]:
        """The fragments of which rounds land at this step, on whatever rank: each finds the same answer without asking. What flew
        in a state that was loaded lands where it would have, though every and delay may be others now."""
        begun = step - self.delay_steps
        own = self.begun(begun) if self.plan.sends and begun > self._loaded_at else set[int]()
        return own | self._loaded.get(step, set())

    @property
    def last_landing(self) -> int:
        """The latest step at which what flies now may land."""
        return max(self.step + self.delay_steps, *self._loaded, 0)

    def to_land(self, step: int) -> int:
        """How many updates after the next one the last of what flies after ``step`` lands, on any island: each finds the same
        answer without asking. 0: who waits for it there waits no longer than the next update does."""
        if self.plan.graph is not None:
            return 0
        begun, delay = self._begun_last(step), self.delay_steps
        lands = [*self._loaded, begun + delay] if begun else self._loaded
        return max([0, *(land - 1 - step for land in lands)])

    def _begun_last(self, step: int) -> int:
        """The step up to ``step`` after which the last rounds started that may fly after it; 0: none of this run."""
        if self.plan.every_adapts:  # what flew before them had landed
            return self.control.since if self._loaded_at < self.control.since <= step else 0
        first = max(self._loaded_at, step - self.delay_steps)
        return next((begun for begun in range(step, first, -1) if self.begun(begun)), 0)

    def starts(self, lane: Lane, step: int) -> bool:
        """Whether a round of the lane starts after ``step``."""
        if self.plan.graph is not None and lane.land_step >= 0:
            return False
        return lane.algorithm.send is not None and self.plan.when(step, lane.bucket.fragment, self.control)

    def lands(self, lane: Lane, step: int) -> bool:
        """Whether a round that was not dropped lands before the update of ``step``."""
        return lane.land_step == step and not (lane.flight is not None and lane.flight.dropped)

    def start(self, lane: Lane, step: int) -> Flight:
        assert lane.algorithm.send is not None
        assert lane.land_step < 0, "a round must land before the next of its bucket starts"
        link = self._link(lane)
        return self._fly(lane, step, lane.algorithm.send(lane.bucket, lane.state, link), link)

    def start_fused(self, lane: Lane, step: int, update: Update, *, landing: bool) -> Flight:
        """Land what is due, do the optimizer's step and start the next round, in the flight's first part."""
        assert lane.algorithm.fused is not None
        assert lane.land_step in (-1, step), "a round must land before the next of its bucket starts"
        link = self._link(lane)
        return self._fly(lane, step, lane.algorithm.fused(lane.bucket, lane.state, link, update, landing), link)

    def _fly(self, lane: Lane, step: int, generator: Iterator[None], link: Link) -> Flight:
        link.keeps_nothing = self.keeps_nothing
        generator, link = self._over(generator, link)
        lane.flight = Flight(generator, link, kind=ROUND, index=lane.round, bucket=lane.bucket.index, step=step)
        lane.flight.undecided = self.plan.quorum is not None
        if self.plan.graph is None:
            lane.land_step = step + self.delay_steps
        else:  # its number comes with its partner, whose steps are others
            lane.land_step, lane.flight.matched, lane.flight.step = step, False, 0
        lane.round += 1
        return lane.flight

    def due(self, step: int) -> list[Lane]:
        if self.plan.graph is not None:
            flying = self.in_flight()
            return flying if all(f is None or f.done or f.overdue for f in (lane.flight for lane in flying)) else []
        return [lane for lane in self.lanes if lane.land_step == step]

    def in_flight(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.land_step >= 0]

    def land(self, lane: Lane) -> None:
        """Apply a round whose bytes are here; one that was dropped changes nothing."""
        if lane.algorithm.land is not None and self.lands(lane, lane.land_step):
            lane.algorithm.land(lane.bucket, lane.state)
        elif self.plan.graph is not None:
            lane.round -= 1  # a meeting that did not come about
        lane.flight, lane.land_step = None, -1

    @property
    def meetings(self) -> int | None:
        """Of this island so far, the one that flies among them; None where rounds have their steps."""
        return self.lanes[0].round if self.plan.graph is not None else None

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resume needs, once all bytes in flight have arrived. The keys are the same at each
        step."""
        numbers = {"step": self.step, "edges": self.plan.edges, "total_steps": self._total, "ready": self._ready}
        out = {key: torch.tensor(n) for key, n in (numbers | self._spacing()).items()}
        for lane in self.lanes:
            name = f"bucket{lane.bucket.index}"
            out[f"{name}.round"] = torch.tensor(lane.round)
            # A round that was dropped will not land, here or after a resume.
            lands = lane.land_step if self.lands(lane, lane.land_step) else -1
            out[f"{name}.land_step"] = torch.tensor(lands)
            out |= {f"{name}.{key}": value for key, value in lane.state.items()}
        return out

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Raises ValueError, with nothing changed, where ``saved`` is of another recipe or another cut of the model."""
        self.load(self.checked(saved))

    def checked(self, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state to ``load``; raises ValueError where it is of another recipe or another cut of the model."""
        own = self.state_dict()
        # A state without them is older than graphs from files, budgets, and a word on meetings, of which then its keys speak.
        like_own = all(key in own for key in saved if key.startswith("bucket"))
        missing = {"edges": self.plan.edges, "total_steps": 0, "ready": self._ready if like_own else 0}
        saved = {key: torch.tensor(n) for key, n in missing.items()} | saved
        if int(saved["ready"]) != self._ready:
            was, now = _SPACED[1 - self._ready], _SPACED[self._ready]
            raise ValueError(
                f'the saved state is of {was}, and sync.schedule = "{self.plan.recipe.schedule}" has {now}; resume with the '
                "schedule that it was saved with"
            )
        here = tuple(f"bucket{lane.bucket.index}." for lane in self.lanes)  # others may be of the island's other ranks
        for key in (*own, *(key for key in saved if key.startswith(here) and key not in own)):
            was, now = (tuple(x[key].shape) if key in x else "none" for x in (saved, own))
            if was != now:
                raise ValueError(
                    f"the saved state is of another recipe, model or number of ranks: {key} has shape {was} there and "
                    f"{now} here; resume with what it was saved with"
                )
        if int(saved["edges"]) != self.plan.edges:
            raise ValueError(
                "the saved state is of another graph, server or topology of your own; resume with what it was saved with"
            )
        if int(saved["total_steps"]) != self._total:  # another schedule, by which what flies would not land
            was, now = (f"{n} steps" if n else "every so many steps" for n in (int(saved["total_steps"]), self._total))
            raise ValueError(
                f'the saved state is of rounds spread over {was}, and sync.schedule = "{self.plan.recipe.schedule}" spreads them '
                f"over {now}; resume with the schedule and the total_steps that it was saved with"
            )
        for key, value in self._wires():
            if not same_header(saved[key], value):
                raise ValueError(f"the saved state is of another recipe: {key} is a wire of another codec; resume with its own")
        self._refuse_crossing(saved)
        return saved

    def load(self, saved: dict[str, Tensor]) -> None:
        self.step = int(saved["step"])
        if self.plan.every_adapts:
            self.control = Control(int(saved["every"]), int(saved["since"]))
            self._columns = int(saved["columns"])
        for lane in self.lanes:
            name = f"bucket{lane.bucket.index}"
            lane.round = int(saved[f"{name}.round"])
            lane.land_step = int(saved[f"{name}.land_step"])
            lane.flight = None
            for key, value in lane.state.items():
                value.copy_(saved[f"{name}.{key}"])
        self._loaded_at, self._loaded = self.step, self._flying_on_island()

    def _flying_on_island(self) -> dict[int, set[int]]:
        """The fragments in the air on any rank of the island, all of which call it, by the updates before which they land."""
        steps, lanes = ([0] * self.plan.recipe.fragments for _ in range(2))
        for lane in self.in_flight():
            steps[lane.bucket.fragment] += lane.land_step
            lanes[lane.bucket.fragment] += 1
        totals = list(map(int, self._island_sum([*steps, *lanes])))
        found: dict[int, set[int]] = {}
        for fragment, (total, count) in enumerate(zip(totals[: len(steps)], totals[len(steps) :], strict=True)):
            if count:  # a fragment's buckets all start at one step, and land at one
                found.setdefault(total // count, set()).add(fragment)
        return found

    def _refuse_crossing(self, saved: dict[str, Tensor]) -> None:
        """Another ``every`` is fine, unless a round would start while one of its bucket still flies."""
        if self.plan.graph is not None or self.plan.every_adapts:  # nothing starts there while something flies
            return
        for lane in self.lanes:
            land_step = int(saved[f"bucket{lane.bucket.index}.land_step"])
            early = [step for step in range(int(saved["step"]) + 1, land_step) if self.starts(lane, step)]
            if early:
                raise ValueError(
                    f"the saved state has a round of bucket {lane.bucket.index} that lands before update {land_step}, "
                    f"and sync.every = {self.control.every} starts the next after step {early[0]}; resume with the every "
                    "that it was saved with"
                )

    def _spacing(self) -> dict[str, int]:
        """Of rounds whose H adapts: of the last that started, and of the next."""
        if not self.plan.every_adapts:
            return {}
        return {"every": self.control.every, "since": self.control.since, "columns": self._columns}

    @property
    def _ready(self) -> int:
        """1 where pairs meet when both are ready, 0 where rounds have their steps."""
        return int(self.plan.graph is not None)

    @property
    def _total(self) -> int:
        """Steps over which a budget is spent; 0 of a schedule without."""
        return self.plan.recipe.total_steps or 0

    def _wires(self) -> Iterator[tuple[str, Tensor]]:
        for lane in self.lanes:
            yield from ((f"bucket{lane.bucket.index}.{k}", v) for k, v in lane.state.items() if v.dtype == torch.uint8)

    def _over(self, generator: Iterator[None], link: Link) -> tuple[Iterator[None], Link]:
        """What talks over a link of the peers, over one of the islands, by whose numbers wires go."""
        if self._islands is None:
            return generator, link
        whole = Link(self._islands[link.node], link.num_nodes, link.row, link.round)
        return carried(generator, link, whole, self._islands), whole

    def _link(self, lane: Lane) -> Link:
        # An exchange of gradients and the round after it count as two, and talk over the same edges.
        both = lane.algorithm.grad is not None and lane.algorithm.send is not None
        number = lane.round // 2 if both else lane.round
        row = self.plan.topology(number, self.peers.node, self.peers.num_nodes)
        return Link(self.peers.node, self.peers.num_nodes, row, number)

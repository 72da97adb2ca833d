"""How does a training loop become one island of a job? ``join`` hooks an optimizer to the rounds.

    with dtrain.join(model, optimizer) as sync:
        for batch in loader:
            optimizer.zero_grad(); model(batch).loss.backward(); optimizer.step()

After each ``optimizer.step()`` the rounds that are due start; before it, those that are due land. The hooks are an
adapter: where they do not fit, call ``before_update`` and ``after_update`` yourself. No backward hooks, so
accumulation, mixed precision and global clipping keep their meaning."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.assemble import assemble_levels, prepare_kernels
from dtrain.connect import Connection, connect
from dtrain.core import Flight
from dtrain.corrected import moments
from dtrain.errors import IslandsDiffer
from dtrain.exact import Exact, refuse_unequal_steps
from dtrain.fused import fused_steps
from dtrain.gradients import gradients_of
from dtrain.held import flat_of, inside_of
from dtrain.hooks import hook, take_over
from dtrain.island.device import made_current
from dtrain.island.norm import clip_gradients
from dtrain.loop_fits import check_loop, optimizers_of, refuse_idle, refuse_past_end
from dtrain.membership import Notice
from dtrain.optim.sam import SAM
from dtrain.recipe_fits import check_ranks
from dtrain.recipes import Recipe, of_join, of_section, with_speeds, with_start
from dtrain.roll_call import agreement
from dtrain.rounds import Level, Rounds, cut_levels, group_of
from dtrain.spans import span
from dtrain.traffic import Traffic
from dtrain.wait import Stats, Wait
from dtrain.waves import Waves, flights_of

log = logging.getLogger("dtrain")


class Sync:
    """One island's part in the job; a context manager. On an exception it does not drain. After one in a step or a merge the
    model is undefined, as some of its buckets may have landed and others not: go on from a checkpoint.

    Where an island has several ranks they call each method together; only ``stats`` and the properties are local."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        recipe: Recipe,
        connection: Connection,
        *,
        clip: float | None,
        seed: int,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.recipe = recipe
        self.island, self.num_islands = connection.node, connection.num_nodes
        self._model, self._connection, self._ranks, self._clip = model, connection, connection.ranks, clip
        check_ranks(recipe, self._ranks.num_ranks)
        plan, *_ = plans = assemble_levels(recipe, seed, connection.num_nodes)
        self._flat = flat_of(model, recipe.include, recipe.exclude, self._ranks)
        device = self._flat.device
        for level in recipe.levels:
            prepare_kernels(level, device, lambda: log.warning("compiling the CPU kernels, once: about half a minute"))
        cuts = cut_levels(plans, self._flat, optimizers, connection)
        self.buckets = cuts[0]
        self._gradients = gradients_of(self.buckets, self._flat, self._ranks) if plan.rewrites_gradients else None
        self._traffic = Traffic(connection.transport, self.buckets[0].x.device, group_of(recipe, connection.node))
        self._wait = Wait(connection, self._traffic)
        self._waves = Waves(self._ranks, self._launch, self._wait_for, lambda: self._wait.peer_left)
        self._exact = Exact(model, self._flat, self.buckets, connection, self._traffic, self._wait)
        self._prepared = self._closed = False
        self._merged_at: tuple[int, ...] = ()
        self._agreement = None
        with ExitStack() as undo:
            undo.push(lambda kind, error, trace: self._leave(0, failed=not isinstance(error, IslandsDiffer)))
            self._exact.align(recipe, seed, [plan.edges for plan in plans])
            self._wait.waited_s = 0.0  # until here for islands that load slower, not for the link
            self._rounds = Rounds(recipe, plans, cuts, connection)
            self.core, self.levels = self._rounds.last, self._rounds.levels  # the core's peers are all islands
            self._fused = fused_steps(self._rounds.first, optimizers, self._flat, self._ranks)
            self._agreement = agreement(self.core, connection, self._traffic, self._wait)
            self._release = hook(optimizers, scaler, self)
            if self._fused is not None:
                self._release = take_over(optimizers[0], self._fused_step, self._release)
            undo.pop_all()

    # ---- what the optimizer hooks call

    @property
    def step(self) -> int:
        """Optimizer steps that this island has done, skipped and idle ones included."""
        return self._rounds.step

    def begin_after(self, step: int) -> None:
        """Count from ``step``, where somebody else did those before."""
        self._rounds.step = step

    @property
    def idle(self) -> bool:
        """Whether this island does not train in the step that comes, slower than others (``speeds``): ``sit_out`` counts it."""
        return not self.core.plan.pace.trains(self.island, self.step + 1)

    def sit_out(self) -> None:
        """Count a step that is idle, land and start the rounds that are due."""
        if not self.idle:
            raise ValueError(f"step {self.step + 1} is not idle on island {self.island}; sit out where sync.idle is true")
        self.after_update(skipped=True)

    @property
    def prepared(self) -> bool:
        """Whether before_update has run for the step that is under way."""
        return self._prepared

    @torch.no_grad()
    def before_update(self) -> None:
        """Land the rounds that are due, exchange gradients where the method does, clip. Gradients are complete
        here. Call it and ``after_update`` yourself where hooks do not fit, and give join no optimizer then."""
        refuse_idle(self)
        if self._fused is None:
            self._land_due(self.step + 1)
        else:  # the optimizer's step lands the nearest level's
            near, *further = self._rounds.levels
            if near.fragments_due(self.step + 1, self._ranks.num_ranks):
                self._wait_for(flights_of(near.core.due(self.step + 1)))
            for level in further:
                self._land(level, self.step + 1)
        plan, num_nodes = self._rounds.first.plan, self._rounds.first.peers.num_nodes
        if self._clip and plan.signs:
            clip_gradients(self._flat.trained, self._clip, self._ranks)
        if self._gradients is not None and plan.exchanges(num_nodes):
            self._exchange_gradients()
        if self._clip and self._fused is None and not plan.signs:  # a fused step clips in its own pass
            clip_gradients(self._flat.trained, self._clip, self._ranks)
        self._prepared = True

    @torch.no_grad()
    def after_update(self, *, skipped: bool = False) -> None:
        """Count the step and start the rounds that are due. A step that the loss scaler skipped is one on every island."""
        refuse_past_end(self.recipe, self.step)
        if not self._prepared:
            assert skipped, "after_update without before_update is for skipped steps"
            self._land_due(self.step + 1)
        self._prepared = False
        self._rounds.step += 1
        started = self._rounds.first if self._starts_in_pass(self.step) and not skipped else None
        for level in self._rounds.starting():
            landed = level.core is not started and self._start(level)
            if level.core.delay_steps == 0 and not landed:
                self._land(level, self.step)

    # ---- what a loop may ask for

    def stats(self) -> Stats:
        """Counts so far, of the whole island; with several ranks bytes as of the last wait, when they were added up."""
        return self._wait.stats(self.step)

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The exact average of all islands in the model while the block runs, rounds in flight apart; all islands enter it after
        the same number of steps. The average's waiting is not counted, that for rounds in flight is."""
        self.settle()
        waited_s = self._wait.waited_s
        restore = self._exact.keep(self._rounds)
        try:
            self._average()
            self._wait.waited_s = waited_s
            yield self._model
        finally:
            restore()
        refuse_unequal_steps(self._merged_at)

    def merge(self) -> float:
        """Land what flies, then replace every island's model (buffers too) by the exact average, the same bits on all
        islands.

        Returns the consensus distance before the merge: sqrt(mean_i |x_i - mean x|^2). Where it raises, some parameters may be
        the mean already and others not: keep none of them."""
        self.drain()
        self._exact.rest(self._rounds)
        distance = self._average()
        self._rounds.merged()
        return distance

    def merge_corrected(self) -> float:
        """``merge`` for islands that were never in sync: it gives back the variance that a mean takes out (``corrected.py``)."""
        if not self._ranks.whole:
            raise ValueError("merge_corrected needs each tensor whole on one rank, and this island's are sharded; use merge")
        self.drain()
        self._exact.rest(self._rounds)
        before, distance = moments(self._flat.parameters), self._average()
        self._exact.correct(self.step, before)
        self._rounds.merged()
        return distance

    def consensus_distance(self) -> float:
        """sqrt(mean_i |x_i - mean x|^2) over all shared parameters. Costs an exact average on the link, whose waiting is not
        counted; leaves the model alone."""
        self.settle()
        waited_s = self._wait.waited_s
        restore = self._exact.keep(self._rounds)
        try:
            distance = self._average()
        finally:
            restore()
        self._wait.waited_s = waited_s
        refuse_unequal_steps(self._merged_at)
        return distance

    def settle(self) -> None:
        """Wait for the bytes of all rounds in flight. They land when their step comes, of the islands they would have been of."""
        if self._agreement is not None:
            self._agreement.withdraw()
        self._wait_for(flights_of(self._rounds.in_flight()))

    @torch.no_grad()
    def drain(self) -> None:
        """Wait for all rounds in flight and land them now, in the order of their steps."""
        self.settle()
        for step in self._rounds.landings:
            self._land_due(step)
        self._rounds.drained()

    def state_dict(self) -> dict[str, Tensor]:
        """All of this rank's state that a bit-identical resume needs, as tensors; waits for bytes in flight."""
        self.settle()
        return self._rounds.state_dict() | self._wait.state_dict()

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave on the same rank; raises ValueError where it is of another recipe or cut.

        The parameters and the inner optimizer are the caller's to restore, and after ``join``: join makes the
        islands' weights equal, and in the middle of a run they are not."""
        self._rounds.load_state_dict(saved)
        self._wait.load_state_dict(saved)

    def close(self, *, failed: bool = False) -> None:
        """Take the hooks off, say good-bye, let the last wires leave (not after a failure)."""
        self._release()
        if self._closed:
            return
        self._closed = True
        self._leave(self.step, failed=failed)

    def _leave(self, step: int, *, failed: bool) -> None:
        membership = self._connection.membership
        membership.announce(Notice(step, self._exact.merges, failed=failed))
        if self._agreement is not None:
            self._agreement.close()
        self._traffic.close(
            drain_s=0.0 if failed else self._connection.timeout_s,
            left=lambda: {n for n, notice in membership.notices().items() if notice.final},
        )

    def __enter__(self) -> Sync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        drained = False
        try:
            if kind is None:
                self.drain()
                drained = True
        finally:
            self.close(failed=not drained and not isinstance(error, IslandsDiffer))

    # ---- rounds and waiting

    def _starts_in_pass(self, step: int) -> bool:
        """Whether the optimizer's step number ``step`` starts the nearest level's rounds too."""
        return self._fused is not None and not self._rounds.replaced(step)

    def _start(self, level: Level) -> bool:
        """Start the rounds of a level that begin now. Returns whether they were waited for, and have landed."""
        if self._wait.peer_left:
            return False
        begun = level.core.begun(self.step) if level.core.plan.sends else set[int]()
        flights = level.core.start_rounds() if self._agreement is None else self._agreement.after_step()
        return bool(begun) and self._waves.fly(level, [b for b in level.buckets if b.fragment in begun], flights)

    def _launch(self, flights: Sequence[Flight]) -> None:
        if flights:
            self._flat.check_in_place(self._model)
            refuse_unequal_steps(self._merged_at)
        with span("launch"):  # payload, encoding, and handing to the transport
            self._traffic.launch(flights)
        if self._agreement is not None:
            self._agreement.ask(flights)

    @torch.no_grad()
    def _fused_step(self) -> None:
        """The optimizer's step, while it is taken over."""
        assert self._fused is not None
        starts = not self._wait.peer_left and self._starts_in_pass(self.step + 1)
        flights = self._fused.step(self.step + 1, clip=self._clip, may_start=starts)
        self._launch(flights)
        for flight in flights:
            if flight.error is not None:  # the step itself may not have been done
                raise flight.error

    def _wait_for(self, flights: Sequence[Flight]) -> None:
        with span("wait"):
            self._wait.all(self.step, self._exact.merges, flights)

    def _land_due(self, step: int) -> None:
        for level in self._rounds.levels:
            self._land(level, step)

    def _land(self, level: Level, step: int) -> None:
        fragments = level.fragments_due(step, self._ranks.num_ranks)
        if not fragments:
            return
        lanes = level.core.due(step)
        self._wait_for(flights_of(lanes))
        # After a drop ranks may differ in which rounds landed; that makes them equal again.
        self._waves.land(level, [b for b in level.buckets if b.fragment in fragments], lanes)
        level.core.adapt(step)

    def _exchange_gradients(self) -> None:
        assert self._gradients is not None
        with span("gradients"):
            self._gradients.read()
        flights = [] if self._wait.peer_left else self._rounds.first.start_gradients()
        self._launch(flights)
        self._wait_for(flights)
        with span("gradients"):
            if self._rounds.first.plan.signs:  # of what was dropped or not begun too; a sign's sign is itself
                for b in self.buckets:
                    if b.owner == self._ranks.replica and b.g is not None:
                        b.g.sign_()
            self._gradients.write()

    def _average(self) -> float:
        averaged = self._exact.average(self.step)
        self._merged_at = averaged.steps
        return averaged.distance


def join(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer] | SAM,
    *,
    recipe: str | None = None,
    every: int | str | None = None, schedule: str | None = None, moments: str | None = None,
    delay: int | Literal["round"] | None = None, quorum: int | str | None = None, grace: str | None = None,
    codec: str | None = None, error_feedback: bool | None = None, feedback_decay: float | None = None,
    topology: str | None = None, graph: str | None = None, server: str | None = None, participants: int | None = None,
    reduce: str | None = None, rank: int | str | None = None,
    outer: str | None = None, outer_lr: float | None = None, outer_momentum: float | None = None,
    outer_state: str | None = None, gamma: float | None = None, gossip_steps: int | None = None,
    landing: str | None = None, alpha: float | None = None,
    fragments: int | None = None, bucket_bytes: int | None = None,
    include: Sequence[str] | None = None, exclude: Sequence[str] | None = None,
    total_steps: int | None = None, speeds: Sequence[float] = (),
    start: Literal["same", "own"] = "same",
    clip: float | None = None, seed: int = 0, scaler: torch.amp.GradScaler | None = None, link: Connection | None = None,
) -> Sync:  # fmt: skip
    """Make this process one island (or one rank of one) of a job.

    The islands' weights are compared by hash and island 0's are sent where they differ; with start = "own" they may. Axes left
    out are the recipe's; a recipe left out is the job file's under ``dtrain run JOB.toml -- script.py``, else the default.
    ``include`` and ``exclude`` say by patterns which parameters are shared; the others stay the island's own (``chosen.py``).
    ``clip`` is the global gradient norm, applied after gradients are exchanged (by demo, which makes signs of them, before).
    ``total_steps`` are the whole run's, which a schedule with a budget of rounds must know. ``speeds`` are all islands', beside
    the fastest's 1: one of 0.5 sits out half of the steps (``Sync.idle``), and counts half in means. Give the GradScaler, if
    there is one, so that a step it skips is counted. ``link`` is for islands that were connected by hand; the launcher's
    environment is read otherwise.

    Raises ValueError for settings that do not fit, PeerLost when an island does not come."""
    axes: dict[str, object] = {
        "every": every, "schedule": schedule, "moments": moments, "delay": delay, "quorum": quorum, "grace": grace,
        "codec": codec, "error_feedback": error_feedback, "feedback_decay": feedback_decay,
        "topology": topology, "graph": graph, "server": server, "reduce": reduce, "rank": rank,
        "participants": participants, "outer": outer, "outer_lr": outer_lr, "outer_momentum": outer_momentum,
        "outer_state": outer_state,
        "gamma": gamma, "gossip_steps": gossip_steps, "landing": landing, "alpha": alpha,
        "fragments": fragments, "bucket_bytes": bucket_bytes, "include": include, "exclude": exclude,
    }
    connection = link or connect(device=made_current(next(model.parameters()).device), inside=inside_of(model))
    said = {k: v for k, v in axes.items() if v is not None}
    of_job = {"recipe": connection.job_recipe, **connection.job_axes} if recipe is None else {"recipe": recipe}
    row = of_join(of_section({**of_job, **said}, connection.num_nodes), total_steps)
    row = with_speeds(with_start(row, start), speeds, connection.num_nodes)
    check_loop(row, optimizers, clip=clip, scaler=scaler)
    if isinstance(optimizers, SAM):
        optimizers.joined = connection.ranks.joined
    return Sync(model, optimizers_of(optimizers), row, connection, clip=clip, seed=seed, scaler=scaler)

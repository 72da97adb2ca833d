"""How does a training loop become one island of a job? ``join`` hooks an optimizer to the rounds.

    with dtrain.join(model, optimizer) as sync:
        for batch in loader:
            optimizer.zero_grad(); model(batch).loss.backward(); optimizer.step()

After each ``optimizer.step()`` the rounds that are due start; before it, those that are due land. The hooks are an
adapter: where they do not fit, call ``before_update`` and ``after_update`` yourself. No backward hooks, so
accumulation, mixed precision and global clipping keep their meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.assemble import assemble
from dtrain.bucket import flatten, make_buckets, whole
from dtrain.buffers import pack_buffers, state_buffers, unpack_buffers
from dtrain.connect import Connection, connect
from dtrain.core import Core, Flight
from dtrain.exchange import align, merge
from dtrain.gradients import Gradients
from dtrain.hooks import hook
from dtrain.link import Link, Peers
from dtrain.membership import Notice
from dtrain.recipes import Recipe, resolve
from dtrain.topology import complete
from dtrain.traffic import Traffic
from dtrain.transport.base import MERGE, START
from dtrain.wait import BYTE_KEYS, Wait


class Stats(NamedTuple):
    """Cumulative counts of the whole island."""

    step: int
    wait_s: float
    wire_bytes_sent: int
    wire_bytes_received: int
    wire_bytes_start: int
    wire_bytes_merge: int


class Sync:
    """One island's part in the job; a context manager. On an exception it does not drain."""

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
        self._model, self._connection, self._clip = model, connection, clip
        self._island, self._peers = connection.ranks, Peers(connection.node, connection.num_nodes)
        plan = assemble(recipe, seed)
        flat = flatten(model.named_parameters())
        self._parameters = flat.parameters
        self.buckets = make_buckets(
            flat,
            num_fragments=recipe.fragments,
            bucket_bytes=recipe.bucket_bytes,
            num_ranks=self._island.num_ranks,
            with_grad=plan.rewrites_gradients,
        )
        self._mine = [b for b in self.buckets if b.owner == self._island.rank]
        self._gradients = Gradients(self.buckets, flat) if plan.rewrites_gradients else None
        self._traffic = Traffic(connection.transport, self.buckets[0].x.device)
        self._wait = Wait(connection, self._traffic)
        self._base: dict[str, float] = {}
        self._merges = 0
        self._prepared = False
        with ExitStack() as undo:
            undo.callback(self._traffic.close, drain_s=0.0)
            self._align()
            undo.pop_all()
        self.core = Core(plan, self._mine, self._peers)
        self._release = hook(optimizers, scaler, self)

    # ---- what the optimizer hooks call

    @property
    def step(self) -> int:
        """Optimizer steps that this island has done, skipped ones included."""
        return self.core.step

    @property
    def prepared(self) -> bool:
        """Whether before_update has run for the step that is under way."""
        return self._prepared

    @torch.no_grad()
    def before_update(self) -> None:
        """Land the rounds that are due, exchange gradients where the method does, clip. Gradients are complete
        here."""
        self._land_due(self.step + 1)
        if self._gradients is not None and self.num_islands > 1:
            self._exchange_gradients()
        if self._clip:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._prepared = True

    @torch.no_grad()
    def after_update(self, *, skipped: bool = False) -> None:
        """Count the step and start the rounds that are due. A step that the loss scaler skipped is a step on every
        island."""
        if not self._prepared:
            assert skipped, "after_update without before_update is for skipped steps"
            self._land_due(self.step + 1)
        self._prepared = False
        self.core.step += 1
        if self._wait.peer_left:
            return
        self._traffic.launch(self.core.start_rounds())
        if self.core.plan.delay_steps == 0:
            self._land_due(self.step)

    # ---- what a loop may ask for

    def stats(self) -> Stats:
        """Counts so far, of the whole island; bytes are those of the rounds that have arrived."""
        sent, received, start, merged = (int(n + self._base.get(k, 0)) for k, n in self._wait.island_bytes().items())
        return Stats(self.step, self._base.get("wait_s", 0.0) + self._wait.waited_s, sent, received, start, merged)

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The exact average of all islands in the model while the block runs; all islands must enter together."""
        self.settle()
        saved = [b.x.clone() for b in self.buckets]
        buffers = state_buffers(self._model)
        saved_buffers = [b.clone() for b in buffers]
        self._average()
        try:
            yield self._model
        finally:
            with torch.no_grad():
                for b, x in zip(self.buckets, saved, strict=True):
                    b.x.copy_(x)
                for buffer, value in zip(buffers, saved_buffers, strict=True):
                    buffer.copy_(value)

    def merge(self) -> float:
        """Land what flies, then replace every island's model (buffers too) by the exact average, the same bits on all
        islands.

        Returns the consensus distance before the merge: sqrt(mean_i |x_i - mean x|^2)."""
        self.drain()
        return self._average()

    def consensus_distance(self) -> float:
        """sqrt(mean_i |x_i - mean x|^2) over all parameters. Costs an exact average on the link; leaves the model
        alone."""
        self.settle()
        saved = [b.x.clone() for b in self.buckets]
        distance = self._average(with_buffers=False)
        with torch.no_grad():
            for b, x in zip(self.buckets, saved, strict=True):
                b.x.copy_(x)
        return distance

    def settle(self) -> None:
        """Wait for the bytes of all rounds in flight; they land when their step comes, so this does not alter the
        trajectory."""
        self._wait.all(
            self.step, self._merges, [lane.flight for lane in self.core.in_flight() if lane.flight is not None]
        )

    @torch.no_grad()
    def drain(self) -> None:
        """Wait for all rounds in flight and land them now, in the order of their steps."""
        for step in range(self.step, self.step + self.core.plan.delay_steps + 1):
            self._land_due(step)

    def state_dict(self) -> dict[str, Tensor]:
        """All of this rank's state that a bit-identical resume needs, as tensors; waits for bytes in flight."""
        self.settle()
        name, now = f"counts{self._island.rank}", self.stats()
        counts = dict(zip(BYTE_KEYS, now[2:], strict=True)) | {"wait_s": now.wait_s}
        return self.core.state_dict() | {
            f"{name}.{k}": torch.tensor(float(v), dtype=torch.float64) for k, v in counts.items()
        }

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave on the same rank.

        The parameters and the inner optimizer are the caller's to restore, and after ``join``: join makes the
        islands' weights equal, and in the middle of a run they are not."""
        self.core.load_state_dict(saved)
        prefix = f"counts{self._island.rank}."
        self._base = {k.removeprefix(prefix): float(v) for k, v in saved.items() if k.startswith(prefix)}

    def close(self, *, failed: bool = False) -> None:
        """Take the hooks off, say good-bye, let the last wires leave (not after a failure)."""
        self._release()
        membership = self._connection.membership
        membership.announce(Notice(self.step, failed=failed))
        self._traffic.close(
            drain_s=0.0 if failed else self._connection.timeout_s,
            left=lambda: {n for n, notice in membership.notices().items() if notice.final},
        )

    def __enter__(self) -> Sync:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.drain()
        self.close(failed=kind is not None)

    # ---- landing and waiting

    def _land_due(self, step: int) -> None:
        if not self._anything_due(step):
            return
        lanes = self.core.due(step)
        self._wait.all(self.step, self._merges, [lane.flight for lane in lanes if lane.flight is not None])
        for lane in lanes:
            self.core.land(lane)
        # After a drop ranks may differ in which rounds landed, so everything is made equal again.
        self._island.refresh(self.buckets, gradients=False)

    def _anything_due(self, step: int) -> bool:
        """Whether any rank of the island lands a round at this step: every rank finds the same answer without
        asking."""
        if self._island.num_ranks == 1:
            return bool(self.core.due(step))
        plan, begun = self.core.plan, step - self.core.plan.delay_steps
        return plan.sends and begun > 0 and any(plan.when(begun, f, plan.control) for f in range(self.recipe.fragments))

    def _exchange_gradients(self) -> None:
        assert self._gradients is not None
        self._gradients.read()
        flights = [] if self._wait.peer_left else self.core.start_gradients()
        self._traffic.launch(flights)
        self._wait.all(self.step, self._merges, flights)
        self._island.refresh(self.buckets, gradients=True)
        self._gradients.write()

    # ---- start and merge

    @torch.no_grad()
    def _align(self) -> None:
        if self.num_islands > 1:
            flights = [self._exchange(START, b.index, lambda link, b=b: align(b.x, link)) for b in self._mine]
            buffers = pack_buffers(self._model) if self._island.rank == 0 else None
            if buffers is not None:
                flights.append(self._exchange(START, len(self.buckets), lambda link: align(buffers, link)))
            self._traffic.launch(flights)
            self._wait.all(0, 0, flights)
            if buffers is not None:
                unpack_buffers(self._model, buffers)
        self._island.refresh(self.buckets, gradients=False)

    @torch.no_grad()
    def _average(self, *, with_buffers: bool = True) -> float:
        """Replace the model by the mean over islands; returns the consensus distance from before."""
        pieces = [(b.index, b.layout, b.x, torch.empty(b.x.numel(), device=b.x.device)) for b in self._mine]
        buffers = pack_buffers(self._model) if with_buffers and self._island.rank == 0 else None
        if buffers is not None:
            pieces.append((len(self.buckets), whole("buffers", buffers), buffers, torch.empty_like(buffers)))
        flights = [
            self._exchange(MERGE, index, lambda link, p=(layout, x, mean): merge(*p, link))
            for index, layout, x, mean in pieces
        ]
        self._connection.membership.announce(Notice(self.step, merge=self._merges))
        self._traffic.launch(flights)
        self._wait.all(self.step, self._merges, flights)
        self._merges += 1
        apart = 0.0
        for _, _, x, mean in pieces:
            apart += float((x.to(torch.float64) - mean).square().sum()) if x is not buffers else 0.0
            x.copy_(mean)
        if buffers is not None:
            unpack_buffers(self._model, buffers)
        self._island.refresh(self.buckets, gradients=False)
        return self._mean_over_islands(self._island.total([apart])[0]) ** 0.5

    def _mean_over_islands(self, value: float) -> float:
        if self._island.rank != 0:
            return value
        x = torch.tensor([value], dtype=torch.float64).to(torch.float32).to(self.buckets[0].x.device)
        out = torch.empty_like(x)
        layout = whole("scalar", x)
        flight = self._exchange(MERGE, len(self.buckets) + 1, lambda link: merge(layout, x, out, link))
        self._traffic.launch([flight])
        self._wait.own(self.step, self._merges, [flight])
        return float(out)

    def _exchange(self, kind: int, bucket: int, generator: Callable[[Link], Iterator[None]]) -> Flight:
        link = Link(self.island, self.num_islands, complete(0, self.island, self.num_islands))
        return Flight(generator(link), link, kind=kind, index=self._merges, bucket=bucket, step=0)


def join(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    *,
    recipe: str | None = None,
    every: int | None = None,
    delay: int | Literal["round"] | None = None,
    codec: str | None = None,
    error_feedback: bool | None = None,
    topology: str | None = None,
    reduce: str | None = None,
    outer: str | None = None,
    outer_lr: float | None = None,
    outer_momentum: float | None = None,
    gamma: float | None = None,
    landing: str | None = None,
    fragments: int | None = None,
    bucket_bytes: int | None = None,
    clip: float | None = None,
    seed: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    link: Connection | None = None,
) -> Sync:
    """Make this process one island (or one rank of one) of a job.

    The islands' weights are compared by hash and island 0's are sent where they differ. Axes left out are the
    recipe's; a recipe left out is the job file's under ``dtrain run JOB.toml -- script.py``, else the default.
    ``clip`` is the global gradient norm, applied after gradients are exchanged. Give the GradScaler, if there is one,
    so that a step it skips is counted. ``link`` is for islands that were connected by hand; the launcher's
    environment is read otherwise.

    Raises ValueError for settings that do not fit, PeerLost when an island does not come."""
    overrides: dict[str, object] = {
        "every": every,
        "delay": delay,
        "codec": codec,
        "error_feedback": error_feedback,
        "topology": topology,
        "reduce": reduce,
        "outer": outer,
        "outer_lr": outer_lr,
        "outer_momentum": outer_momentum,
        "gamma": gamma,
        "landing": landing,
        "fragments": fragments,
        "bucket_bytes": bucket_bytes,
    }
    connection = link or connect(device=next(model.parameters()).device)
    said = {k: v for k, v in overrides.items() if v is not None}
    axes = said if recipe is not None else {**connection.job_axes, **said}
    row = resolve(recipe or connection.job_recipe, axes, connection.num_nodes)
    if scaler is not None and row.algorithm == "allreduce":
        raise ValueError(
            "recipe 'allreduce' averages gradients each step, and a GradScaler that skips a step on one island only "
            "would split the replicas; use bf16 without a scaler, or a recipe that exchanges parameters"
        )
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return Sync(model, several, row, connection, clip=clip, seed=seed, scaler=scaler)

"""How does a training loop become one island of a job? ``join`` hooks an optimizer to the rounds.

    with dtrain.join(model, optimizer) as sync:
        for batch in loader:
            optimizer.zero_grad(); model(batch).loss.backward(); optimizer.step()

After each ``optimizer.step()`` the rounds that are due start; before it, those that are due land. The hooks are an adapter: where they
do not fit, call ``before_update`` and ``after_update`` yourself. No backward hooks, so accumulation, mixed
precision and global clipping keep their meaning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.assemble import assemble
from dtrain.bucket import flatten, make_buckets, whole
from dtrain.buffers import pack_buffers, state_buffers, unpack_buffers
from dtrain.connect import Connection, connect
from dtrain.core import Core, Flight
from dtrain.errors import NonFinite, PeerLost, Regroup
from dtrain.exchange import align, merge
from dtrain.gradients import Gradients
from dtrain.link import Link, Peers
from dtrain.membership import Notice
from dtrain.recipes import Recipe, resolve
from dtrain.topology import complete
from dtrain.traffic import Traffic
from dtrain.transport.base import MERGE, ROUND, START

log = logging.getLogger("dtrain")

_OK, _LOST, _REGROUP = 0, 1, 2
_POLL_S = 0.25
"""How often a wait looks for peers that left or came back; a healthy round on a fast link is over sooner."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Cumulative counts of the whole island."""

    step: int
    wait_s: float
    wire_bytes_sent: int
    wire_bytes_received: int
    wire_bytes_start: int
    wire_bytes_merge: int


@dataclass(slots=True)
class _Counts:
    wait_s: float = 0.0
    base: dict[str, float] = field(default_factory=dict)
    totals: list[float] = field(default_factory=lambda: [0.0] * 4)


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
        self._counts = _Counts()
        self._merges = 0
        self._prepared = False
        self._peer_left = False
        self._align()
        self.core = Core(plan, self._mine, self._peers)
        self._handles = self._hook(optimizers, scaler)

    # ---- what the optimizer hooks call

    @property
    def step(self) -> int:
        """Optimizer steps that this island has done, skipped ones included."""
        return self.core.step

    @torch.no_grad()
    def before_update(self) -> None:
        """Land the rounds that are due, exchange gradients where the method does, clip. Gradients are complete here."""
        self._land_due(self.step + 1)
        if self._gradients is not None and self.num_islands > 1:
            self._exchange_gradients()
        if self._clip:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._prepared = True

    @torch.no_grad()
    def after_update(self, *, skipped: bool = False) -> None:
        """Count the step and start the rounds that are due. A step that the loss scaler skipped is a step on every island."""
        if not self._prepared:
            assert skipped, "after_update without before_update is for skipped steps"
            self._land_due(self.step + 1)
        self._prepared = False
        self.core.step += 1
        if self._peer_left:
            return
        self._traffic.launch(self.core.start_rounds())
        if self.core.plan.delay_steps == 0:
            self._land_due(self.step)

    # ---- what a loop may ask for

    def stats(self) -> Stats:
        """Counts so far, of the whole island; bytes are those of the rounds that have arrived."""
        base, totals = self._counts.base, self._counts.totals if self._island.num_ranks > 1 else self._own_bytes()
        sent, received, start, merged = (int(v + base.get(k, 0)) for k, v in zip(_BYTE_KEYS, totals, strict=True))
        return Stats(self.step, self._counts.wait_s, sent, received, start, merged)

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
        """Land what flies, then replace every island's model (buffers too) by the exact average, the same bits on all islands.

        Returns the consensus distance before the merge: sqrt(mean_i |x_i - mean x|^2).
        """
        self.drain()
        return self._average()

    def consensus_distance(self) -> float:
        """sqrt(mean_i |x_i - mean x|^2) over all parameters. Costs an exact average on the link; leaves the model alone."""
        self.settle()
        saved = [b.x.clone() for b in self.buckets]
        distance = self._average(with_buffers=False)
        with torch.no_grad():
            for b, x in zip(self.buckets, saved, strict=True):
                b.x.copy_(x)
        return distance

    def settle(self) -> None:
        """Wait for the bytes of all rounds in flight; they land when their step comes, so this does not alter the trajectory."""
        self._await([lane.flight for lane in self.core.in_flight() if lane.flight is not None])

    @torch.no_grad()
    def drain(self) -> None:
        """Wait for all rounds in flight and land them now, in the order of their steps."""
        for step in range(self.step, self.step + self.core.plan.delay_steps + 1):
            self._land_due(step)

    def state_dict(self) -> dict[str, Tensor]:
        """All of this rank's state that a bit-identical resume needs, as tensors; waits for bytes in flight."""
        self.settle()
        rank = self._island.rank
        counts = {k: float(v) for k, v in zip(_BYTE_KEYS, self._stat_bytes(), strict=True)} | {"wait_s": self._counts.wait_s}
        return self.core.state_dict() | {f"counts{rank}.{k}": torch.tensor(v, dtype=torch.float64) for k, v in counts.items()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restore what ``state_dict`` gave on the same rank; the parameters and the inner optimizer are the caller's to restore."""
        self.core.load_state_dict(saved)
        prefix = f"counts{self._island.rank}."
        self._counts.base = {k.removeprefix(prefix): float(v) for k, v in saved.items() if k.startswith(prefix)}
        self._counts.wait_s = self._counts.base.get("wait_s", 0.0)

    def close(self, *, failed: bool = False) -> None:
        """Take the hooks off, say good-bye, let the last wires leave (not after a failure)."""
        for handle in self._handles:
            handle()
        self._handles = []
        self._connection.membership.announce(Notice(self.step, failed=failed))
        self._traffic.close(drain_s=0.0 if failed else self._connection.timeout_s)

    def __enter__(self) -> Sync:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.drain()
        self.close(failed=kind is not None)

    # ---- landing and waiting

    def _land_due(self, step: int) -> None:
        if not self._anything_due(step):
            return
        lanes = self.core.due(step)
        self._await([lane.flight for lane in lanes if lane.flight is not None])
        for lane in lanes:
            self.core.land(lane)
        # After a drop ranks may differ in which rounds landed, so everything is made equal again.
        self._island.refresh(self.buckets, gradients=False)

    def _anything_due(self, step: int) -> bool:
        """Whether any rank of the island lands a round at this step: every rank finds the same answer without asking."""
        if self._island.num_ranks == 1:
            return bool(self.core.due(step))
        plan, begun = self.core.plan, step - self.core.plan.delay_steps
        return plan.sends and begun > 0 and any(plan.when(begun, f, plan.control) for f in range(self.recipe.fragments))

    def _exchange_gradients(self) -> None:
        assert self._gradients is not None
        self._gradients.read()
        flights = [] if self._peer_left else self.core.start_gradients()
        self._traffic.launch(flights)
        self._await(flights)
        self._island.refresh(self.buckets, gradients=True)
        self._gradients.write()

    def _await(self, flights: Sequence[Flight]) -> None:
        """Wait until flights are done, visibly. Raises PeerLost or Regroup on every rank of the island together."""
        begun = time.monotonic()
        problem: Exception | None = None
        try:
            self._wait_for(flights, begun)
        except (PeerLost, Regroup) as e:
            problem = e
        self._counts.wait_s += time.monotonic() - begun
        problem = problem or next((f.error for f in flights if f.error is not None), None)
        if self._island.num_ranks > 1:
            worst = self._island.worst(_OK if problem is None else _REGROUP if isinstance(problem, Regroup) else _LOST)
            if problem is None and worst == _REGROUP:
                self._connection.membership.check_regroup()
            if problem is None and worst != _OK:
                problem = PeerLost((), "another rank of this island could not go on; see its log")
            self._counts.totals = self._island.total(self._own_bytes())
        if isinstance(problem, NonFinite):
            raise NonFinite(f"step {self.step}: {problem}; the loss has diverged: lower the learning rate, or clip") from problem
        if problem is not None:
            raise problem

    def _wait_for(self, flights: Sequence[Flight], begun: float) -> None:
        connection = self._connection
        while not self._traffic.wait(flights, _POLL_S):
            connection.membership.check_regroup()
            waited_s = time.monotonic() - begun
            missing = self._traffic.missing(flights)
            notices = connection.membership.notices()
            failed = [n for n in missing if n in notices and notices[n].failed]
            if failed and not connection.membership.failed_may_return:
                raise PeerLost(failed, f"it failed after step {notices[failed[0]].step}")
            ended = {n: notice for n, notice in notices.items() if notice.ends_rounds(self._merges)}
            beyond = [f for f in flights if any(f.step > notice.step for notice in ended.values())]
            if beyond and missing:
                self._say_left(ended)
                self._traffic.drop(beyond)
                continue
            if waited_s > connection.timeout_s:
                reasons = "; ".join(dict.fromkeys(text for n, text in self._traffic.lost().items() if n in missing))
                raise PeerLost(missing, f"nothing came from it for {connection.timeout_s:g} s" + (f" ({reasons})" if reasons else ""))
            if missing and waited_s > 1:
                connection.on_wait(missing, waited_s, connection.timeout_s)

    def _say_left(self, ended: Mapping[int, Notice]) -> None:
        if not self._peer_left:
            island, notice = min(ended.items(), key=lambda item: item[1].step)
            log.warning(
                "island %d ended its loop after %d steps; this island, at step %d, goes on without further rounds: "
                "give all islands loops of one length",
                island,
                notice.step,
                self.step,
            )
        self._peer_left = True

    # ---- start and merge

    @torch.no_grad()
    def _align(self) -> None:
        if self.num_islands > 1:
            flights = [self._exchange(START, b.index, lambda link, b=b: align(b.x, link)) for b in self._mine]
            buffers = pack_buffers(self._model) if self._island.rank == 0 else None
            if buffers is not None:
                flights.append(self._exchange(START, len(self.buckets), lambda link: align(buffers, link)))
            self._traffic.launch(flights)
            self._await(flights)
            if buffers is not None:
                unpack_buffers(self._model, buffers)
        self._island.refresh(self.buckets, gradients=False)

    @torch.no_grad()
    def _average(self, *, with_buffers: bool = True) -> float:
        means = [torch.empty(b.x.numel(), device=b.x.device) for b in self._mine]
        flights = [
            self._exchange(MERGE, b.index, lambda link, b=b, m=m: merge(b.layout, b.x, m, link))
            for b, m in zip(self._mine, means, strict=True)
        ]
        buffers = pack_buffers(self._model) if with_buffers and self._island.rank == 0 else None
        if buffers is not None:
            layout = whole("buffers", buffers)
            mean = torch.empty_like(buffers)
            flights.append(self._exchange(MERGE, len(self.buckets), lambda link: merge(layout, buffers, mean, link)))
        self._connection.membership.announce(Notice(self.step, merge=self._merges))
        self._traffic.launch(flights)
        self._await(flights)
        self._merges += 1
        own = sum(float((b.x.to(torch.float64) - m).square().sum()) for b, m in zip(self._mine, means, strict=True))
        for b, m in zip(self._mine, means, strict=True):
            b.x.copy_(m)
        if buffers is not None:
            unpack_buffers(self._model, mean)
        self._island.refresh(self.buckets, gradients=False)
        return (self._mean_over_islands(self._island.total([own])[0])) ** 0.5

    def _mean_over_islands(self, value: float) -> float:
        if self._island.rank != 0:
            return value
        x = torch.tensor([value], dtype=torch.float64).to(torch.float32).to(self.buckets[0].x.device)
        out = torch.empty_like(x)
        layout = whole("scalar", x)
        flight = self._exchange(MERGE, len(self.buckets) + 1, lambda link: merge(layout, x, out, link))
        self._traffic.launch([flight])
        self._wait_for([flight], time.monotonic())
        return float(out)

    def _exchange(self, kind: int, bucket: int, generator: Callable[[Link], Iterator[None]]) -> Flight:
        link = Link(self.island, self.num_islands, complete(0, self.island, self.num_islands))
        return Flight(generator(link), link, kind=kind, index=self._merges, bucket=bucket, step=0)

    # ---- counting and hooks

    def _own_bytes(self) -> list[float]:
        count = self._traffic.bytes
        return [count.sent[ROUND], count.received[ROUND], count.sent[START], count.sent[MERGE]]

    def _stat_bytes(self) -> tuple[int, int, int, int]:
        s = self.stats()
        return s.wire_bytes_sent, s.wire_bytes_received, s.wire_bytes_start, s.wire_bytes_merge

    def _hook(self, optimizers: Sequence[Optimizer], scaler: torch.amp.GradScaler | None) -> list[Callable[[], None]]:
        """The first optimizer's step begins an update, the last one's ends it."""

        def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.before_update()

        def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.after_update()

        handles = []
        if optimizers:
            handles = [optimizers[0].register_step_pre_hook(before).remove, optimizers[-1].register_step_post_hook(after).remove]
        if scaler is not None:
            handles.append(_watch_scaler(self, scaler, optimizers))
        return handles


_BYTE_KEYS = ("sent", "received", "start", "merge")


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

    The islands' weights are compared by hash and island 0's are sent where they differ. Axes left out are the recipe's; a recipe left out is
    the job file's under ``dtrain run JOB.toml -- script.py``, else the default. ``clip`` is the global gradient norm, applied
    after gradients are exchanged. Give the GradScaler, if there is one, so that a step it skips is counted.
    ``link`` is for islands that were connected by hand; the launcher's environment is read otherwise.

    Raises ValueError for settings that do not fit, PeerLost when an island does not come.
    """
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
    row = resolve(recipe or connection.job_recipe, connection.job_axes | _said(overrides) if recipe is None else overrides, connection.num_nodes)
    if scaler is not None and row.algorithm == "allreduce":
        raise ValueError(
            "recipe 'allreduce' averages gradients each step, and a GradScaler that skips a step on one island only would split the "
            "replicas; use bf16 without a scaler, or a recipe that exchanges parameters"
        )
    several = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return Sync(model, several, row, connection, clip=clip, seed=seed, scaler=scaler)


def _said(overrides: dict[str, object]) -> dict[str, object]:
    return {k: v for k, v in overrides.items() if v is not None}


def _watch_scaler(sync: Sync, scaler: torch.amp.GradScaler, optimizers: Sequence[Optimizer]) -> Callable[[], None]:
    """GradScaler.step leaves optimizer.step out when a gradient overflowed, and no hook runs: count the step here."""
    step = scaler.step

    def counted(optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
        before = sync.step
        result = step(optimizer, *args, **kwargs)
        if optimizer is optimizers[-1] and sync.step == before:
            sync.after_update(skipped=True)
        return result

    def restore() -> None:
        del scaler.step

    scaler.step = counted
    return restore

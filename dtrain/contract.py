"""Does a recipe keep the promises that every method makes? Small runs of it, in this process, with what came out.

Four islands hold a quadratic loss each, 153 parameters in two tensors, plain SGD, or AccumAdamW where the recipe is defined with
accumulated moments, and SAM where it is with that. Each check is a number that should be below a bound, both shown, or bits that
should be equal."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.assemble import when_of
from dtrain.connect import Connection, connect_local
from dtrain.engine import join
from dtrain.errors import NonFinite, PeerLost
from dtrain.optim import SAM, AccumAdamW
from dtrain.recipe_fits import check_trains
from dtrain.recipes import Recipe, resolve, with_steps
from dtrain.schedule import Control

ISLANDS, LEAST_STEPS, CUT, WIDTH = 4, 24, 70, 153
LR = 0.05
_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and whether it was kept."""

    promise: str
    kept: bool
    found: str


@dataclass(frozen=True, slots=True)
class _Island:
    x: Tensor
    """Parameters, flat, in the middle or at the end."""
    state: dict[str, Tensor]
    optimizer: dict[str, Any]


class _Quadratic(nn.Module):
    """sum_k a_k / 2 (x_k - c_k)^2."""

    def __init__(self, node: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        start = torch.rand(WIDTH, generator=draw) * 2 - 1
        own = torch.Generator().manual_seed(1 + node)
        self.a, self.c = 0.25 + 1.75 * torch.rand(WIDTH, generator=own), torch.rand(WIDTH, generator=own) * 2 - 1
        self.left, self.right = nn.Parameter(start[:CUT].clone()), nn.Parameter(start[CUT:].clone())

    def forward(self) -> Tensor:
        return (0.5 * self.a * (torch.cat((self.left, self.right)) - self.c).square()).sum()

    def flat(self) -> Tensor:
        return torch.cat((self.left.detach(), self.right.detach()))

    @torch.no_grad()
    def set_flat(self, x: Tensor) -> None:
        self.left.copy_(x[:CUT])
        self.right.copy_(x[CUT:])


def check(recipe: str) -> Iterator[Check]:
    """The checks in order, as they are done; what the method raises is raised, and ValueError for no such recipe. After a run
    that does not end finite the others are left out."""
    row = resolve(recipe, {}, ISLANDS)
    check_trains(row)
    steps = max(LEAST_STEPS, 3 * row.every + row.delay_steps)
    row = with_steps(row, steps)
    try:
        whole = _run(row, 0, steps, None)
    except (NonFinite, PeerLost) as e:
        ran = "it runs, and every parameter stays finite" if isinstance(e, NonFinite) else "every wire that is expected is posted"
        yield Check(ran, False, str(e))
        return
    finite = all(bool(torch.isfinite(island.x).all()) for island in whole)
    yield Check("it runs, and every parameter stays finite", finite, f"{steps} steps of {ISLANDS} islands")
    if not finite:
        return
    yield _same("twice is the same bits", whole, _run(row, 0, steps, None))
    when, control = when_of(row), Control(row.every)
    # A round has just begun, and flies where the delay is longer than 0.
    begun = max((t for t in range(1, steps // 2 + 1) if when(t, 0, control)), default=1)
    for at in (begun, begun + 1):
        resumed = _run(row, at, steps, _run(row, 0, at, None))
        yield _same(f"saved after step {at} and resumed is the same bits", whole, resumed)
    if row.combine in ("gossip", "sampled"):
        yield from _mixing(row, steps)


def _mixing(row: Recipe, steps: int) -> Iterator[Check]:
    apart = [_start(node) for node in range(ISLANDS)]
    mixed = [island.x for island in _run(row, 0, steps, None, apart=apart, lr=0.0)]
    moved = float((_mean(mixed) - _mean(apart)).abs().max())
    # Rounding alone: 64 times a gossip step and island, of values up to 4 (codes may lie above what they stand for), in sums that
    # some methods keep over all steps. A method that moves the mean does so by far more: the parameters are 0.3 apart.
    bound = 64 * row.gossip_steps * steps * 2.0**-24 * 4
    if row.combine == "gossip":
        found = f"it moves by {moved:.1e}; rounding may by {bound:.1e}"
        yield Check("mixing keeps the mean of all islands", moved <= bound, found)
    before, after = _distance(apart), _distance(mixed)
    yield Check("mixing brings islands together", after < before, f"their distance from the mean: {before:.3g}, then {after:.3g}")


def _start(node: int) -> Tensor:
    return torch.rand(WIDTH, generator=torch.Generator().manual_seed(9 + node))


def _mean(each: list[Tensor]) -> Tensor:
    return torch.stack(each).double().mean(dim=0)


def _distance(each: list[Tensor]) -> float:
    """Root mean square over the islands of the distance to their mean."""
    stacked = torch.stack(each).double()
    return float((stacked - stacked.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def _same(promise: str, one: list[_Island], two: list[_Island]) -> Check:
    unlike = [
        f"island {node}: {what}"
        for node, (a, b) in enumerate(zip(one, two, strict=True))
        for what, (left, right) in {"parameters": (a.x, b.x), **{k: (v, b.state[k]) for k, v in a.state.items()}}.items()
        if not torch.equal(left, right)
    ]
    return Check(promise, not unlike, f"{unlike[0]} and {len(unlike) - 1} others differ" if unlike else "parameters and state")


def _run(
    row: Recipe, first: int, last: int, saved: list[_Island] | None, *, apart: list[Tensor] | None = None, lr: float = LR
) -> list[_Island]:
    """Islands that train from step ``first`` to ``last``, from what was saved of each, as they stand then, with what is in
    flight; where they begin ``apart``, as they stand when all has landed."""

    def island(connection: Connection) -> _Island:
        model = _Quadratic(connection.node)
        optimizer = _optimizer(model, row.moments_every or 1, lr)
        sam = None if row.sam_rho is None else SAM(optimizer, rho=row.sam_rho)

        def gradient() -> None:
            optimizer.zero_grad()
            model().backward()

        with join(
            model, sam or optimizer, recipe=row.name, bucket_bytes=256, total_steps=row.total_steps, link=connection
        ) as sync:
            if saved is not None:
                model.set_flat(saved[connection.node].x)
                optimizer.load_state_dict(saved[connection.node].optimizer)
                sync.load_state_dict(saved[connection.node].state)
            if apart is not None:
                model.set_flat(apart[connection.node])
            for _ in range(first, last):
                if sam is None:
                    gradient()
                else:
                    sam.gradient(gradient)
                optimizer.step()
            state = {k: v.clone() for k, v in sync.state_dict().items() if not k.startswith("counts")}
            stands = _Island(model.flat(), state, copy.deepcopy(optimizer.state_dict()))
        return stands if apart is None else _Island(model.flat(), {}, {})

    return _on_threads(island)


def _optimizer(model: nn.Module, every: int, lr: float) -> torch.optim.Optimizer:
    return AccumAdamW(model.parameters(), lr=lr, every=every) if every > 1 else torch.optim.SGD(model.parameters(), lr=lr)


def _on_threads(island: Callable[[Connection], _Island]) -> list[_Island]:
    done: dict[int, _Island] = {}
    failed: list[Exception] = []

    def run(connection: Connection) -> None:
        try:
            done[connection.node] = island(connection)
        except Exception as e:  # noqa: BLE001  (raised again below, on the caller's thread)
            failed.append(e)

    threads = [
        threading.Thread(target=run, args=(connection,), daemon=True)
        for connection in connect_local(ISLANDS, timeout_s=_LIMIT_S)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not failed:
            thread.join(timeout=0.1)
    if failed:
        raise failed[0]
    return [done[node] for node in range(ISLANDS)]

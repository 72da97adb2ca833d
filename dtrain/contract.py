"""Does a recipe keep the promises that every method makes? Small runs of it, in this process, with what came out.

Four islands hold a loss each, in two tensors of two chunks of the codec and some more (the first a matrix, for a path of low rank
and for Muon), and step by SGD, or by what the recipe is defined with: AccumAdamW, SAM, Muon. Each check is a number that should
be below a bound, both shown, or bits that should be equal."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.assemble import when_of
from dtrain.codec_name import MAX_BLOCK, parse
from dtrain.connect import Connection, connect_local
from dtrain.engine import join
from dtrain.errors import NonFinite, PeerLost
from dtrain.matrices import highest
from dtrain.optim import SAM, AccumAdamW
from dtrain.own_name import is_own
from dtrain.recipe_fits import check_trains
from dtrain.recipes import Recipe, resolve, with_steps
from dtrain.schedule import Control
from dtrain.virtual_problem import consensus_distance, mean_of

ISLANDS, LEAST_STEPS = 4, 24
LR = 0.05
_FEW = 3
"""Rounds after which the mean is looked at: what a method keeps between them was used twice, and islands are still apart."""
_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and whether it was kept; None where it was not checked, and ``found`` says why."""

    promise: str
    kept: bool | None
    found: str


@dataclass(frozen=True, slots=True)
class _Island:
    x: Tensor
    """Parameters, flat, in the middle or at the end."""
    state: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    landed: Tensor
    """x once all that flew has landed."""
    trained: Tensor
    """The sum of what an optimizer like this island's, given the same gradients, moved parameters by that no round touches."""


class _Loss(nn.Module):
    """sum_k a_k / 2 (x_k - c_k)^2 + s_tk x_k; its slopes s_t are drawn anew each step t, so that a step that is lost shows even
    where an island had settled."""

    def __init__(self, node: int, row: Recipe) -> None:
        super().__init__()
        sizes = _sizes(row)
        self._node, (self._cut, width) = node, (sizes[0], sum(sizes))
        own = torch.Generator().manual_seed(1 + node)
        self.a, self.c = 0.25 + 1.75 * torch.rand(width, generator=own), torch.rand(width, generator=own) * 2 - 1
        self.left, self.right = nn.Parameter(torch.empty(_left(row))), nn.Parameter(torch.empty(sizes[1]))
        self.set_flat(_start(width))

    def forward(self, step: int) -> Tensor:
        drawn = torch.Generator().manual_seed(ISLANDS * step + self._node)
        slopes = torch.rand(len(self.a), generator=drawn) - 0.5
        x = torch.cat((self.left.flatten(), self.right))
        return (0.5 * self.a * (x - self.c).square() + slopes * x).sum()

    def flat(self) -> Tensor:
        return torch.cat((self.left.detach().flatten(), self.right.detach()))

    @torch.no_grad()
    def set_flat(self, x: Tensor) -> None:
        self.left.copy_(x[: self._cut].view_as(self.left))
        self.right.copy_(x[self._cut :])


def _sizes(row: Recipe) -> tuple[int, int]:
    """Elements of the two tensors: top-k of a shorter chunk would keep nearly all, and a block's scale would never be another's.
    Of somebody's own codec the longest chunk is assumed."""
    return math.prod(_left(row)), 2 * _block(row) + 81


def _left(row: Recipe) -> tuple[int, ...]:
    """The first tensor's shape: a matrix for Muon, and for a path of low rank one of so many rows and columns goes by its
    factors."""
    if row.reduce == "low_rank" and row.rank is not None:
        return 2 * highest(row.rank) + 4, 3 * highest(row.rank)
    long = 2 * _block(row) + 68
    return (2, long // 2) if row.optimizer == "muon" else (long,)


def _block(row: Recipe) -> int:
    return MAX_BLOCK if is_own(row.codec) else parse(row.codec).block


def _start(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(0)) * 2 - 1


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
    finite = all(bool(torch.isfinite(island.landed).all()) for island in whole)
    yield Check("it runs, and every parameter stays finite", finite, f"{steps} steps of {ISLANDS} islands")
    if not finite:
        return
    yield _same("twice is the same bits", whole, _run(row, 0, steps, None))
    when, control = when_of(row), Control(row.every)
    begins = [t for t in range(1, steps + 1) if when(t, 0, control)]
    # A round has just begun, and flies where the delay is longer than 0.
    begun = max((t for t in begins if t <= steps // 2), default=1)
    for at in (begun, begun + 1):
        resumed = _run(row, at, steps, _run(row, 0, at, None))
        yield _same(f"saved after step {at} and resumed is the same bits", whole, resumed)
    if row.reduce == "neighbours" or row.combine not in ("mean", "radial") or (row.algorithm == "own" and row.reduce != "none"):
        yield from _mixing(row, steps, begins)
        yield _trained(row, whole, steps, len(begins))


_KEEPS = "mixing keeps the mean of all islands"
_NOT_KEPT = {
    "mean": "which does not say what mixing keeps; say \"gossip\" where it is the mean of all islands",
    "push": "whose weights keep another mean",
    "sampled": "which keeps none",
}


def _mixing(row: Recipe, steps: int, begins: list[int]) -> Iterator[Check]:
    apart = [torch.rand(sum(_sizes(row)), generator=torch.Generator().manual_seed(9 + node)) for node in range(ISLANDS)]
    if row.combine == "gossip":
        few = begins[:_FEW]
        last = few[-1] if few else steps
        few_mixed = [island.landed for island in _run(row, 0, last, None, apart=apart, lr=0.0)]
        moved = _farthest(mean_of(few_mixed) - mean_of(apart))
        bound = _rounding(row, rounds=len(few))
        found = f"in {len(few)} rounds it moves by {moved:.1e}; rounding may by {bound:.1e}"
        yield Check(_KEEPS, moved <= bound, found)
    else:
        yield Check(_KEEPS, None, _because(row))
    if row.combine == "mean":
        yield Check("mixing brings islands together", None, _because(row))
        return
    mixed = [island.landed for island in _run(row, 0, steps, None, apart=apart, lr=0.0)]
    before, after = consensus_distance(apart), consensus_distance(mixed)
    yield Check("mixing brings islands together", after < before, f"their distance from the mean: {before:.3g}, then {after:.3g}")


def _trained(row: Recipe, whole: list[_Island], steps: int, rounds: int) -> Check:
    """mean x_T = mean x_0 + the mean of all steps: of SGD - lr sum_t mean g_t."""
    promise = "what islands train outlives their rounds"
    if row.combine != "gossip":
        return Check(promise, None, _because(row))
    if row.algorithm == "own" and row.payload == "gradients":
        return Check(promise, None, 'not checked, because the row says payload = "gradients", and steps may be anything of them')
    off = _farthest(
        mean_of([island.landed for island in whole])
        - _start(sum(_sizes(row))).double()
        - mean_of([island.trained for island in whole])
    )
    bound = _rounding(row, rounds=rounds, steps=steps)
    return Check(promise, off <= bound, f"their mean is {off:.1e} off the sum of {steps} steps; rounding may be {bound:.1e}")


def _because(row: Recipe) -> str:
    return f'not checked, because the row says combine = "{row.combine}", {_NOT_KEPT[row.combine]}'


def _rounding(row: Recipe, *, rounds: int, steps: int = 0) -> float:
    """How far fp32 may carry the mean of all islands. An addition misses by 2^-24 of its result at most, which is below 4 (codes
    may lie above what they stand for, and Chebyshev's weights are above 1).

    A gossip step adds up to 8 numbers, itself and three neighbours and their weights; and methods that keep sums (choco's s)
    carry what was rounded in one round into all later ones. A step of an optimizer rounds twice, on the island and beside it."""
    return 2.0**-24 * 4 * (8 * row.gossip_steps * rounds * (rounds + 1) / 2 + 4 * steps)


def _farthest(x: Tensor) -> float:
    return float(x.abs().max())


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
    """Islands that train from step ``first`` to ``last``, from what was saved of each; ``apart``: where they begin."""
    sizes = _sizes(row)

    def island(connection: Connection) -> _Island:
        model, beside = _Loss(connection.node, row), _Loss(connection.node, row)
        beside.set_flat(torch.zeros(sum(sizes)))
        optimizers, alone = steppers(model, row, lr), steppers(beside, row, lr)
        sam = None if row.sam_rho is None else SAM(optimizers, rho=row.sam_rho)
        of_all = None if row.quorum is None else "100%"  # who is late is left to chance, and bits with it
        with join(
            model, sam or optimizers, recipe=row.name, quorum=of_all, bucket_bytes=4 * max(sizes), total_steps=row.total_steps,
            link=connection,
        ) as sync:
            if saved is not None:
                model.set_flat(saved[connection.node].x)
                for optimizer, state in zip(optimizers, saved[connection.node].optimizers, strict=True):
                    optimizer.load_state_dict(state)
                sync.load_state_dict(saved[connection.node].state)
            if apart is not None:
                model.set_flat(apart[connection.node])
            for step in range(first, last):
                _backward(model, sam, step)
                for p, q in zip(beside.parameters(), model.parameters(), strict=True):
                    p.grad = None if q.grad is None else q.grad.clone()
                for optimizer in (*alone, *optimizers):
                    optimizer.step()
            state = {k: v.clone() for k, v in sync.state_dict().items() if not k.startswith("counts")}
            x, moments = model.flat(), copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
        return _Island(x, state, moments, landed=model.flat(), trained=beside.flat())

    return _on_threads(island)


def _backward(model: _Loss, sam: SAM | None, step: int) -> None:
    def gradient() -> None:
        model.zero_grad()
        model(step).backward()

    if sam is None:
        gradient()
    else:
        sam.gradient(gradient)


def steppers(model: nn.Module, row: Recipe, lr: float) -> list[torch.optim.Optimizer]:
    """What the recipe is defined with, and SGD where that is any."""
    if row.optimizer == "muon":
        matrices, rest = ([p for p in model.parameters() if (p.ndim == 2) == hidden] for hidden in (True, False))
        return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), torch.optim.SGD(rest, lr=lr)]
    if row.moments is not None:
        return [torch.optim.AdamW(model.parameters(), lr=lr)]
    if row.moments_every is None:
        return [torch.optim.SGD(model.parameters(), lr=lr)]
    return [AccumAdamW(model.parameters(), lr=lr, every=row.moments_every)]


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

"""What does an island look at on the way, off its clock? Its own loss, the islands' mean's, how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch.optim import Optimizer

from dtrain.clock import Clock
from dtrain.config import Job
from dtrain.engine import Sync
from dtrain.inside import Inside
from dtrain.metrics import State
from dtrain.optim import at_averages


class Seen(NamedTuple):
    """None where it was not due."""

    eval_loss: float | None
    """The island's own model on the held-out sequences, in nats a token."""
    eval_loss_merged: float | None
    """What the exact mean of all islands has there, rounds in flight apart; the same on all of them."""
    consensus_distance: float | None


def look(
    job: Job, sync: Sync, inside: Inside, optimizers: Sequence[Optimizer], clock: Clock, step: int,
    say: Callable[[State, int], None],
) -> Seen:  # fmt: skip
    """After optimizer step ``step``; leaves the trajectory alone. All islands call it after the same steps, and all ranks of
    an island together. What waits for rounds in flight is training's; only what looking takes is put aside."""
    distances, losses = _due(job.train.consensus_every, step), _due(job.train.eval_every, step) and step != job.train.steps
    merged = losses and job.train.eval_merged
    if distances or merged:
        sync.settle()
    distance = _distance(sync, clock) if distances else None
    if not losses:  # the last step is evaluated at the end
        return Seen(None, None, distance)
    with clock.aside(), at_averages(optimizers):
        say("evaluating", step)
        own = inside.evaluate()
        return Seen(own, _merged(sync, inside) if merged else None, distance)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _merged(sync: Sync, inside: Inside) -> float:
    with sync.merged():
        return inside.evaluate()


def _distance(sync: Sync, clock: Clock) -> float:
    with clock.aside():
        return sync.consensus_distance()

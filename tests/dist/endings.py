"""How do loops of islands end that do not end together? Each function is one island's loop."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import nn

import dtrain
from tests.dist.child import island, model_digest, report
from tests.dist.loops import classifier, features

LONG, SHORT, EVERY = 100, 97, 10
FAILS_AT = 12




def unequal(
    *, recipe: str, every: int, delay: int | Literal["round"], short: int, merge: bool, codec: str | None = None
) -> dict[str, Any]:
    """A loader of SHORT batches on island ``short`` and of LONG batches on the other."""
    batches = SHORT if island() == short else LONG
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with dtrain.join(model, opt, recipe=recipe, every=every, delay=delay, codec=codec) as sync:
        for step in range(batches):
            x, y = features(step)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        if merge:
            sync.merge()
    return {"step": sync.step, "model": model_digest(model), "wait_s": sync.stats().wait_s}


def failing() -> None:
    """Island 1 fails in its loop, with a round in flight."""
    try:
        _failing_loop()
    finally:
        report("left the block at", time.monotonic())


def _failing_loop() -> None:
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with dtrain.join(model, opt, recipe="diloco", every=EVERY, delay=5):
        for step in range(LONG):
            x, y = features(step)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            if island() == 1 and step == FAILS_AT:
                report("failed at", time.monotonic())
                raise ZeroDivisionError("the user's own mistake")
            opt.step()
            report("last step", step + 1)

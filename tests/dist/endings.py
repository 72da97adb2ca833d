"""How do loops of islands end that do not end together? Each function is one island's loop."""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
    return {"step": sync.step, "model": model_digest(model), "merged": merge}


def unequal_ranks(*, recipe: str, every: int, short: int) -> dict[str, Any]:
    """DDP inside the island, and loops of 40 and 15 steps."""
    model = classifier()
    trained = DistributedDataParallel(model)
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with dtrain.join(model, opt, recipe=recipe, every=every, delay=0) as sync:
        assert len(sync.buckets) == 1
        for step in range(15 if island() == short else 40):
            x, y = features(step)
            opt.zero_grad()
            nn.functional.cross_entropy(trained(x), y).backward()
            opt.step()
    return {"step": sync.step, "model": model_digest(model)}


def looking(*, short: int) -> dict[str, Any]:
    """Epochs of unequal length, each with a look at the average at its end."""
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    said = ""
    begun = time.monotonic()
    try:
        with dtrain.join(model, opt, recipe="dpsgd", every=1, delay=1) as sync:
            for _ in range(3):
                for step in range(8 if island() == short else 10):
                    x, y = features(step)
                    opt.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    opt.step()
                with sync.merged():
                    pass
    except ValueError as e:
        said = str(e)
    return {"said": said, "took_s": time.monotonic() - begun}


def merging_alone(*, leaves: int) -> dict[str, Any]:
    """One island ends without the merge that the other one waits for."""
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    said = ""
    begun = time.monotonic()
    try:
        with dtrain.join(model, opt, recipe="fedavg", every=5) as sync:
            for step in range(5):
                x, y = features(step)
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
            if island() != leaves:
                sync.merge()
    except dtrain.PeerLost as e:
        said = str(e)
    return {"said": said, "took_s": time.monotonic() - begun}


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

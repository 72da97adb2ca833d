"""Which loops do people write around an optimizer? Each function is one island's loop, as a user would write it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import dtrain
from dtrain.engine import Sync
from tests.dist import least_squares
from tests.dist.child import digest, island, model_digest

STEPS, EVERY = 20, 5


def features(step: int, *, of: int | None = None) -> tuple[Tensor, Tensor]:
    """A batch of the small classifier below; every island has its own data."""
    draw = torch.Generator().manual_seed(5000 * (island() if of is None else of) + step)
    x = torch.randn(16, 8, generator=draw)
    return x, (x[:, 0] > 0).long()


def classifier() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2))


def anchors(sync: Sync) -> str:
    """The outer model: the same bits on every island, or rounds were lost or landed differently."""
    return digest(*(value for key, value in sync.state_dict().items() if key.endswith(".anchor")))


# ---- gradient accumulation


def accumulated(*, micro: int, recipe: str) -> dict[str, Any]:
    """SGD whose every step takes the same 16 samples, in ``micro`` micro-batches."""
    model = least_squares.make_model()
    opt = torch.optim.SGD(model.parameters(), lr=least_squares.LR)
    inside = True
    with dtrain.join(model, opt, recipe=recipe, every=EVERY) as sync:
        for step in range(STEPS):
            opt.zero_grad()
            x, y = least_squares.batch(sync.island, step)
            for part_x, part_y in zip(x.chunk(micro), y.chunk(micro), strict=True):
                (least_squares.loss_of(model, part_x, part_y) / micro).backward()
            opt.step()
            inside = inside and least_squares.within_bounds(model)
        stats = sync.stats()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {"step": stats.step, "sent": stats.wire_bytes_sent, "parameters": flat.tolist(), "inside": inside}


# ---- a learning-rate schedule


def scheduled(*, scheduler_first: bool) -> dict[str, Any]:
    """StepLR after opt.step(), made before or after the join; torch warns when it sees the two in the wrong order."""
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = StepLR(opt, step_size=7, gamma=0.5) if scheduler_first else None
    lrs, counted = [], []
    with warnings.catch_warnings(), dtrain.join(model, opt, recipe="diloco", every=EVERY) as sync:
        warnings.simplefilter("error")
        scheduler = scheduler or StepLR(opt, step_size=7, gamma=0.5)
        for step in range(STEPS):
            x, y = features(step)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            lrs.append(opt.param_groups[0]["lr"])
            scheduler.step()
            counted.append(sync.step)
        sent = sync.stats().wire_bytes_sent
    x, y = features(STEPS)
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()  # after the block: no hook may be left
    return {"lrs": lrs, "counted": counted, "sent": sent, "step_after": sync.step}


# ---- fp16 with a loss scaler

SKIPPED = (5, 12)
"""Steps (1-based) at which island 1 overflows: with every = 5 and delay = 2 a round starts after the one and lands before the
other's update."""


def scaled(*, recipe: str, every: int, delay: int) -> dict[str, Any]:
    """fp16 autocast with a GradScaler and clipping; island 1 overflows twice, island 0 never."""
    model = classifier()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with dtrain.join(model, opt, recipe=recipe, every=every, delay=delay, scaler=scaler) as sync:
        for step in range(STEPS):
            x, y = features(step)
            if island() == 1 and step + 1 in SKIPPED:
                x = x * 1e6  # beyond fp16
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(x).float(), y)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(opt)
            scaler.update()
        outer = anchors(sync)
        sync.merge()
        stats = sync.stats()
    return {
        "step": stats.step,
        "sent": stats.wire_bytes_sent,
        "anchors": outer,
        "updates": int(opt.state[next(model.parameters())]["step"]),
        "scale": scaler.get_scale(),
        "merged": model_digest(model),
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
        "restored": "step" not in vars(scaler),
    }


def scaled_pair(*, overflows: int) -> dict[str, Any]:
    """Two optimizers under one scaler; on island 1 the gradients of one of them overflow at steps 5 and 12."""
    model = classifier()
    pair = [torch.optim.AdamW(model[0].parameters(), lr=0.01), torch.optim.AdamW(model[2].parameters(), lr=0.01)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with dtrain.join(model, pair, recipe="diloco", every=EVERY, delay=2, scaler=scaler) as sync:
        for index in range(STEPS):
            x, y = features(index)
            model.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if island() == 1 and index + 1 in SKIPPED:
                for group in pair[overflows].param_groups:
                    group["params"][0].grad.fill_(torch.inf)
            for opt in pair:
                scaler.step(opt)
            scaler.update()
        step, outer = sync.step, anchors(sync)
        sync.merge()
    updates = [int(next(iter(opt.state.values()))["step"]) for opt in pair]
    return {"step": step, "anchors": outer, "updates": updates, "merged": model_digest(model)}


def scaled_allreduce() -> str:
    """What the user is told."""
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    try:
        dtrain.join(model, opt, recipe="allreduce", scaler=torch.amp.GradScaler("cpu"))
    except ValueError as e:
        return str(e)
    return "not refused"


# ---- two optimizers


def two_optimizers() -> dict[str, Any]:
    """SGD for the first layer, AdamW for the second, stepped in this order."""
    model = classifier()
    sgd, adamw = torch.optim.SGD(model[0].parameters(), lr=0.1), torch.optim.AdamW(model[2].parameters(), lr=0.01)
    counted = []
    with dtrain.join(model, [sgd, adamw], recipe="diloco", every=EVERY, clip=1.0) as sync:
        for step in range(STEPS):
            x, y = features(step)
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
            adamw.step()
            counted.append(sync.step)
        sent = sync.stats().wire_bytes_sent
        outer = anchors(sync)
    return {"counted": counted, "sent": sent, "anchors": outer, "model": model_digest(model)}

"""Which models do people join? Tied weights, batch norm, frozen layers, islands that start apart: each function is one loop."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import dtrain
from tests.dist.child import digest, island, model_digest

STEPS, EVERY = 20, 5
VOCAB, WIDTH = 64, 32


class Tied(nn.Module):
    """A language model of one matrix: the embedding is the output head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Normed(nn.Module):
    """Frozen features, then batch norm, then a trained head."""

    def __init__(self, frozen_seed: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(frozen_seed)
        self.frozen = nn.Linear(8, 12).requires_grad_(False)
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(x)))


def inputs(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(7000 * island() + step)
    x = torch.randn(16, 8, generator=draw) + island()  # the islands' statistics differ
    return x, (x[:, 0] > x[:, 1]).long()


def tied(*, codec: str) -> dict[str, Any]:
    torch.manual_seed(1)
    model = Tied()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with dtrain.join(model, opt, recipe="diloco", every=EVERY, codec=codec) as sync:
        for step in range(STEPS):
            tokens = torch.randint(VOCAB, (8, 9), generator=torch.Generator().manual_seed(1000 * sync.island + step))
            opt.zero_grad()
            logits = model(tokens[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            opt.step()
        sync.merge()
        stats = sync.stats()
    return {
        "sent": stats.wire_bytes_sent,
        "received": stats.wire_bytes_received,
        "start": stats.wire_bytes_start,
        "merge": stats.wire_bytes_merge,
        "tied": model.head.weight is model.embedding.weight,
        "storage": model.head.weight.data_ptr() == model.embedding.weight.data_ptr(),
        "model": model_digest(model),
    }


def normed() -> dict[str, Any]:
    """Every island starts from weights and statistics of its own; only the frozen part is the same, as when it is loaded."""
    model = Normed(frozen_seed=9, seed=island())
    model.norm.running_mean = torch.full((12,), float(island()))
    frozen, pointer = digest(model.frozen.weight, model.frozen.bias), model.frozen.weight.data_ptr()
    before = model_digest(model)
    opt = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with dtrain.join(model, opt, recipe="fedavg", every=EVERY) as sync:
        start, after = sync.stats().wire_bytes_start, model_digest(model)
        for step in range(STEPS):
            x, y = inputs(step)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        own = _buffers(model)
        sync.merge()
    return {
        "before": before,
        "after": after,
        "start": start,
        "own": own,
        "merged": _buffers(model),
        "model": model_digest(model),
        "frozen": digest(model.frozen.weight, model.frozen.bias) == frozen,
        "frozen_storage": model.frozen.weight.data_ptr() == pointer,
    }


def looked_at(*, look: bool, delay: int) -> dict[str, Any]:
    """Twenty steps, and after the twelfth a look at the exact average, with a round in flight where there is a delay."""
    model = Normed(frozen_seed=9, seed=2)
    opt = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9)
    seen: dict[str, Any] = {}
    with dtrain.join(model, opt, recipe="diloco", every=10, delay=delay, codec="int4:64", error_feedback=True) as sync:
        for step in range(STEPS):
            x, y = inputs(step)
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
            if look and step + 1 == 12:
                before, own = model_digest(model), _flat(model)
                with sync.merged() as average:
                    seen = {"same": average is model, "inside": _flat(average), "own": own}
                seen |= {"restored": model_digest(model) == before, "distance": sync.consensus_distance()}
                seen |= {"untouched": model_digest(model) == before}
    return seen | {"model": model_digest(model)}


def failed_look() -> dict[str, Any]:
    """An evaluation that fails: the island's own weights are back all the same."""
    model = Normed(frozen_seed=9, seed=2)
    opt = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    with dtrain.join(model, opt, recipe="local") as sync:
        x, y = inputs(0)
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        before, inside = model_digest(model), ""
        try:
            with sync.merged():
                inside = model_digest(model)
                raise KeyError("the evaluation's own mistake")
        except KeyError:
            return {"moved": inside != before, "restored": model_digest(model) == before}


class Masked(nn.Module):
    """Beside its trained layer: a frozen one, and buffers that no mean makes sense of."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("mask", torch.full((3, 3), -math.inf if seed == 0 else 1.0).triu(1))
        self.register_buffer("counter", torch.tensor(2**24 + 1 + seed))
        self.register_buffer("flag", torch.tensor(seed == 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.frozen(x))


def apart() -> dict[str, Any]:
    model = Masked(seed=island())
    before = model_digest(model)
    opt = torch.optim.SGD(model.layer.parameters(), lr=0.1)
    with dtrain.join(model, opt, recipe="fedavg", every=EVERY) as sync:
        after = model_digest(model)
        model(torch.full((2, 4), 1.0 + island())).square().mean().backward()
        opt.step()
        own = model_digest(model)
        sync.merge()
    return {
        "before": before,
        "after": after,
        "mask": str(float(model.get_buffer("mask")[0, 1])),
        "counter": int(model.get_buffer("counter")),
        "flag": bool(model.get_buffer("flag")),
        "merged": model_digest(model) != own,
    }


def _flat(model: nn.Module) -> list[float]:
    """All trained parameters and floating-point buffers."""
    return [
        x for v in (*(p for p in model.parameters() if p.requires_grad), *model.buffers()) for x in v.reshape(-1).tolist()
    ]


def _buffers(model: Normed) -> dict[str, Any]:
    return {name: buffer.tolist() for name, buffer in model.norm.named_buffers()}

"""How does a Trainer of transformers become one island of a job? By one more callback; nothing else of its script changes.

    trainer = Trainer(..., callbacks=[dtrain.hf.DtrainCallback(recipe="diloco", every=50)])

It joins when training begins and merges all islands' models when it ends. ``dtrain run JOB.toml -- train.py`` starts such a
script on every island. The Trainer clips each island's own gradient, before the rounds: of a recipe that averages gradients
(allreduce) set ``max_grad_norm=0`` there, and ``clip`` here."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, Literal

import torch
from accelerate.data_loader import SeedableRandomSampler, get_sampler
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dtrain.connect import Connection
from dtrain.engine import Sync, join
from dtrain.membership import place_from_env

_EPOCHS = 2**20
"""The sampler's seed of an epoch is its first one and the epoch's number; islands' own begin so far apart."""


class DtrainCallback(TrainerCallback):
    """What is left out, the job file says under ``dtrain run JOB.toml -- train.py``, else the recipe. Axes that are no argument
    here are the job file's to say.

    Each island draws the training set in an order of its own; where its order is not drawn (a stream, or sampling by length), the
    script splits the data, by ``DTRAIN_ISLAND`` of ``DTRAIN_NUM_ISLANDS``, and says ``own_order=False``. An island's checkpoints
    lie in ``output_dir/islandK``. They hold no rounds: ``resume_from_checkpoint`` is refused; start again from a checkpoint's
    model instead. ``sync`` is what ``dtrain.join`` returned, while training lasts; ``merged_distance`` how far apart the islands
    were at the end. ``link`` is for islands that were connected by hand."""

    def __init__(
        self,
        *,
        recipe: str | None = None,
        every: int | str | None = None,
        delay: int | Literal["round"] | None = None,
        codec: str | None = None,
        topology: str | None = None,
        total_steps: int | None = None,
        clip: float | None = None,
        own_order: bool = True,
        link: Connection | None = None,
    ) -> None:
        self.sync: Sync | None = None
        self.merged_distance: float | None = None
        self._own_order, self._link = own_order, link
        self._join = partial(
            join, recipe=recipe, every=every, delay=delay, codec=codec, topology=topology, total_steps=total_steps, clip=clip,
            link=link,
        )  # fmt: skip

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        place = place_from_env()
        island, num_islands = (self._link.node, self._link.num_nodes) if self._link else (place.island, place.num_islands)
        if num_islands > 1 and args.output_dir is not None:
            args.output_dir = os.path.join(args.output_dir, f"island{island}")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        assert model is not None, "a Trainer gives its callbacks its model"
        if state.global_step:
            raise ValueError(
                f"resume_from_checkpoint at step {state.global_step}: a Trainer's checkpoint holds no rounds of islands; start "
                "again from its model, from_pretrained(checkpoint)"
            )
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end = True: what islands end with is merged, and an island's best is its own; leave it out"
            )
        inner, scaler = _unwrapped(optimizer)
        self.sync = self._join(model, inner, scaler=scaler)
        if self._own_order and self.sync.num_islands > 1:
            _reorder(train_dataloader, self.sync.island)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.sync is None:
            return
        with self.sync as sync:
            self.merged_distance = sync.merge()
        self.sync = None


def _unwrapped(optimizer: Optimizer | None) -> tuple[Optimizer, torch.amp.GradScaler | None]:
    """torch's own optimizer, whose steps can be hooked, and the loss scaler of fp16."""
    scaler = None
    while isinstance(optimizer, AcceleratedOptimizer):
        scaler, optimizer = optimizer.scaler, optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"the Trainer's optimizer is a {type(optimizer).__name__}, whose steps cannot be hooked; use one of torch.optim, and "
            "no DeepSpeed"
        )
    return optimizer, scaler


def _reorder(loader: Any, island: int) -> None:
    sampler = get_sampler(loader)
    if not isinstance(sampler, SeedableRandomSampler):
        raise ValueError(
            f"the Trainer's data come by {type(sampler).__name__}, in an order that is not drawn, and islands would train on the "
            "same batches; split them by island in the script, and give DtrainCallback(own_order=False)"
        )
    sampler.initial_seed += _EPOCHS * island

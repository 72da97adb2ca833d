"""How does a model of somebody's own get in? As a function that makes it, ``model.factory = "mine.py:build"``, or as one of
transformers (``hf_model.py``).

    def build(vocab: int, **arguments) -> torch.nn.Module

maps int64 tokens (batch, context) to logits (batch, context, vocab). A class will do. ``arguments`` are ``model.arguments``.
Weights that it draws from torch's generator follow ``job.seed``; each rank, each resume and ``dtrain eval`` call it again."""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dtrain.hf_model import build_hf, of_config, vocabulary
from dtrain.own import load_named
from dtrain.own_name import is_own
from dtrain.sections import ModelSection

T = TypeVar("T")
_ONE_DRAWS = threading.Lock()
"""The islands of ``dtrain sim`` are threads, and torch's generator belongs to the process."""


def build_own(section: ModelSection, vocab: int, seed: int) -> nn.Module:
    """The model of ``model.factory`` or ``model.hf``, in training mode; raises ValueError where there is none."""
    if section.hf:
        return _seeded(lambda: build_hf(section.hf), seed)
    return _of_factory(section, vocab, seed)


def own_shapes(section: ModelSection, vocab: int) -> nn.Module:
    """``build_own`` under another default device, which takes the weights of no checkpoint."""
    return of_config(section.hf) if section.hf else _of_factory(section, vocab, 0)


def _of_factory(section: ModelSection, vocab: int, seed: int) -> nn.Module:
    make = factory_of(section)
    made = _seeded(lambda: make(vocab, **section.arguments), seed)
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"model.factory = {section.factory!r} returned {_said(made)}; return a torch.nn.Module that maps tokens (batch, "
            "context) to logits (batch, context, vocab)"
        )
    return made.train()


def _seeded(make: Callable[[], T], seed: int) -> T:
    """What is made, of weights that torch's generator draws from ``seed``; the generator is afterwards as it was."""
    with _ONE_DRAWS, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


@torch.no_grad()
def check_logits(model: nn.Module, section: ModelSection, vocab: int) -> None:
    """Raises ValueError where a sequence of ``model.context`` tokens does not come out as (1, context, vocab) logits; leaves the
    model in training mode. One of transformers may know more tokens than the data have."""
    key, context = f"model.{section.theirs}", section.context
    vocab = vocabulary(model) if section.hf else vocab
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{key} has no parameters that require a gradient; there is nothing to train")
    device = next(model.parameters()).device
    model.eval()
    logits = model(torch.zeros(1, context, dtype=torch.int64, device=device))
    model.train()
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape != (1, context, vocab):
        raise ValueError(
            f"{key} maps tokens of shape (1, {context}) to {_said(logits)}; return logits of shape (batch, context, vocab), here "
            f"(1, {context}, {vocab})"
        )


def factory_of(section: ModelSection) -> Callable[..., object]:
    """Takes the size of the vocabulary and ``model.arguments``; raises ValueError where there is no such function."""
    make = _function(section.factory)
    try:
        inspect.signature(make).bind(256, **section.arguments)
    except TypeError as e:
        words = ", ".join(section.arguments) or "nothing"
        raise ValueError(
            f"model.factory = {section.factory!r} does not take the size of the vocabulary and model.arguments ({words}): "
            f"{e}; let it take these, or say others"
        ) from None
    return make


def _function(name: str) -> Callable[..., object]:
    where, _, word = name.rpartition(":")
    if not where or not word:
        raise ValueError(f"model.factory = {name!r} names no function; write FILE.py:FUNCTION or package.module:FUNCTION")
    found = load_named(name, "factory", "model")[2] if is_own(name) else getattr(_imported(name, where), word, None)
    if not callable(found):
        raise ValueError(f"model.factory = {name!r}: there is no function {word} in {where}; define def {word}(vocab, ...) there")
    return found


def _imported(name: str, module: str) -> object:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise  # the module is there, and lacks something itself
        raise ValueError(
            f"model.factory = {name!r}: there is no module {e.name}; install it, add its folder to PYTHONPATH, or write "
            "FILE.py:FUNCTION"
        ) from None


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"a {type(value).__name__}"

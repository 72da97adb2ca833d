"""How does a causal language model of transformers get in? By ``model.hf``: a config, a checkpoint, or a name on the hub.

Its parameters keep their names, and of what it returns the logits are taken, so that a run's folder, with config.json beside
model.safetensors, is a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads. Master weights are fp32, whatever the
config says. transformers is imported inside: only jobs that ask for it wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from dtrain.data.corpus import Corpus
from dtrain.extras import require

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json")


def check_config(where: str, corpus: Corpus, context: int) -> None:
    """Raises ValueError where there is no such model, its vocabulary does not cover the data's, or its positions end before the
    context does."""
    config = _config(where)
    if corpus.num_words > config.vocab_size:
        raise ValueError(
            f'model.hf = "{where}" knows {config.vocab_size} tokens and data.source = "{corpus.source}" has {corpus.num_words}; '
            "use the model's own tokenizer (data.tokenizer), or a config with a larger vocab_size"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise ValueError(
            f'model.context = {context} is more than the {positions} positions of model.hf = "{where}"; use {positions} or fewer'
        )


def vocabulary(model: nn.Module) -> int:
    """The logits that it gives a token."""
    return cast(Any, model).config.vocab_size


def build_hf(where: str) -> nn.Module:
    """The model with its weights, or of a config alone with weights of torch's generator; in training mode."""
    config = _config(where)
    with _one_line(where):
        from transformers import AutoModelForCausalLM

        if _has_weights(where):
            return _of_logits(AutoModelForCausalLM.from_pretrained(where, dtype="float32"))
    return of_config(where, config)


def of_config(where: str, config: Any = None) -> nn.Module:
    """The model of a config without anybody's weights."""
    with _one_line(where):
        from transformers import AutoModelForCausalLM

        return _of_logits(AutoModelForCausalLM.from_config(config or _config(where), dtype="float32"))


def save_config(model: nn.Module, folder: Path) -> None:
    cast(Any, model).config.save_pretrained(folder)


def _config(where: str) -> Any:
    require("transformers", asked=f'model.hf = "{where}"', extra="hf")
    looks_local = where.startswith((".", "/", "~")) or where.endswith(".json")
    if looks_local and not os.path.exists(where):
        raise ValueError(f'model.hf = "{where}" does not exist; name a folder with a config.json, or OWNER/NAME on the hub')
    with _one_line(where):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(where)


def _has_weights(where: str) -> bool:
    """A name on the hub is one of weights."""
    if os.path.isfile(where):
        return False
    return not os.path.isdir(where) or any(True for pattern in _WEIGHTS for _ in Path(where).glob(pattern))


def _of_logits(model: nn.Module) -> nn.Module:
    cast(Any, model).config.use_cache = False  # of keys and values, for generation
    model.register_forward_hook(_logits)
    return model.float().train()


def _logits(model: nn.Module, args: object, output: Any) -> Tensor:
    return output.logits


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Around what is read, or fetched: what is wrong with that is a person's to mend."""
    try:
        yield
    except (OSError, ValueError) as e:
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise ValueError(f'model.hf = "{where}" cannot be loaded: {reason}') from e

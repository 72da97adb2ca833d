"""Is the evaluation the mean over all tokens, and does it leave the model as it was?"""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dtrain.config import parse_job
from dtrain.evaluate import MOST_TOKENS, evaluate, nats_of_share
from dtrain.inside import Whole
from dtrain.units import bits_per_byte


class Bigram(nn.Module):
    """Logits of the next token from the current one; dropout, so that a wrong mode shows."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, vocab)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(3).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.dropout(self.table(tokens))


def sequences(count: int, vocab: int) -> tuple[Tensor, Tensor]:
    windows = torch.randint(vocab, (count, 9), generator=torch.Generator().manual_seed(0))
    return windows[:, :-1], windows[:, 1:]


@pytest.mark.parametrize("batch", [1, 4, 7, 64])
def test_mean_over_all_tokens_whatever_the_batch(batch: int) -> None:
    model, (x, y) = Bigram(11), sequences(10, 11)
    table = model.table.weight.detach().double()
    log_probabilities = (table.exp() / table.exp().sum(-1, keepdim=True)).log()
    expected = -sum(log_probabilities[a, b].item() for a, b in zip(x.flatten(), y.flatten(), strict=True)) / 80
    assert evaluate(model, (x, y), batch=batch) == pytest.approx(expected, rel=1e-6)


def test_uniform_model_scores_the_logarithm_of_the_vocabulary() -> None:
    model = Bigram(16)
    nn.init.zeros_(model.table.weight)
    loss = evaluate(model, sequences(5, 16))
    assert loss == pytest.approx(math.log(16), rel=1e-6)
    assert bits_per_byte(loss, 1.0) == pytest.approx(4.0, rel=1e-6)
    assert bits_per_byte(loss, 2.0) == pytest.approx(2.0, rel=1e-6)


def test_ranks_together_find_the_mean_of_one() -> None:
    """130 sequences are 3 batches: of two ranks the second computes one again, which does not count."""
    model, held_out = Bigram(11), sequences(130, 11)
    for ranks in (1, 2, 5):
        shares = [nats_of_share(model, held_out, rank=rank, num_ranks=ranks) for rank in range(ranks)]
        assert sum(shares) / (130 * 8) == pytest.approx(evaluate(model, held_out), rel=1e-14)


def test_each_rank_evaluates_with_rank_0s_buffers_those_too_that_no_checkpoint_keeps() -> None:
    model, shared = Bigram(11), list[Tensor]()
    model.register_buffer("scale", torch.ones(1), persistent=False)
    ranks = SimpleNamespace(rank=0, num_ranks=1, share=shared.extend, total=list)
    held_out, island = sequences(10, 11), SimpleNamespace(ranks=ranks)
    loss = Whole(parse_job({}), model, cast(Any, None), held_out, cast(Any, island), nullcontext()).evaluate()
    assert loss == pytest.approx(evaluate(model, held_out), rel=1e-14)
    assert [id(b) for b in shared] == [id(b) for b in model.buffers()]


@pytest.mark.parametrize(("length", "largest"), [(128, 64), (129, 63), (5000, 1), (2 * MOST_TOKENS, 1)])
def test_long_sequences_pass_a_few_at_a_time(length: int, largest: int) -> None:
    """Their logits are as large as the vocabulary, each."""
    model, seen = Bigram(2), list[torch.Size]()
    model.table.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    x = torch.zeros(65, length, dtype=torch.int64)
    evaluate(model, (x, x))
    assert {shape[1] for shape in seen} == {length}
    assert max(shape[0] for shape in seen) == largest
    assert sum(shape[0] for shape in seen) == 65


@pytest.mark.parametrize("of_one", [True, False])
def test_modes_weights_and_gradients_stay(of_one: bool) -> None:
    model = Bigram(11).train()
    model.frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = model.table.weight.detach().clone()
    if of_one:
        evaluate(model, sequences(10, 11))
    else:
        nats_of_share(model, sequences(10, 11), rank=1, num_ranks=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(modes.values()) == {True, False}
    assert torch.equal(model.table.weight, before)
    assert model.table.weight.grad is None


def test_modes_are_restored_after_an_error() -> None:
    model = Bigram(11).train()
    model.frozen.eval()
    with pytest.raises(IndexError):
        evaluate(model, (torch.full((1, 4), 99), torch.zeros(1, 4, dtype=torch.int64)))
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_nothing_to_evaluate_is_one_line() -> None:
    empty = torch.zeros(0, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="cannot evaluate 0 sequences"):
        evaluate(Bigram(3), (empty, empty))

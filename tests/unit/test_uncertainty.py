"""Are an ensemble's loss, calibration error and spread what their formulas say, token by token?"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dtrain.uncertainty import BINS, covariance_diagonal, predict

VOCAB = 7


class Table(nn.Module):
    """Logits of the next token from the current one."""

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding.from_pretrained(scale * torch.randn(VOCAB, VOCAB, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def sequences(count: int = 40, length: int = 12) -> tuple[Tensor, Tensor]:
    windows = torch.randint(VOCAB, (count, length + 1), generator=torch.Generator().manual_seed(1))
    return windows[:, :-1], windows[:, 1:]


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(v) for v in row]
    return [e / math.fsum(exps) for e in exps]


def by_hand(tables: list[list[list[float]]], x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """(loss, calibration error, accuracy, spread) of the mean of the models' softmaxes, in plain floats."""
    nats, spread, right = [], [], []
    bins: dict[int, list[tuple[float, bool]]] = {}
    for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True):
        each = [softmax(table[a]) for table in tables]
        mean = [math.fsum(column) / len(each) for column in zip(*each, strict=True)]
        nats.append(-math.log(mean[b]))
        spread.append(math.fsum((p - m) ** 2 for row in each for p, m in zip(row, mean, strict=True)) / len(each))
        confidence = max(mean)
        right.append(mean.index(confidence) == b)
        bins.setdefault(math.ceil(confidence * BINS), []).append((confidence, right[-1]))
    n = len(nats)
    gaps = [abs(sum(hit for _, hit in found) - math.fsum(c for c, _ in found)) for found in bins.values()]
    return math.fsum(nats) / n, math.fsum(gaps) / n, sum(right) / n, math.fsum(spread) / n


@pytest.mark.parametrize("batch", [3, 16, 64])
def test_each_model_and_the_ensemble(batch: int) -> None:
    models, (x, y) = [Table(seed, scale) for seed, scale in ((0, 1.0), (1, 2.0), (2, 0.5))], sequences()
    tables = [model.table.weight.double().tolist() for model in models]
    found = predict(models, (x, y), batch=batch)
    wanted = [*(by_hand([table], x, y) for table in tables), by_hand(tables, x, y)]
    for got, want in zip(found, wanted, strict=True):
        # fp32 softmax: a few roundings of 2^-24 relative, in a sum of logs and of probabilities.
        assert got == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert found[-1].loss < max(one.loss for one in found[:-1]), "the mean's loss is below the mean loss (Jensen)"
    assert [one.spread for one in found[:-1]] == [0.0] * 3


def test_a_model_that_knows_its_chances_is_calibrated() -> None:
    """Targets are drawn from the model itself: the gap of each bin is a mean of n independent deviations below 1, so the error is
    below sum_b sqrt(n_b) / n <= sqrt(BINS / n), five times over."""
    model, generator = Table(3, 1.5), torch.Generator().manual_seed(2)
    x = torch.randint(VOCAB, (400, 50), generator=generator)
    y = torch.multinomial(model(x).flatten(0, 1).softmax(-1), 1, generator=generator).view(x.shape)
    n = x.numel()
    (known, _) = predict([model], (x, y))
    assert known.calibration_error < 5 * math.sqrt(BINS / n)
    sure = Table(3, 6.0)
    (bragging, _) = predict([sure], (x, y))
    assert bragging.calibration_error > 10 * known.calibration_error


def test_the_diagonal_by_two_sums() -> None:
    thetas = torch.randn(5, 100, generator=torch.Generator().manual_seed(4)).double()
    diagonal = covariance_diagonal(thetas.sum(dim=0), thetas.square().sum(dim=0), 5)
    torch.testing.assert_close(diagonal, thetas.var(dim=0, correction=0), rtol=1e-12, atol=1e-12)


class Sure(nn.Module):
    """Its logit of one token is 120 above all others, which are alike."""

    def __init__(self, token: int) -> None:
        super().__init__()
        row = torch.zeros(VOCAB)
        row[token] = 120.0
        self.table = nn.Embedding.from_pretrained(row.repeat(VOCAB, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def test_a_model_that_is_sure_and_wrong_has_a_loss_that_is_a_number() -> None:
    """exp(-120) is 0 in fp32: -log softmax is 120 of whoever is wrong; of two that are sure of different tokens the mean is
    1/2 of what either says, log 2 and 120 + log 1 where both are wrong."""
    x = torch.zeros(2, 3, dtype=torch.int64)
    y = torch.tensor([[0, 1, 2], [0, 1, 2]])
    found = predict([Sure(0), Sure(1)], (x, y))
    wanted = (80.0, 80.0, (2 * math.log(2) + 120) / 3)
    # fp32 near 120: half of 2^-17 each.
    assert [one.loss for one in found] == pytest.approx(wanted, rel=0, abs=2.0**-17)

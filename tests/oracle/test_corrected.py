"""Does a merge of models that were never in sync give their variance back, as the formula says, and to all the same bits?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn

import dtrain
from dtrain.build import build_model
from dtrain.connect import Connection
from dtrain.data.corpus import load_corpus
from dtrain.launch.checks import resolved
from dtrain.recipes import RECIPES, resolve, with_start
from tests.islands import run_islands
from tests.unit.by_hand import job_of, train, write_texts

ISLANDS, ROWS, COLUMNS = 4, 60, 70
EPS = 1e-6
U = 2.0**-24


class Model(nn.Module):
    """A tensor of each kind, with an offset, whose numbers are ``island``'s own."""

    def __init__(self, island: int, scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(island)
        self.wide = nn.Parameter(0.25 + scale * torch.randn(ROWS, COLUMNS, generator=draw))
        self.deep = nn.Parameter(scale / 50 * torch.randn(5, 3, 40, generator=draw))
        self.bias = nn.Parameter(scale * torch.randn(COLUMNS, generator=draw))


Weights = dict[str, NDArray[np.float64]]


def numpy_of(state: dict[str, Tensor]) -> Weights:
    return {name: value.double().numpy() for name, value in state.items()}


def corrected(models: list[Weights]) -> Weights:
    out = {}
    for name in models[0]:
        stacked = np.stack([model[name] for model in models])
        mean, variance = stacked.mean(axis=0), np.mean([np.var(x) for x in stacked])
        scale = np.sqrt((variance + EPS) / (np.var(mean) + EPS)) if mean.ndim >= 2 else 1.0
        out[name] = mean.mean() + scale * (mean - mean.mean())
    return out


def merged(start: Literal["same", "own"], how: str, scale: float = 1.0) -> tuple[list[Weights], list[Weights], list[float]]:
    """Each island's model before and after the merge, in float64, and the distance that the merge told."""

    def island(connection: Connection) -> tuple[Weights, Weights, float]:
        model = Model(connection.node, scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dtrain.join(model, optimizer, recipe="local", start=start, bucket_bytes=4096, link=connection) as sync:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            distance = sync.merge_corrected() if how == "corrected" else sync.merge()
        return numpy_of(before), numpy_of(model.state_dict()), distance

    before, after, distances = zip(*run_islands(ISLANDS, island), strict=True)
    return list(before), list(after), list(distances)


def test_uncorrelated_models_get_their_variance_back() -> None:
    before, after, distances = merged("own", "corrected")
    assert (before[0]["wide"] != before[1]["wide"]).any(), "each kept its own start"
    want = corrected(before)
    for name, value in want.items():
        assert all((model[name] == after[0][name]).all() for model in after), "all islands hold the same bits"
        # The mean of n rounds n + 1 times values up to M; the difference, the product and the sum once each, and the product
        # stretches what came before by at most sqrt(n): 2 (n + 4) u M sqrt(n), with M the largest value before or after.
        M = max(np.abs(value).max(), *(np.abs(model[name]).max() for model in before))
        np.testing.assert_allclose(after[0][name], value, rtol=0, atol=2 * (ISLANDS + 4) * U * M * ISLANDS**0.5)
    apart = [sum(np.square(x - np.mean([m[k] for m in before], axis=0)).sum() for k, x in model.items()) for model in before]
    # That of the plain mean: a norm is off by no more than the norm of what the mean is off by, (n + 1) u M an element.
    numel, M = sum(x.size for x in before[0].values()), max(np.abs(x).max() for model in before for x in model.values())
    assert distances == pytest.approx([np.sqrt(np.mean(apart))] * ISLANDS, rel=0, abs=(ISLANDS + 1) * U * M * numel**0.5)


def test_a_plain_mean_keeps_one_nth_of_the_variance_and_a_corrected_one_all() -> None:
    """Of 4200 normal numbers the mean's variance has a relative standard deviation of sqrt(2 / 4200) = 2.2 %, times five."""
    before, plain, _ = merged("own", "mean")
    _, after, _ = merged("own", "corrected")
    variance = np.mean([np.var(model["wide"]) for model in before])
    left = np.var(plain[0]["wide"]) / variance
    assert left == pytest.approx(1 / ISLANDS, rel=5 * (2 / (ROWS * COLUMNS)) ** 0.5)
    # (v + eps) / (v / n + eps) in place of n is short of it by at most n eps / v. The offset, the scale, the difference, the
    # product and the sum are rounded once each, to u M, and the scale stretches the first and the third of them: no more than
    # that moves the mean and the standard deviation.
    off = (2 * ISLANDS**0.5 + 3) * U * max(np.abs(model["wide"]).max() for model in (*before, after[0]))
    assert np.std(after[0]["wide"]) - variance**0.5 == pytest.approx(0, abs=ISLANDS * EPS / variance**0.5 + off)
    assert np.mean(after[0]["wide"]) == pytest.approx(np.mean(plain[0]["wide"]), rel=0, abs=off)
    assert (after[0]["bias"] == plain[0]["bias"]).all(), "biases are left alone"


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_equal_models_stay_as_they_are(scale: float) -> None:
    """However small their weights: the mean of equal numbers is off by (n + 1) u at most, and so is what follows."""
    before, after, distances = merged("same", "corrected", scale)
    assert all((model["wide"] == before[0]["wide"]).all() for model in before), "all have island 0's"
    for name, value in before[0].items():
        np.testing.assert_allclose(after[0][name], value, rtol=0, atol=2 * (ISLANDS + 4) * U * np.abs(value).max())
    assert max(distances) <= (ISLANDS + 1) * U * sum(np.square(value).sum() for value in before[0].values()) ** 0.5


def test_one_tensor_of_biases_has_nothing_to_correct() -> None:
    def island(connection: Connection) -> Tensor:
        model = nn.ParameterList([nn.Parameter(torch.full((3,), float(connection.node)))])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dtrain.join(model, optimizer, recipe="local", start="own", link=connection) as sync:
            sync.merge_corrected()
        return next(model.parameters()).detach()

    assert all(torch.equal(x, torch.full((3,), 0.5)) for x in run_islands(2, island))


def test_a_job_starts_apart_and_merges_so(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    job = job_of(texts, 'islands.start="own"', 'train.merge="variance_corrected"', "train.steps=2")
    run = train(job, tmp_path / "run")
    islands = [load_file(run / "islands" / f"island{k}.safetensors") for k in range(2)]
    starts = [build_model(job, load_corpus(str(texts)), island).state_dict()["embedding.weight"] for island in range(6)]
    assert all(not torch.equal(starts[i], starts[j]) for i in range(6) for j in range(i)), "a seed of its own for each"
    want = corrected([{name: value.astype(np.float64) for name, value in island.items()} for island in islands])
    got = load_file(run / "model.safetensors")
    assert got.keys() == want.keys()
    for name, value in want.items():
        M = max(np.abs(value).max(), *(np.abs(island[name]).max() for island in islands))
        np.testing.assert_allclose(got[name], value, rtol=0, atol=2 * 6 * U * M * 2**0.5)


_SHARING = ("allreduce", "demo", "diloco", "choco", "beer", "desloc")
SHARE = [name for name, row in RECIPES.items() if row.algorithm in _SHARING]


@pytest.mark.parametrize("name", RECIPES)
def test_methods_that_keep_what_all_share_refuse_to_start_apart(name: str, tmp_path: Path) -> None:
    if name not in SHARE:
        assert with_start(resolve(name, {}, 4), "own").start == "own"
        return
    with pytest.raises(ValueError, match="so all islands start from the same parameters"):
        with_start(resolve(name, {}, 4), "own")
    with pytest.raises(ValueError, match="so all islands start from the same parameters"):
        resolved(job_of(tmp_path, f'sync.recipe="{name}"', 'islands.start="own"'))


def test_islands_must_agree_on_their_start() -> None:
    def island(connection: Connection) -> None:
        model = Model(connection.node)
        start: Literal["same", "own"] = "own" if connection.node else "same"
        dtrain.join(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe="local", start=start, link=connection)

    with pytest.raises(ValueError, match="has another recipe than island 0"):
        run_islands(2, island)

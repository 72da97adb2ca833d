"""Does a model of transformers train, merge and come out as one of transformers? A tiny random Llama; no hub is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dtrain.build import build_model, model_of_shapes
from dtrain.config import Job, dump_job, load_job, parse_job
from dtrain.data.corpus import load_corpus
from dtrain.launch.cli import run_command
from dtrain.launch.plan_job import _own_work
from tests.unit.by_hand import by_hand, flat, job_of, same, train, weights_of
from tests.unit.small_run import refused

pytestmark = pytest.mark.usefixtures("one_thread")


def config(vocab: int = 260, positions: int = 64, *, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=vocab,
        max_position_embeddings=positions, tie_word_embeddings=tied,
    )  # fmt: skip


def hf_job(texts: Path, where: object, *changes: str) -> Job:
    raw = job_of(texts, *changes).model_dump(exclude_none=True, exclude={"model"})
    return parse_job(raw | {"model": {"context": 16, "hf": str(where)}})


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_config_alone_is_drawn_from_the_jobs_seed(texts: Path, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path / "tiny")
    corpus = load_corpus(str(texts))
    for where in (tmp_path / "tiny", tmp_path / "tiny" / "config.json"):
        model = build_model(hf_job(texts, where, "job.seed=5"), corpus)
        torch.manual_seed(5)
        expected = LlamaForCausalLM(config())
        assert same(model.state_dict(), expected.state_dict())
        tokens = torch.arange(32).view(2, 16)
        assert torch.equal(model(tokens), logits(expected, tokens))
        assert model.training
    shapes = {name: p.shape for name, p in model_of_shapes(hf_job(texts, tmp_path / "tiny"), 256).named_parameters()}
    assert shapes == {name: p.shape for name, p in expected.named_parameters()}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_trains_on_and_the_run_is_one_again(texts: Path, tmp_path: Path, tied: bool) -> None:
    """By DiLoCo, from bf16 weights: both islands' steps, their merge, and a folder that transformers loads."""
    start = LlamaForCausalLM(config(tied=tied)).bfloat16()
    start.save_pretrained(tmp_path / "tiny")
    job = hf_job(texts, tmp_path / "tiny")
    model = build_model(job, load_corpus(str(texts)))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(model.state_dict(), start.float().state_dict())
    run = train(job, tmp_path / "run")
    alone = [by_hand(job, load_corpus(str(texts)), island).weights for island in range(2)]
    for island in range(2):
        assert same(weights_of(run, island), alone[island])
    again = AutoModelForCausalLM.from_pretrained(run)
    merged = load_file(run / "model.safetensors")
    assert same(merged, again.state_dict())
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]) is tied
    torch.testing.assert_close(flat(merged), (flat(alone[0]) + flat(alone[1])) / 2)


def test_it_is_run_and_evaluated_by_a_path_from_here(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config().save_pretrained(tmp_path / "tiny")
    Path("job.toml").write_text(dump_job(hf_job(texts, "tiny", "sync.recipe=diloco", "sync.every=3")))
    assert run_command(["sim", "job.toml"]) == 0, capsys.readouterr().err
    assert f'hf = "{tmp_path}/tiny"' in Path("runs/run/job.toml").read_text()
    assert run_command(["eval", "runs/run"]) == 0, capsys.readouterr().err
    job = load_job(Path("runs/run/job.toml"))
    work = _own_work(job, model_of_shapes(job, 256), 256)  # what dtrain plan reckons with
    assert (work.layers, work.width, work.parameters - work.multiplied) == (2, 32, 260 * 32)


def test_tokens_that_it_does_not_know_are_refused_and_padding_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """.bin files: 301 words, padded to 320 for gpt."""
    (np.arange(3000, dtype="<u2") % 301).tofile("tokens.bin")
    for vocab in (300, 301):
        config(vocab).save_pretrained(tmp_path / f"of{vocab}")
    Path("job.toml").write_text('[data]\nsource = "tokens.bin"\n[model]\ncontext = 16\n[train]\nsteps = 1\n')
    said = refused(capsys, "run", "job.toml", "model.hf=of300")
    assert 'model.hf = "of300" knows 300 tokens and data.source = "tokens.bin" has 301; use' in said
    assert run_command(["sim", "job.toml", "model.hf=of301"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.hf=./nowhere"], 'model.hf = "./nowhere" does not exist; name a folder with a config.json'),
        (["model.hf=texts"], 'model.hf = "texts" cannot be loaded: '),
        (["model.hf=tiny", "model.context=65"], 'model.context = 65 is more than the 64 positions of model.hf = "tiny"; use'),
        (["model.hf=tiny", "model.heads=2"], "model.heads = 2 has no effect with model.hf; leave it out"),
        (["model.hf=tiny", "model.factory=mine.py:f"], "model.hf = 'tiny' is another model than model.factory = 'mine.py:f'"),
        (["model.hf=tiny", "model.arguments={a=1}"], "model.arguments = {'a': 1} has no effect without model.factory"),
        (
            ["model.hf=tiny", "islands.engine=pipeline", "islands.ranks=2", "train.accumulate=2"],
            'model.hf with islands.engine = "pipeline", whose stages are cut from gpt only',
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], said: str
) -> None:
    config().save_pretrained(tmp_path / "tiny")
    Path("job.toml").write_text(f'[data]\nsource = "{texts}"\n')
    assert said in refused(capsys, "run", "job.toml", *changes)


def test_a_missing_package_is_named_with_what_brings_it(
    texts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    Path("job.toml").write_text(f'[data]\nsource = "{texts}"\n')
    said = refused(capsys, "run", "job.toml", "model.hf=tiny")
    assert said == "model.hf = \"tiny\" needs transformers, which is not installed; in a checkout: pip install '.[hf]'"

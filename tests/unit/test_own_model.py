"""Does a model of somebody's own train, resume, merge, and get evaluated and planned as the project's does?"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dtrain import checkpoint
from dtrain.build import build_model, model_of_shapes
from dtrain.config import Job, dump_job, load_job, parse_job
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences, noise_seed
from dtrain.launch.cli import run_command
from dtrain.launch.plan_job import _own_work
from dtrain.optim import ScheduleFreeAdamW, decay_groups
from tests.unit.by_hand import by_hand, job_of, same, train, weights_of
from tests.unit.small_run import refused

MINE = """
import torch
from torch import nn
from dtrain.models.gpt import GPT, GPTConfig

class Words(nn.Module):
    def __init__(self, vocab, width=8, drop=0.0, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + self.drop(torch.tanh(layer(x)))
        return self.head(x)

def gpt(vocab, seed):
    model = GPT(GPTConfig(vocab=vocab, layers=1, width=16, heads=2, context=16))
    model.init_weights(seed)
    return model

class Turned(Words):
    def forward(self, tokens):
        return super().forward(tokens).transpose(1, 2)

class Last(Words):
    def forward(self, tokens):
        return super().forward(tokens)[:, -1]

class Named(Words):
    def forward(self, tokens):
        return {"logits": super().forward(tokens)}

class Frozen(Words):
    def __init__(self, vocab):
        super().__init__(vocab)
        self.requires_grad_(False)

class Reads(Words):
    def __init__(self, vocab):
        super().__init__(vocab)
        self.scale = float(self.head.weight.std())

def nothing(vocab):
    return [vocab]

number = 3
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def in_a_folder_with_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(textwrap.dedent(MINE))


def own_job(texts: Path, what: str = "Words", *changes: str) -> Job:
    """Of a factory, with the layers, width and heads of ``job_of`` left out."""
    job = job_of(texts, *(change for change in changes if not change.startswith("model.")))
    raw = job.model_dump(exclude_none=True, exclude={"model"}) | {"model": {"context": 16, "factory": f"mine.py:{what}"}}
    return parse_job(raw, [change for change in changes if change.startswith("model.")])


def test_a_factory_that_makes_the_projects_gpt_trains_to_the_same_bits(texts: Path, tmp_path: Path) -> None:
    """DiLoCo on two islands: every wire, merge and file."""
    rounds = ("sync.recipe=diloco", "sync.every=2")
    own = train(own_job(texts, "gpt", "model.arguments={seed=0}", *rounds), tmp_path / "own")
    theirs = train(job_of(texts, *rounds), tmp_path / "gpt")
    assert same(load_file(own / "model.safetensors"), load_file(theirs / "model.safetensors"))
    assert same(weights_of(own, 1), weights_of(theirs, 1))


def test_arguments_reach_it_and_weights_follow_the_seed(texts: Path) -> None:
    corpus = load_corpus(str(texts))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    jobs = [own_job(texts, "Words", f"job.seed={seed}", "model.arguments={width=6}") for seed in (3, 3, 4)]
    one, again, other = (build_model(job, corpus) for job in jobs)
    assert torch.equal(torch.get_rng_state(), before), "the process's own generator is left alone"
    assert one.training
    assert one.get_parameter("embedding.weight").shape == (256, 6)
    assert same(one.state_dict(), again.state_dict())
    assert not same(one.state_dict(), other.state_dict())
    torch.manual_seed(3)
    assert same(one.state_dict(), nn.Module.state_dict(_words(6)))
    apart = own_job(texts, "Words", 'islands.start="own"')
    assert not same(build_model(apart, corpus, 0).state_dict(), build_model(apart, corpus, 1).state_dict())


def _words(width: int) -> nn.Module:
    from dtrain.own import load_named

    words = load_named("mine.py:Words", "factory", "model")[2]
    assert callable(words)
    model = words(256, width)
    assert isinstance(model, nn.Module)
    return model


def test_its_dropout_is_each_islands_own_and_the_same_after_a_resume(texts: Path, tmp_path: Path) -> None:
    """One island, so that no other thread draws from the generator; beside a plain loop with the noise of each step."""
    job = own_job(texts, "Words", "model.arguments={drop=0.5}", "islands.count=1", "train.checkpoint_every=3")
    whole = train(job, tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "cut")
    for name in ("model.safetensors", "islands"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(checkpoint.step_folder(tmp_path / "cut", 6))
    torch.manual_seed(99)
    (tmp_path / "cut" / "logs").rename(tmp_path / "cut" / "old_logs")
    resumed = train(job, tmp_path / "cut", resume_step=3)
    assert same(weights_of(whole, 0), weights_of(resumed, 0))
    still = train(own_job(texts, "Words", "islands.count=1"), tmp_path / "still")
    assert not same(weights_of(whole, 0), weights_of(still, 0)), "there was dropout"
    places = itertools.product((0, 1), repeat=4)
    assert len({noise_seed(seed=0, island=i, rank=r, step=s, micro=m) for i, r, s, m in places}) == 16


def test_a_plain_loop_over_it_is_the_run(texts: Path, tmp_path: Path) -> None:
    job = own_job(texts, "Words", "train.accumulate=2")
    run = train(job, tmp_path / "run")
    for island in range(2):
        assert same(weights_of(run, island), by_hand(job, load_corpus(str(texts)), island).weights)


def test_it_is_run_resumed_and_evaluated_from_its_run_folder(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = own_job(texts, "Words", "model.arguments={width=6}", "train.checkpoint_every=3")
    Path("job.toml").write_text(dump_job(job))
    assert run_command(["sim", "job.toml"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "run"
    kept = (run / "job.toml").read_text()
    assert f'factory = "{tmp_path}/mine.py:Words"' in kept
    assert "arguments = {width = 6}" in kept
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == 256 * 6 * 2 + 3 * (6 * 6 + 6)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    assert run_command(["sim", str(run / "job.toml"), "--resume", "train.steps=8"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run_command(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    model = build_model(load_job(run / "job.toml"), load_corpus(str(texts)))
    model.load_state_dict(load_file(run / "model.safetensors"))
    inputs, targets = heldout_sequences(load_corpus(str(texts)), 16)
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1).double(), targets.flatten()).item()
    (merged,) = [line.split() for line in out.splitlines() if line.startswith("merged")]
    assert float(merged[1]) == pytest.approx(loss, abs=1e-4)
    assert float(merged[2]) == pytest.approx(loss / math.log(2), abs=1e-4)


def test_a_tied_weight_is_resumed_as_its_average_under_both_names() -> None:
    """Of Schedule-Free, whose checkpoint other numbers of islands begin from."""
    model = _words(4)
    model.head.weight = model.embedding.weight  # pyright: ignore[reportAttributeAccessIssue]
    optimizer = ScheduleFreeAdamW(decay_groups(model, 0.1), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    state |= checkpoint.optimizers_tensors([optimizer]) | checkpoint.averaged_names([optimizer], model)
    kept = checkpoint._model_of(state)
    assert torch.equal(kept["head.weight"], kept["embedding.weight"])
    assert not torch.equal(kept["head.weight"], model.get_parameter("embedding.weight"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("Turned", "maps tokens of shape (1, 16) to a tensor of shape (1, 256, 16) and dtype torch.float32; return logits"),
        ("Last", "maps tokens of shape (1, 16) to a tensor of shape (1, 256) and dtype"),
        ("Named", "maps tokens of shape (1, 16) to a dict; return logits of shape (batch, context, vocab), here (1, 16, 256)"),
        ("Frozen", "model.factory has no parameters that require a gradient"),
        ("nothing", "mine.py:nothing' returned a list; return a torch.nn.Module"),
    ],
)
def test_what_is_no_model_of_logits_is_one_line(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, said: str
) -> None:
    """Before any step."""
    Path("job.toml").write_text(dump_job(own_job(texts, what)))
    assert run_command(["sim", "job.toml"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").exists() is False


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.factory=mine.py:Wrods"], "there is no function Wrods in "),
        (["model.factory=mine.py:number"], "there is no function number in "),
        (["model.factory=yours.py:Words"], "model.factory = 'yours.py:Words': there is no file "),
        (["model.factory=Words"], "model.factory = 'Words' names no function; write FILE.py:FUNCTION or package.module:FUNCTION"),
        (["model.factory=no.such.package:Words"], "there is no module no; install it, add its folder to PYTHONPATH, or write"),
        (["model.factory=json:Words"], "there is no function Words in json; define"),
        (
            ["model.factory=mine.py:Words", "model.arguments={wdith=3}"],
            "does not take the size of the vocabulary and model.arguments (wdith): got an unexpected keyword argument 'wdith'",
        ),
        (["model.arguments={width=3}"], "model.arguments = {'width': 3} has no effect without model.factory; set that, or leave"),
        (["model.factory=mine.py:Words", "model.width=32"], "model.width = 32 has no effect with model.factory; say it in"),
        (["model.factory=mine.py:Words", "model.arguments=3"], "use a table, as 'model.arguments={width = 64}'"),
        (
            ["model.factory=mine.py:Words", "model.arguments={when=2020-01-01}"],
            "model.arguments.when = 2020-01-01 is a date; use text, numbers, true or false, lists or tables",
        ),
        (
            ["model.factory=mine.py:Words", "islands.engine=pipeline", "islands.ranks=2", "train.accumulate=2"],
            'model.factory with islands.engine = "pipeline", whose stages are cut from gpt only; use islands.engine=ddp',
        ),
    ],
)
def test_what_cannot_be_a_factory_is_refused_before_anything_is_written(
    texts: Path, capsys: pytest.CaptureFixture[str], changes: list[str], said: str
) -> None:
    Path("job.toml").write_text(f'[data]\nsource = "{texts}"\n[model]\ncontext = 16\n')
    assert said in refused(capsys, "run", "job.toml", *changes)


def test_arguments_come_back_from_toml() -> None:
    arguments = {"width": 6, "name": 'a "b"\n\x7f', "rates": [0.5, 1], "deep": {"on": True, "odd key": []}}
    job = parse_job({"model": {"factory": "mine.py:Words", "arguments": arguments}})
    import tomllib

    assert parse_job(tomllib.loads(dump_job(job))) == job


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_counts_its_parameters_layers_and_width(texts: Path, tied: bool) -> None:
    job = own_job(texts, "Words", f"model.arguments={{width=24,tied={str(tied).lower()}}}")
    work = _own_work(job, model_of_shapes(job, 256), 256)
    matrices = 3 * (24 * 24 + 24) + 256 * 24  # no token is multiplied with the table that it is looked up in
    assert (work.layers, work.width) == (3, 24)
    assert (work.multiplied, work.parameters) == (matrices, matrices + (0 if tied else 256 * 24))


def test_a_plan_says_what_it_takes_the_model_for(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.toml").write_text(dump_job(own_job(texts, "Words")))
    asked = ["plan", "job.toml", "sync.recipe=diloco", "--link", "10mbit", "--rtt", "1ms", "--gpu", "h100"]
    assert run_command(asked) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "model.factory is taken for 3 layers (its longest nn.ModuleList) of width 8 (its embeddings')" in out


def test_a_plan_needs_a_factory_that_reads_no_values(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("job.toml").write_text(dump_job(own_job(texts, "Reads")))
    said = refused(capsys, "plan", "job.toml", "--link", "10mbit", "--rtt", "1ms", "--gpu", "h100")
    assert "model.factory cannot be made on torch's meta device" in said


def test_gradients_of_a_module_with_buffers_are_not_asked_of_them(texts: Path, tmp_path: Path) -> None:
    """BatchNorm counts in int64; the merge averages what is float."""
    Path("mine.py").write_text(
        MINE
        + """
class Normed(Words):
    def __init__(self, vocab):
        super().__init__(vocab)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2))
"""
    )
    Path("mine.py").rename("normed.py")
    job = own_job(texts, "Words").model_copy()
    job = parse_job(job.model_dump(exclude_none=True), ["model.factory=normed.py:Normed", "sync.recipe=diloco", "sync.every=2"])
    run = train(job, tmp_path / "run")
    merged: dict[str, Tensor] = load_file(run / "model.safetensors")
    means = [weights_of(run, island)["norm.running_mean"] for island in range(2)]
    assert not torch.equal(*means)
    torch.testing.assert_close(merged["norm.running_mean"], (means[0] + means[1]) / 2)

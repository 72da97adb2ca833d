"""Is Schedule-Free AdamW its paper's, does it bear rounds that move the parameters, and is its average what a job evaluates?

The rendering keeps x, y and z apart and runs in float64."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dtrain
from dtrain import checkpoint
from dtrain.build import build_model
from dtrain.config import parse_job
from dtrain.connect import Connection
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.launch.checks import resolved
from dtrain.optim import ScheduleFreeAdamW, at_averages
from tests.islands import Quadratic, run_islands, sgd_step
from tests.oracle.test_diloco import CUT, WIDTH, problem
from tests.oracle.test_gossip import U
from tests.unit.by_hand import job_of, lines_of, part_of, same, train, weights_of, write_texts

LR, BETAS, DECAY, EPS, STEPS, WARMUP = 0.02, (0.9, 0.95), 0.3, 1e-8, 24, 5


def lr_of(t: int) -> float:
    return LR * min(1.0, t / WARMUP)


class Paper:
    """Algorithm 1 on one vector, in the order in which it is printed."""

    def __init__(self, start: Tensor) -> None:
        self.x, self.z, self.v = start.double(), start.double(), torch.zeros_like(start, dtype=torch.float64)
        self.t, self.total = 0, 0.0

    @property
    def y(self) -> Tensor:
        return (1 - BETAS[0]) * self.z + BETAS[0] * self.x

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        y = self.y
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        rate = lr_of(self.t) * (1 - BETAS[1] ** self.t) ** 0.5
        self.z = self.z - rate * gradient / (self.v.sqrt() + EPS) - rate * DECAY * y
        self.total += rate**2
        share = rate**2 / self.total
        self.x = (1 - share) * self.x + share * self.z


@pytest.mark.parametrize("moved", [False, True])
def test_it_is_its_paper(moved: bool) -> None:
    """Also where somebody moves the parameters between two steps: all three sequences go along. A step rounds each some ten
    times, of values up to 2; by lr times g / sqrt(v), of which neither is far from the other, errors hardly grow."""
    p = problem(1)
    model, paper = Quadratic(p.start, p.a[0], p.c[0], CUT), Paper(p.start)
    optimizer = ScheduleFreeAdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    a, c = p.a[0].double(), p.c[0].double()
    for t in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = lr_of(t)
        sgd_step(model, optimizer)
        paper.step(a * (paper.y - c))
        if moved and t % 4 == 0:
            d = 0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(t))
            model.set_flat(model.flat() + d)
            paper.x, paper.z = paper.x + d.double(), paper.z + d.double()
        y = model.flat()
        assert float((y.double() - paper.y).abs().max()) <= 40 * U * 2 * t
        with at_averages([optimizer]):
            assert float((model.flat().double() - paper.x).abs().max()) <= 40 * U * 2 * t
        assert torch.equal(model.flat(), y)
    assert float((paper.x - paper.y).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "axes", [{"recipe": "dpsgd"}, {"recipe": "diloco", "every": 4}, {"recipe": "diloco", "every": 4, "delay": 2}]
)
def test_looking_and_a_resume_change_no_bit(axes: dict[str, object]) -> None:
    p, n = problem(2), 2

    def run(connection: Connection, look: bool, again: bool) -> Tensor:
        model = Quadratic(p.start, p.a[connection.node], p.c[connection.node], CUT)
        optimizer = ScheduleFreeAdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        with dtrain.join(model, optimizer, link=connection, **axes) as sync:  # pyright: ignore[reportArgumentType]
            for t in range(13):
                sgd_step(model, optimizer)
                if look and t % 3 == 0:
                    with at_averages([optimizer]), sync.merged():
                        pass
                if again and t == 8:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return model.flat()

    plain, looked, resumed = (run_islands(n, lambda c, k=k: run(c, k == 1, k == 2)) for k in range(3))
    for one, two, three in zip(plain, looked, resumed, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_the_parameters_that_rounds_set_are_where_training_goes_on() -> None:
    """Of identical islands a round in time moves nothing that outer SGD with lr 1 is asked to: they train as one alone."""
    p = problem(1)

    def island(connection: Connection) -> Tensor:
        model = Quadratic(p.start, p.a[0], p.c[0], CUT)
        optimizer = ScheduleFreeAdamW(model.parameters(), lr=LR)
        with dtrain.join(model, optimizer, recipe="local_sgd", every=2, link=connection):
            for _ in range(8):
                sgd_step(model, optimizer)
        return model.flat()

    alone, (one, two) = run_islands(1, island)[0], run_islands(2, island)
    assert torch.equal(one, two)
    assert torch.equal(one, alone)


def test_a_copy_steps_on() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = ScheduleFreeAdamW([p], lr=LR)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer = copy.deepcopy(optimizer)
        (p,) = optimizer.param_groups[0]["params"]
    assert float(p.detach().max()) < 1.0


def test_bad_settings_and_a_step_on_the_average_are_one_line() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    for bad, said in (({"lr": -1.0}, "lr = -1.0 is not allowed"), ({"lr": 0.1, "betas": (0.0, 0.9)}, "the first above 0")):
        with pytest.raises(ValueError, match=said):
            ScheduleFreeAdamW([x], **bad)  # pyright: ignore[reportArgumentType]
    optimizer = ScheduleFreeAdamW([x], lr=0.1)
    x.grad = torch.ones(3)
    optimizer.step()
    with at_averages([optimizer]), pytest.raises(ValueError, match="between eval"):
        optimizer.step()
    optimizer.step()


@pytest.fixture
def texts(tmp_path: Path) -> Iterator[Path]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a run sets
    yield write_texts(tmp_path / "texts")
    torch.set_num_threads(num_threads)


def test_a_job_evaluates_and_merges_the_averages_and_goes_on_to_the_bit(texts: Path, tmp_path: Path) -> None:
    sync = ("train.optimizer=schedule_free", 'sync.recipe="delayed_diloco"', "sync.every=2", "sync.delay=1")
    job = job_of(texts, *sync, "train.checkpoint_every=3", "train.eval_every=3", "train.eval_merged=true")
    run, corpus = train(job, tmp_path / "run"), load_corpus(str(texts))
    assert [line["lr"] for line in lines_of(run, 0)] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01, 0.01, 0.01])
    model = build_model(job, corpus)
    for island in range(2):
        own = weights_of(run, island)
        model.load_state_dict(own)
        assert part_of(run, island).eval_loss_island == evaluate(model, heldout_sequences(corpus, 16))
        trained = checkpoint.load_island(run, 6, island, lambda key: key.startswith("model."))
        assert not same(own, {key.removeprefix("model."): value for key, value in trained.items()}), "training goes on elsewhere"
    checkpoint.merge_for_resume(run, 6, 2)  # for islands of another number: the average of what is evaluated, not of y
    owns = [weights_of(run, island) for island in range(2)]
    assert not same(*owns)
    assert same(load_file(run / "init.safetensors"), {k: ((owns[0][k].double() + owns[1][k]) / 2).float() for k in owns[0]})
    model.load_state_dict(load_file(run / "model.safetensors"))
    assert part_of(run, 0).eval_loss == evaluate(model, heldout_sequences(corpus, 16))
    again = tmp_path / "again"
    shutil.copytree(checkpoint.step_folder(run, 3), checkpoint.step_folder(again, 3))
    train(job, again, resume_step=3)
    for island in range(2):
        assert same(weights_of(again, island), weights_of(run, island))
        assert part_of(again, island).eval_loss == part_of(run, island).eval_loss


@pytest.mark.parametrize(
    ("recipe", "more", "said"),
    [
        ("accum_adam", {}, 'train.optimizer = "schedule_free" takes AdamW from sync.recipe = "accum_adam"'),
        ("desloc", {}, 'train.optimizer = "schedule_free" takes AdamW from sync.recipe = "desloc"'),
        ("muloco", {}, 'train.optimizer = "schedule_free" takes Muon from sync.recipe = "muloco"'),
        ("demo", {}, 'train.optimizer = "schedule_free" takes SGD from sync.recipe = "demo"'),
        ("dpsgd", {"moments_every": 2}, 'train.moments_every = 2 is AdamW\'s, and train.optimizer = "schedule_free" trains with'),
    ],
)
def test_a_recipe_that_is_defined_with_another_refuses_it(recipe: str, more: dict[str, object], said: str) -> None:
    job = parse_job({"sync": {"recipe": recipe}, "train": {"optimizer": "schedule_free", **more}})
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        resolved(job)
    assert str(caught.value).startswith(said)

"""What is seen on the way of a run: is it what it says, and does looking leave the run alone?"""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dtrain
from dtrain import checkpoint
from dtrain.build import build_model
from dtrain.clock import Clock
from dtrain.connect import Connection
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.engine import Sync
from dtrain.evaluate import evaluate
from dtrain.looks import look
from dtrain.transport.throttle import Throttle
from tests.islands import Quadratic, run_islands, sgd_step
from tests.unit.by_hand import job_of, lines_of, part_of, same, train, weights_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("sync", ['sync.recipe="local"', 'sync.recipe="delayed_diloco" sync.every=2 sync.delay=2'])
def test_a_merge_is_looked_at_on_the_way_and_changes_nothing(texts: Path, tmp_path: Path, sync: str) -> None:
    """At step 3 the weights of each island's checkpoint, averaged by hand, have the loss that all islands write down."""
    job = job_of(texts, "islands.count=3", "train.eval_every=3", "train.checkpoint_every=3", *sync.split())
    looking = job_of(
        texts, "islands.count=3", "train.eval_every=3", "train.checkpoint_every=3", "train.eval_merged=true", *sync.split()
    )
    plain, run = train(job, tmp_path / "plain"), train(looking, tmp_path / "run")
    kept = [checkpoint.load_island(run, 3, island) for island in range(3)]
    names = [name for name in kept[0] if name.startswith("model.")]
    model, corpus = build_model(job, load_corpus(str(texts))), load_corpus(str(texts))
    mean = {name: torch.stack([each[name].double() for each in kept]).mean(dim=0).float() for name in names}
    model.load_state_dict({name.removeprefix("model."): value for name, value in mean.items()})
    expected = evaluate(model, heldout_sequences(corpus, 16))
    for island in range(3):
        looks = {line["step"]: line["eval_loss_merged"] for line in lines_of(run, island) if "eval_loss_merged" in line}
        assert list(looks) == [3], "the end's is in the summary"
        assert looks[3] == lines_of(run, 0)[2]["eval_loss_merged"] == pytest.approx(expected, rel=1e-6)
        assert looks[3] != lines_of(run, island)[2]["eval_loss"]
        assert same(weights_of(run, island), weights_of(plain, island))
        one, other = part_of(run, island), part_of(plain, island)
        assert one.eval_loss == other.eval_loss
        assert (one.wire_bytes_sent, one.wire_bytes_merge) == (other.wire_bytes_sent, other.wire_bytes_merge)
        assert one.wire_bytes_consensus == one.wire_bytes_merge
        assert other.wire_bytes_consensus == 0


def test_a_run_that_goes_on_looks_again_and_is_the_same(texts: Path, tmp_path: Path) -> None:
    sync = ('sync.recipe="delayed_diloco"', "sync.every=2", "sync.delay=2")
    often = ("train.eval_every=2", "train.eval_merged=true", "train.checkpoint_every=3", *sync)
    whole, run = train(job_of(texts, *often), tmp_path / "whole"), tmp_path / "run"
    shutil.copytree(whole / "checkpoints", run / "checkpoints")
    train(job_of(texts, *often), run, resume_step=3)
    for island in range(2):
        assert same(weights_of(run, island), weights_of(whole, island))
        again, at_first = ([line.get("eval_loss_merged") for line in lines_of(of, island)[-3:]] for of in (run, whole))
        assert again == at_first == [at_first[0], None, None]
        assert again[0] is not None


WIRE_S = 0.05


def looked_at(see: Callable[[Sync, torch.optim.Optimizer, Clock], None]) -> list[tuple[float, float, float, float]]:
    """Of two islands that look while a round flies: train_s when they began to look, and after; what was put aside; the wait_s
    that is counted. Nobody has the round's bytes before WIRE_S has passed, as it is launched after the clocks began."""
    both = threading.Barrier(2)

    def island(connection: Connection) -> tuple[float, float, float, float]:
        link = dataclasses.replace(connection, transport=Throttle(connection.transport, uplink=None, rtt_s=2 * WIRE_S))
        model = Quadratic(torch.zeros(4), torch.ones(4), torch.ones(4), 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with dtrain.join(model, optimizer, recipe="fedavg", every=2, delay=2, link=link) as sync:
            sgd_step(model, optimizer)
            before_s, now = sync.stats().wait_s, time.monotonic()
            clock = Clock(0.0, now, 0.0, 0.0, now)
            both.wait(60)
            sgd_step(model, optimizer)
            begun_s = clock.train_s()
            see(sync, optimizer, clock)
            return begun_s, clock.train_s(), clock.aside_s, sync.stats().wait_s - before_s

    return run_islands(2, island)


@pytest.mark.parametrize("what", ["train.consensus_every=2", "train.eval_every=2 train.eval_merged=true"])
def test_waiting_for_what_flies_is_trainings_and_only_the_look_is_put_aside(texts: Path, what: str) -> None:
    """And no wait is counted that lies on no clock: of an average that only a look has made."""
    job = job_of(texts, *what.split())
    inside: Any = SimpleNamespace(evaluate=lambda: 0.0)

    def see(sync: Sync, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
        seen = look(job, sync, inside, [optimizer], clock, 2, lambda state, step: None)
        assert seen.consensus_distance == 0.0 or seen.eval_loss_merged == 0.0

    for begun_s, train_s, aside_s, wait_s in looked_at(see):
        assert train_s >= WIRE_S
        assert WIRE_S - begun_s <= wait_s <= train_s
        assert aside_s > 0.0


def consensus(sync: Sync, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    sync.consensus_distance()


def merged(sync: Sync, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    with sync.merged():
        pass


@pytest.mark.parametrize("see", [consensus, merged])
def test_one_who_looks_from_a_loop_of_ones_own_counts_that_waiting_too(see: Callable[..., None]) -> None:
    for begun_s, _, _, wait_s in looked_at(see):
        assert wait_s >= WIRE_S - begun_s

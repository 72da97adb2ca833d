"""Does each key of a job do to its run what it says? Beside a plain loop of one island, written here, bit for bit.

Islands of the recipe ``local`` never talk, so each must be the loop's exact equal: the same losses, the same weights.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_post_hook

from dtrain import checkpoint, metrics
from dtrain.build import build_model
from dtrain.config import dump_job
from dtrain.data.corpus import load_corpus
from dtrain.data.sampler import heldout_sequences
from dtrain.evaluate import evaluate
from dtrain.launch.cli import run_command
from dtrain.models.gpt import GPT, GPTConfig
from dtrain.topology.one_peer import random_pairs
from dtrain.wire import HEADER_BYTES
from tests.unit.by_hand import (
    DIGEST_BYTES,
    NOTE_BYTES,
    PROMISE_BYTES,
    by_hand,
    first_loss,
    flat,
    job_of,
    lines_of,
    micro_batch,
    part_of,
    same,
    train,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

U = 2.0**-24  # half the distance of 1 to the next fp32 number: the relative error of one rounding
PARAMETERS = 2 * 256 * 16 + 1 * 12 * 16**2  # embedding and head; and in a layer q, k, v, out and the two of the MLP


@pytest.mark.parametrize(
    "change",
    [
        "train.accumulate=2",
        "train.accumulate=4",
        "train.sam_rho=0.05",
        "train.sam_rho=0.05 train.accumulate=2",
        "train.optimizer=muon",
        "train.optimizer=muon train.sam_rho=0.05",
        'train.precision="bf16"',
        "train.clip=0.05",
        "train.clip=0",
        "train.weight_decay=2",
        "train.warmup=0",
        "train.lr=0.02",
        "train.batch=8",
        "train.steps=7",
        "job.seed=5",
        'islands.shard="by_file"',
        'islands.start="own"',
        "model.layers=2",
        "model.heads=4",
        "model.context=12",
    ],
)
def test_a_key_makes_the_run_another_and_the_right_one(texts: Path, tmp_path: Path, change: str) -> None:
    job, corpus = job_of(texts, *change.split()), load_corpus(str(texts))
    run = train(job, tmp_path / "run")
    for island in range(2):
        expected, without = by_hand(job, corpus, island), by_hand(job_of(texts), corpus, island)
        assert [line["loss"] for line in lines_of(run, island)] == expected.losses
        assert same(weights_of(run, island), expected.weights)
        assert not same(without.weights, expected.weights), "the key had nothing to change"


def test_muloco_trains_with_muon_without_another_key(texts: Path, tmp_path: Path) -> None:
    """Nine steps before its first round, and six in all."""
    run = train(job_of(texts, "sync.recipe=muloco", "sync.every=9"), tmp_path / "run")
    for island in range(2):
        expected = by_hand(job_of(texts, "train.optimizer=muon"), load_corpus(str(texts)), island)
        assert [line["loss"] for line in lines_of(run, island)] == expected.losses
        assert same(weights_of(run, island), expected.weights)


def test_muloco_goes_on_from_a_checkpoint_between_two_rounds_to_the_bit(texts: Path, tmp_path: Path) -> None:
    """Rounds after steps 2, 4 and 6; with the moments of both optimizers, which one would miss in a step."""
    job = job_of(texts, "sync.recipe=muloco", "sync.every=2", "train.checkpoint_every=3")
    whole, again = train(job, tmp_path / "whole"), tmp_path / "again"
    shutil.copytree(checkpoint.step_folder(whole, 3), checkpoint.step_folder(again, 3))
    names = {key.partition(".")[0]: key for key in checkpoint.load_island(again, 3, 0) if key.endswith(("exp_avg", "_buffer"))}
    assert {name: key.rpartition(".")[2] for name, key in names.items()} == {"optim": "momentum_buffer", "optim1": "exp_avg"}
    train(job, again, resume_step=3)
    for island in range(2):
        assert lines_of(again, island)[-1]["loss"] == lines_of(whole, island)[-1]["loss"]
        assert same(weights_of(again, island), weights_of(whole, island))


def test_heads_of_their_own_are_in_no_merge_and_each_island_is_evaluated_with_its_own(texts: Path, tmp_path: Path) -> None:
    changes = ("sync.recipe=fedavg", "sync.every=4", 'sync.exclude=["head.*"]')
    job, corpus = job_of(texts, *changes), load_corpus(str(texts))
    run = train(job, tmp_path / "run")
    own, merged = [weights_of(run, island) for island in range(2)], load_file(run / "model.safetensors")
    assert torch.equal(merged["head.weight"], own[0]["head.weight"])
    assert not torch.equal(own[0]["head.weight"], own[1]["head.weight"])
    for name in set(merged) - {"head.weight"}:
        assert torch.equal(merged[name], (own[0][name] / 2 + own[1][name] / 2)), "halves are exact"
        assert not torch.equal(own[0][name], own[1][name])
    for island in range(2):
        model = build_model(job, corpus)
        model.load_state_dict(merged | {"head.weight": own[island]["head.weight"]})
        assert part_of(run, island).eval_loss == evaluate(model, heldout_sequences(corpus, 16))
        told = part_of(run, island).wire_bytes_merge - NOTE_BYTES
        assert told == 4 * (PARAMETERS - 256 * 16) + 2 * HEADER_BYTES, "half of them to the other, and the other half back"


def test_a_run_is_its_seed_whatever_its_name(texts: Path, tmp_path: Path) -> None:
    one, other = train(job_of(texts), tmp_path / "one"), train(job_of(texts, 'job.name="other"'), tmp_path / "other")
    for island in range(2):
        assert same(weights_of(one, island), weights_of(other, island))
    assert not same(weights_of(one, 0), weights_of(one, 1))


def test_the_model_is_the_jobs_and_starts_from_its_seed(texts: Path) -> None:
    changes = ("model.layers=2", "model.width=24", "model.heads=3", "model.context=12")
    model = build_model(job_of(texts, "job.seed=5", *changes), load_corpus(str(texts)))
    assert isinstance(model, GPT)
    assert model.config == GPTConfig(vocab=256, layers=2, width=24, heads=3, context=12)
    expected = GPT(model.config)
    assert not same(expected.state_dict(), model.state_dict())
    expected.init_weights(5)
    assert same(expected.state_dict(), model.state_dict())


def test_the_seed_draws_the_pairs(texts: Path, tmp_path: Path) -> None:
    """After a step of D-PSGD each island holds the mean of its own update and of its partner's."""
    pairs = {seed: [random_pairs(seed)(0, island, 4).recvs[0][0] for island in range(4)] for seed in range(9)}
    seed = next(seed for seed in pairs if pairs[seed] != pairs[0])
    gossip = ('sync.recipe="dpsgd"', 'sync.topology="random_pairs"', "sync.delay=0")
    job = job_of(texts, f"job.seed={seed}", "islands.count=4", "train.steps=1", *gossip)
    run = train(job, tmp_path / "run")
    alone = [flat(by_hand(job, load_corpus(str(texts)), island).weights) for island in range(4)]
    for island, partner in enumerate(pairs[seed]):
        expected = (alone[island] + alone[partner]) / 2
        # weights are below 8, of which three roundings are 3 * 8 * 2^-24
        torch.testing.assert_close(flat(weights_of(run, island)), expected, rtol=0, atol=24 * U)
        assert (alone[island] - alone[partner]).abs().max() > 1e-3


def test_accumulation_is_the_mean_of_its_micro_batches(texts: Path, tmp_path: Path) -> None:
    job, corpus = job_of(texts, "train.accumulate=2", "train.steps=1"), load_corpus(str(texts))
    run = train(job, tmp_path / "run")
    plain = train(job_of(texts, "train.steps=1"), tmp_path / "plain")
    for island in range(2):
        first, second = (first_loss(job, corpus, island, micro) for micro in (0, 1))
        assert first != second
        assert lines_of(run, island)[0]["loss"] == (first + second) / 2
        assert not torch.equal(flat(weights_of(run, island)), flat(weights_of(plain, island)))


def test_by_file_an_island_reads_its_own_files_only(texts: Path, tmp_path: Path) -> None:
    """A folder that holds one island's files and no others gives the same batches, drawn from all of it."""
    job = job_of(texts, 'islands.shard="by_file"', "train.steps=1")
    run = train(job, tmp_path / "run")
    for island in range(2):
        own = tmp_path / f"own{island}"
        own.mkdir()
        for k in (*range(island, 8, 2), 8):  # file 8 is what both hold out
            (own / f"{k}.txt").write_bytes((texts / f"{k}.txt").read_bytes())
        assert load_corpus(str(own)).num_files == 4
        expected = first_loss(job_of(own), load_corpus(str(own)), island)
        assert lines_of(run, island)[0]["loss"] == expected
        assert expected != first_loss(job_of(texts), load_corpus(str(texts)), island)


def test_bf16_is_autocast_over_weights_that_stay_fp32(texts: Path, tmp_path: Path) -> None:
    changes = ("train.steps=2", "train.checkpoint_every=1", "islands.count=1")
    run = train(job_of(texts, *changes, 'train.precision="bf16"'), tmp_path / "bf16")
    fp32 = train(job_of(texts, *changes), tmp_path / "fp32")
    job, corpus = job_of(texts, *changes), load_corpus(str(texts))
    inputs, targets = micro_batch(job, corpus, 0, 0, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = cross_entropy(build_model(job, corpus)(inputs).flatten(0, 1), targets.flatten()).item()
    first, exact = (lines_of(folder, 0)[0]["loss"] for folder in (run, fp32))
    assert first == expected
    assert 0 < abs(first - exact) < 0.05, "bf16 rounds by up to 2^-9, and the logarithm of 256 letters is 5.5"
    saved = checkpoint.load_island(run, 2, 0)
    kept = {name: value for name, value in saved.items() if name.startswith("model.") or name.endswith(("exp_avg", "exp_avg_sq"))}
    files = [weights_of(run, 0), load_file(run / "model.safetensors"), kept]
    assert len(kept) == 3 * len(files[0])
    assert {value.dtype for file in files for value in file.values()} == {torch.float32}
    # Weights that were rounded to bf16 anywhere on the way would end in 16 zero bits.
    assert (flat(files[0]).view(torch.int32) & 0xFFFF != 0).double().mean() > 0.9


def test_the_optimizer_sees_gradients_of_the_clipped_norm(texts: Path, tmp_path: Path) -> None:
    corpus, seen = load_corpus(str(texts)), list[float]()

    def watch(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gradients = [p.grad.double() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(math.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))

    clip = sorted(by_hand(job_of(texts, "train.clip=0"), corpus, 0).norms)[2]
    job = job_of(texts, f"train.clip={clip}", "islands.count=1")
    handle = register_optimizer_step_post_hook(watch)  # an update leaves its gradients as it found them
    try:
        train(job, tmp_path / "run")
    finally:
        handle.remove()
    norms = by_hand(job, corpus, 0).norms
    assert min(norms) < clip < max(norms), "some steps are clipped, some are not"
    # torch divides by norm + 1e-6; 11 thousand elements in fp32
    assert seen == pytest.approx([min(norm, clip) for norm in norms], rel=1e-4)


@pytest.mark.parametrize(("steps", "warmup"), [(9, 3), (6, 0), (3, 5)])
def test_the_learning_rate_is_a_line_and_then_half_a_cosine(texts: Path, tmp_path: Path, steps: int, warmup: int) -> None:
    run = train(job_of(texts, f"train.steps={steps}", f"train.warmup={warmup}", "train.lr=0.04"), tmp_path / "run")
    expected = [
        0.04 * (k + 1) / (warmup + 1)
        if k < warmup
        else 0.004 + 0.018 * (1 + math.cos(math.pi * (k - warmup) / (steps - 1 - warmup)))
        for k in range(steps)
    ]
    for island in range(2):
        lines = lines_of(run, island)
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert [line["lr"] for line in lines] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("every", "expected"), [(0, set[int]()), (1, {1, 2, 3, 4, 5}), (2, {2, 4}), (4, {4}), (6, set[int]())])
def test_evaluations_come_when_due_and_are_the_loops(texts: Path, tmp_path: Path, every: int, expected: set[int]) -> None:
    """The last step has none of its own: the summary holds what came out at the end."""
    job = job_of(texts, "islands.count=1", f"train.eval_every={every}")
    run = train(job, tmp_path / "run")
    evals = by_hand(job, load_corpus(str(texts)), 0, evaluated=True).evals
    assert len(set(evals)) == 6
    measured = {line["step"]: line["eval_loss"] for line in lines_of(run, 0) if "eval_loss" in line}
    assert measured == {step: evals[step - 1] for step in expected}
    assert part_of(run, 0).eval_loss_island == evals[-1]
    assert part_of(run, 0).eval_loss == evals[-1], "the mean of one island is the island"
    assert part_of(run, 0).eval_tokens == 512 * 16


@pytest.mark.parametrize("num_islands", [2, 3])
def test_consensus_distance_is_how_far_the_islands_are_from_their_mean(texts: Path, tmp_path: Path, num_islands: int) -> None:
    job = job_of(texts, f"islands.count={num_islands}", "train.consensus_every=3")
    run = train(job, tmp_path / "run")
    x = torch.stack([flat(weights_of(run, island)).double() for island in range(num_islands)])
    expected = (x - x.mean(0)).square().sum(1).mean().sqrt().item()
    # The mean is taken in fp32: N products with a rounded 1 / N and their sum, N + 2 roundings an element, which move the mean,
    # and with it each distance, by no more than this. The squares' mean is one number in fp32, and half of its error remains.
    bound = (num_islands + 2) * U * (x.abs().mean(0).norm().item() + expected)
    assert bound < 1e-3 * expected
    for island in range(num_islands):
        assert [line["step"] for line in lines_of(run, island) if "consensus_distance" in line] == [3, 6]
        last = lines_of(run, island)[-1]["consensus_distance"]
        assert last == pytest.approx(expected, rel=0, abs=bound)
        assert part_of(run, island).consensus_distance == last, "nothing lies between the last step and the merge"
        assert same(weights_of(run, island), by_hand(job, load_corpus(str(texts)), island).weights), "measuring changes nothing"


@pytest.mark.parametrize("num_islands", [2, 3])
def test_islands_that_never_talk_send_what_starting_and_merging_take(texts: Path, tmp_path: Path, num_islands: int) -> None:
    run = train(job_of(texts, f"islands.count={num_islands}"), tmp_path / "run")
    parts = [part_of(run, island) for island in range(num_islands)]
    for island, part in enumerate(parts):
        assert (part.wire_bytes_sent, part.wire_bytes_received) == (0, 0)
        assert {(line["wire_bytes_sent"], line["wire_bytes_received"]) for line in lines_of(run, island)} == {(0, 0)}
        assert part.wire_bytes_start == (PROMISE_BYTES + DIGEST_BYTES) * (num_islands - 1), "to each of the others"
        assert part.parameters == PARAMETERS
    # Every element goes to its owner from all others, and its mean back to them; each island tells all others its note.
    total = 2 * (num_islands - 1) * (4 * PARAMETERS + num_islands * HEADER_BYTES) + num_islands * (num_islands - 1) * NOTE_BYTES
    assert sum(part.wire_bytes_merge for part in parts) == total
    if num_islands == 2:
        assert [part.wire_bytes_merge for part in parts] == [total // 2] * 2, "what one island does not own, the other does"


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (2, [4, 6]), (3, [2, 4, 6]), (9, [2, 4, 6])])
def test_the_newest_checkpoints_are_kept(texts: Path, tmp_path: Path, keep: int, kept: list[int]) -> None:
    run = train(job_of(texts, "train.checkpoint_every=2", f"train.keep={keep}"), tmp_path / "run")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{step:08d}" for step in kept]
    assert all((checkpoint.step_folder(run, step) / "COMMIT").exists() for step in kept)
    for island in range(2):
        saved = checkpoint.load_island(run, 6, island)
        own = {name.removeprefix("model."): value for name, value in saved.items() if name.startswith("model.")}
        assert same(own, weights_of(run, island))


@pytest.mark.parametrize(("every", "written"), [(0, set[int]()), (4, {4, 6}), (9, {6})])
def test_a_checkpoint_is_written_each_so_many_steps_and_at_the_end(
    texts: Path, tmp_path: Path, every: int, written: set[int]
) -> None:
    run = train(job_of(texts, f"train.checkpoint_every={every}", "train.keep=9"), tmp_path / "run")
    assert {int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/*/COMMIT")} == written


def test_a_finished_run_holds_all_that_is_promised(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sync = ('sync.recipe="fedavg"', "sync.every=2", 'sync.codec="bf16"')
    often = ("train.steps=7", "train.checkpoint_every=3", "train.consensus_every=3", "sim.step_s=0.05", "link.rate=1mbit")
    job = job_of(texts, f'job.dir="{tmp_path / "runs"}"', *sync, *often)
    (tmp_path / "job.toml").write_text(dump_job(job), encoding="utf-8")
    assert run_command(["sim", str(tmp_path / "job.toml")]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "run"
    for name in ("job.toml", "metrics.jsonl", "summary.json", "loss.png", "model.safetensors", "checkpoints", "virtual.json"):
        assert (run / name).exists(), name
    virtual = json.loads((run / "virtual.json").read_text())
    for island, account in enumerate(virtual["accounts"]):
        part = json.loads((run / "logs" / f"island{island}" / "part.json").read_text())
        assert account["wire_bytes_sent"] == part["wire_bytes_sent"] > 0
        assert account["wire_bytes_received"] == part["wire_bytes_received"]
        # Fedavg waits for each round: two phases, in which an island sends what it hears, and the link takes no other time.
        assert account["waited_s"] == pytest.approx(account["wire_bytes_sent"] * 8 / 1e6)
        assert account["compute_s"] == pytest.approx(7 * 0.05)
    lines = metrics.read(run / "metrics.jsonl")
    assert sorted((line["step"], line["island"]) for line in lines) == [(step, i) for step in range(1, 8) for i in range(2)]
    for line in lines:
        assert {"step", "island", "loss", "tokens", "tokens_per_s", "wire_bytes_sent", "wait_s", "lr"} <= set(line)
        assert ("consensus_distance" in line) == (line["step"] in (3, 6))
        assert line["tokens"] == 4 * 16
        assert line["tokens_per_s"] > 0
        rounds = line["step"] // 2
        assert line["wire_bytes_sent"] == line["wire_bytes_received"] == rounds * (2 * PARAMETERS + 2 * HEADER_BYTES)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    sent, ring = 3 * (2 * PARAMETERS + 2 * HEADER_BYTES), 7 * 4 * PARAMETERS  # 3 rounds of 2 bytes an element; 7 all-reduces of 4
    corpus = load_corpus(str(texts))
    known = {
        "recipe": "fedavg",
        "islands": 2,
        "ranks": 1,
        "parameters": PARAMETERS,
        "steps": 7,
        "tokens": 2 * 7 * 4 * 16,
        "wire_bytes_sent": sent,
        "wire_bytes_start": PROMISE_BYTES + DIGEST_BYTES,
        "wire_bytes_merge": 4 * PARAMETERS + 2 * HEADER_BYTES + NOTE_BYTES,
        "wire_bytes_consensus": 2 * (4 * PARAMETERS + 2 * HEADER_BYTES + NOTE_BYTES),  # measured twice on the way
        "allreduce_wire_bytes": ring,
        "wire_reduction": ring / sent,
        "corpus_hash": corpus.hash,
    }
    assert {name: summary[name] for name in known} == known
    assert summary["wall_s"] > summary["compute_s"] > 0
    for part in (part_of(run, island) for island in range(2)):
        assert part.compute_s + part.wait_s == pytest.approx(part.train_s, rel=1e-9)
        assert part.wall_s > part.train_s
        assert part.wait_s > 0
    model = build_model(job, corpus)
    losses = []
    for file in (run / "model.safetensors", *(run / "islands" / f"island{i}.safetensors" for i in range(2))):
        model.load_state_dict(load_file(file))
        losses.append(evaluate(model, heldout_sequences(corpus, 16)))
    assert len(set(losses)) == 3, "a step after the last round the islands are apart"
    assert summary["eval_loss"] == losses[0]
    assert summary["eval_bits_per_byte"] == pytest.approx(losses[0] / math.log(2), rel=1e-12)
    assert summary["eval_bits_per_byte_islands"] == pytest.approx([loss / math.log(2) for loss in losses[1:]], rel=1e-12)

"""Are data sets and tokenizers of Hugging Face read as they are, and does a stream's batch follow from island and step alone?

All files are made here; no hub is asked."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dtrain import checkpoint
from dtrain.config import load_job
from dtrain.data.corpus import load_corpus
from dtrain.data.hf_rows import Named, parse
from dtrain.data.sampler import inputs_and_targets
from dtrain.data.stream import Dealt, Stream
from dtrain.data.tokens import ByteTokens, load_tokenizer
from dtrain.launch.checks import with_absolute_paths
from dtrain.launch.cli import run_command
from dtrain.report import compare_rows, load_run
from tests.unit.by_hand import job_of, same, train, weights_of
from tests.unit.small_run import refused

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [f"row {k}: " + "na\u00efve caf\u00e9 words " * (1 + k % 5) for k in range(130)]
HELD = [ROWS[49], ROWS[99]]
SMALL = ("model.layers=1", "model.width=16", "model.heads=2", "model.context=8", "train.steps=2", "islands.threads=1")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def text_of(rows: Sequence[str]) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


def write_rows(kind: str, rows: Sequence[str] = ROWS) -> str:
    table = datasets.Dataset.from_dict({"number": list(range(len(rows))), "words": list(rows)})
    if kind == "parquet":
        table.to_parquet("rows.parquet")
    else:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_list()))
    return f"hf:rows.{kind}:train:words"


def write_tokenizer(folder: Path = Path("tokens")) -> Tokenizer:
    """Byte-level BPE of 300 words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(ROWS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return made


def decoded(tokenizer: Tokenizer, tokens: NDArray[Any]) -> str:
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_data_set_is_its_rows_each_a_file_and_each_fiftieth_held_out(kind: str) -> None:
    corpus = load_corpus(write_rows(kind))
    trained = [row for k, row in enumerate(ROWS) if k % 50 != 49]
    assert corpus.train.tobytes() == text_of(trained)
    assert corpus.heldout.tobytes() == text_of(HELD)
    assert corpus.num_files == len(trained)
    assert (corpus.vocab, corpus.bytes_per_token) == (256, 1.0)


def test_a_text_file_is_lines_and_a_split_some_of_them() -> None:
    Path("lines.txt").write_text("".join(f"line {k}\n\n" for k in range(60)))
    assert load_corpus("hf:lines.txt").heldout.tobytes() == b"line 49\n"
    assert load_corpus("hf:lines.txt:train[:20]").heldout.tobytes() == b"line 9\n", "of ten lines, and ten empty ones, the last"


def test_what_stands_behind_hf() -> None:
    assert parse("hf:a/b") == Named("a/b", "train", "text")
    assert parse("hf:a/b:test[:10%]:words") == Named("a/b", "test[:10%]", "words")
    assert parse(Named("a", "s", "c").source) == Named("a", "s", "c")
    for wrong in ("hf:", "hf:a::b", "hf:a:b:c:d"):
        with pytest.raises(ValueError, match="names no data set; write"):
            parse(wrong)


@pytest.mark.parametrize("kind", ["folder", "file", "rows"])
def test_a_tokenizers_tokens_are_the_texts_and_bits_a_byte_count_its_bytes(kind: str) -> None:
    made = write_tokenizer()
    source = write_rows("jsonl") if kind == "rows" else "text"
    if kind == "file":
        source = "text.txt"
        Path(source).write_text("".join(ROWS))
    elif kind == "folder":
        Path("text").mkdir()
        for k, row in enumerate(ROWS[:5]):
            Path("text", f"{k}.txt").write_text(row)
    plain, corpus = load_corpus(source), load_corpus(source, "tokens")
    assert (corpus.num_words, corpus.vocab) == (made.get_vocab_size(), 320)
    assert corpus.train.dtype == np.uint16
    text, held = decoded(made, corpus.train), decoded(made, corpus.heldout)
    assert "\ufffd" not in text + held, "no character was cut in two"
    assert len(text.encode()) + len(held.encode()) == len(plain.train) + len(plain.heldout)
    if kind != "file":  # whose blocks end at characters
        assert (text.encode(), held.encode()) == (plain.train.tobytes(), plain.heldout.tobytes())
    assert len(corpus.heldout) < 0.6 * len(held.encode())
    assert corpus.bytes_per_token == len(held.encode()) / len(corpus.heldout)
    assert corpus.num_files == plain.num_files
    assert corpus.hash != plain.hash


def test_a_token_file_has_bits_a_byte_with_its_tokenizer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    made = write_tokenizer()
    tokens = np.array(made.encode("".join(ROWS)).ids, dtype="<u2")
    tokens.tofile("text.bin")
    corpus, bare = load_corpus("text.bin", "tokens/tokenizer.json"), load_corpus("text.bin")
    assert bare.bytes_per_token is None
    assert (corpus.num_words, corpus.vocab) == (made.get_vocab_size(), 320)
    held = tokens[-(len(tokens) // 50) :]
    assert corpus.bytes_per_token == len(decoded(made, held).encode()) / len(held)
    for name, changes in (("bare", ()), ("known", ("data.tokenizer=tokens",))):
        Path("job.toml").write_text(f'[job]\nname = "{name}"\n[data]\nsource = "text.bin"\n')
        assert run_command(["sim", "job.toml", *SMALL, *changes]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        summary = json.loads(Path("runs", name, "summary.json").read_text())
        bits = summary["eval_bits_per_byte"]
        assert run_command(["eval", f"runs/{name}"]) == 0
        (merged,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("merged")]
        if name == "bare":
            assert bits is None
            assert "data.tokenizer" in out
            _, rows = compare_rows([load_run(Path("runs/bare"))])
            shown = {row[0]: row[1] for row in rows}
            assert [shown[name] for name in ("bits per byte", "above the best", "each island alone")] == ["-", "-", "-"]
            assert merged[2] == "-"
        else:
            assert bits == pytest.approx(summary["eval_loss"] / math.log(2) / corpus.bytes_per_token, rel=1e-12)
            assert float(merged[2]) == pytest.approx(bits, abs=1e-4)
    (tokens + 300).astype("<u2").tofile("other.bin")
    with pytest.raises(ValueError, match=r"and data\.tokenizer knows 300; name the one that made the file"):
        load_corpus("other.bin", "tokens")


def test_what_is_no_utf8_is_replaced_and_its_bytes_still_count() -> None:
    made = write_tokenizer()
    Path("text").mkdir()
    for k in range(2):
        Path("text", f"{k}.txt").write_bytes(b"caf\xe9 " * 40)
    corpus = load_corpus("text", "tokens")
    assert decoded(made, corpus.heldout) == "caf\ufffd " * 40
    assert corpus.bytes_per_token == 200 / len(corpus.heldout)


def own_tokens(island: int, num_islands: int) -> bytes:
    """What an island of a stream is dealt, three times over."""
    trained = [row for k, row in enumerate(ROWS) if k % 50 != 49]
    return text_of(trained[island::num_islands]) * 3


@pytest.mark.parametrize("island", [0, 1, 2])
def test_a_steps_batch_is_the_islands_text_where_its_number_says(island: int) -> None:
    corpus = load_corpus(write_rows("jsonl"), streaming=True)
    assert corpus.stream is not None
    assert corpus.heldout.tobytes() == text_of(HELD)
    assert corpus.bytes_per_token == 1.0
    text, batch, context = own_tokens(island, 3), 4, 12
    steps = (0, 1, 5, 6, 3, 60, 60, 100)  # on, over some, back, and the same again
    assert len(text) > 101 * batch * context > len(text) / 3, "the text comes again"
    dealt = Dealt(corpus.stream, island, 3)
    for step in steps:
        for first in (step * batch, step * batch + 2, step * batch):
            x, y = inputs_and_targets(dealt.windows(first, 2, context, step_first=step * batch))
            assert (x.dtype, x.shape, y.shape) == (torch.int64, (2, context), (2, context))
            for k in range(2):
                at = (first + k) * context
                assert bytes(x[k].tolist()) == text[at : at + context]
                assert bytes(y[k].tolist()) == text[at + 1 : at + context + 1]


def test_what_lies_behind_a_step_is_forgotten() -> None:
    rows = [b"x" * 100] * 60
    dealt = Dealt(Stream("here", lambda: iter(rows), ByteTokens()), 0, 1)
    for step in range(500):
        dealt.windows(step, 1, 64, step_first=step)
        assert sum(map(len, dealt._kept)) <= 64 + 1 + 100


def test_micro_batches_of_a_streams_step_are_its_sequences_once_each(tmp_path: Path) -> None:
    """Their mean loss is the whole batch's, before the first step."""
    source = Path(write_rows("jsonl"))
    jobs = [job_of(source, "data.streaming=true", f"train.accumulate={n}", "train.steps=1") for n in (1, 2)]
    losses = []
    for job in jobs:
        run = tmp_path / f"run{job.train.accumulate}"
        train(job, run)
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert sorted(losses[0]) == pytest.approx(sorted(losses[1]), rel=1e-6)
    assert losses[0][0] != losses[0][1], "islands are dealt other rows"


def test_a_resumed_stream_is_bit_for_bit_as_if_nothing_had_happened(tmp_path: Path) -> None:
    write_tokenizer()
    changes = ("data.streaming=true", "data.tokenizer=tokens", "sync.recipe=diloco", "sync.every=2", "train.checkpoint_every=4")
    job = job_of(Path(write_rows("jsonl")), *changes)
    whole, cut = train(job, tmp_path / "whole"), tmp_path / "cut"
    checkpoint.step_folder(cut, 4).parent.mkdir(parents=True)
    checkpoint.step_folder(whole, 4).rename(checkpoint.step_folder(cut, 4))
    train(job, cut, resume_step=4)
    for island in range(2):
        assert same(weights_of(whole, island), weights_of(cut, island))


def test_a_stream_is_run_from_the_command_line_and_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    source = write_rows("parquet")
    Path("job.toml").write_text(f'[data]\nsource = "{source}"\nstreaming = true\n')
    assert run_command(["sim", "job.toml", *SMALL]) == 0, capsys.readouterr().err
    job = load_job(Path("runs/run/job.toml"))
    assert job.data.source == f"hf:{Path.cwd()}/rows.parquet:train:words"
    assert with_absolute_paths(job) == job
    assert run_command(["eval", "runs/run"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.source=hf:rows.jsonl"], "there is no text in column text; columns of text: words"),
        (["data.source=hf:rows.jsonl:train:number"], "there is no text in column number; columns of text: words"),
        (["data.source=hf:rows.xml"], 'data.source = "hf:rows.xml" cannot be read: rows.xml is none of .json, .jsonl, '),
        (["data.source=hf:bad.jsonl"], 'data.source = "hf:bad.jsonl" cannot be read: '),
        (["data.source=hf:empty"], 'data.source = "hf:empty" cannot be read: '),
        (["data.source=hf:few.txt"], 'data.source = "hf:few.txt" has 1 rows with text; use 2 or more, as one is held out'),
        (["data.source=hf:few.txt", "data.streaming=true"], "has fewer than 50 rows, of which none is held out; leave"),
        (["data.source=few.txt", "data.streaming=true"], 'data.streaming = true needs a data.source of "hf:", and has "few.txt"'),
        (["data.source=hf:few.txt", "data.streaming=true", "islands.shard=by_file"], 'islands.shard = "by_file" has no effect'),
        (["data.source=few.txt", "data.tokenizer=nowhere"], 'data.tokenizer = "nowhere": there is no file nowhere; use "bytes"'),
        (["data.source=few.txt", "data.tokenizer=few.txt"], 'data.tokenizer = "few.txt" is no tokenizer: '),
        (["data.source=few.txt", "data.tokenizer=empty"], "there is no file empty/tokenizer.json"),
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], changes: list[str], said: str
) -> None:
    write_rows("jsonl")
    Path("rows.xml").write_text("<a/>")
    Path("bad.jsonl").write_text("{not json\n")
    Path("few.txt").write_text("one line\n")
    Path("empty").mkdir()
    Path("job.toml").write_text("[model]\ncontext = 8\n")
    assert said in refused(capsys, "run", "job.toml", *changes)


@pytest.mark.parametrize(
    ("package", "change"), [("datasets", "data.source=hf:rows.jsonl"), ("tokenizers", "data.tokenizer=tokens")]
)
def test_a_missing_package_is_named_with_what_brings_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, change: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    Path("job.toml").write_text("[model]\ncontext = 8\n")
    key, value = change.split("=")
    said = refused(capsys, "run", "job.toml", change)
    assert said == f"{key} = \"{value}\" needs {package}, which is not installed; in a checkout: pip install '.[hf]'"


def test_a_benchmark_of_tokens_needs_their_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    np.arange(100, dtype="<u2").tofile("text.bin")
    Path("bench.toml").write_text('[data]\nsource = "text.bin"\n')
    said = refused(capsys, "bench", "recipes", "bench.toml", "--recipes", "local")
    assert "compared by bits a byte; say what made it, data.tokenizer=tokenizer.json" in said


def test_bytes_are_a_tokenizer_like_any() -> None:
    (tokens,) = load_tokenizer("bytes").encode([b"\x00\xff"])
    assert tokens.tolist() == [0, 255]

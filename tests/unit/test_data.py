"""Does a corpus hold what its source holds, is the split kept, and is a batch a pure function of where training stands?"""

from __future__ import annotations

import itertools
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dtrain.data.corpus import Corpus, Shard, _stdlib_files, check_fits, load_corpus
from dtrain.data.sampler import heldout_sequences, sample_batch

HELD, TRAINED = ord("H"), ord("t")


def folder(tmp_path: Path, num_files: int, num_bytes: int = 300) -> Path:
    """Files in nested folders; file k is filled with letter k, and the order of names is not the order of creation."""
    root = tmp_path / "texts"
    for k in reversed(range(num_files)):
        path = root / f"part{k // 10:02d}" / f"{k % 10}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([k]) * num_bytes)
    return root


def batch_of(
    corpus: Corpus,
    *,
    seed: int = 0,
    island: int = 0,
    num_islands: int = 2,
    step: int = 0,
    first: int = 0,
    batch: int = 8,
    context: int = 32,
    shard: Shard = "iid",
) -> tuple[Tensor, Tensor]:
    place = {"seed": seed, "island": island, "num_islands": num_islands, "step": step, "first": first}
    return sample_batch(corpus, **place, batch=batch, context=context, shard=shard)


def token_file(tmp_path: Path, name: str, tokens: np.ndarray) -> Path:
    path = tmp_path / name
    tokens.tofile(path)
    return path


def test_stdlib_is_large_clean_and_has_a_name() -> None:
    corpus, again = load_corpus("stdlib"), load_corpus("stdlib")
    assert len(corpus.train) >= 8_000_000
    assert corpus.hash == again.hash
    assert len(corpus.hash) == 64
    assert (corpus.vocab, corpus.bytes_per_token) == (256, 1.0)
    assert corpus.file_starts[-1] == len(corpus.train)
    text = corpus.train.tobytes() + corpus.heldout.tobytes()
    assert b"def wraps(wrapped" in text, "functools.py belongs"
    assert b"build_time_vars = {" not in text, "_sysconfigdata tells where Python was built, so it differs between machines"


NOT_OF_THE_LIBRARY = (
    "test", "tests", "idlelib", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "turtledemo"
)  # fmt: skip


def test_stdlib_leaves_out_tests_tools_and_what_pip_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library of one module in each place where one could stand; only these five belong."""
    kept = ["abc.py", "email/__init__.py", "email/mime/text.py", "latest/a.py", "test_support.py"]
    left_out = [f"{parent}{folder}/deep/a.py" for folder in NOT_OF_THE_LIBRARY for parent in ("", "email/")]
    left_out += ["_sysconfigdata__linux_x86_64.py", "LICENSE.txt", "lib-dynload/math.so", ".hidden.py", ".git/a.py"]
    for name in (*kept, *left_out):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    (tmp_path / "empty.py").touch()
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
    assert [path.relative_to(tmp_path).as_posix() for path in _stdlib_files()] == kept


def test_stdlib_is_what_a_walk_of_its_own_finds() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    found = _stdlib_files()
    every = {path for path in root.rglob("*.py") if path.is_file() and path.stat().st_size > 0}
    names = {path: path.relative_to(root).parts for path in every}
    left_out = {path for path, parts in names.items() if set(parts) & set(NOT_OF_THE_LIBRARY)}
    left_out |= {path for path, parts in names.items() if parts[-1].startswith("_sysconfigdata")}
    left_out |= {path for path, parts in names.items() if any(part.startswith(".") for part in parts)}
    assert set(found) == every - left_out
    assert len(found) == len(set(found)) > 300
    assert left_out, "pip at least stands beside the library"
    corpus = load_corpus("stdlib")
    assert len(corpus.train) + len(corpus.heldout) == sum(path.stat().st_size for path in found)


def test_folder_holds_out_every_50th_file_in_the_order_of_paths(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder(tmp_path, 120)))
    assert corpus.heldout.tobytes() == bytes([49]) * 300 + bytes([99]) * 300
    expected = [k for k in range(120) if k not in (49, 99)]
    assert corpus.train.tobytes() == b"".join(bytes([k]) * 300 for k in expected)
    assert corpus.num_files == 118
    assert corpus.file_starts.tolist() == [300 * i for i in range(119)]


def test_small_folder_holds_out_its_last_file(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder(tmp_path, 3)))
    assert set(corpus.train.tolist()) == {0, 1}
    assert set(corpus.heldout.tolist()) == {2}


def test_hidden_and_empty_files_do_not_count(tmp_path: Path) -> None:
    root = folder(tmp_path, 3)
    expected = load_corpus(str(root))
    (root / ".git").mkdir()
    (root / ".git" / "config").write_bytes(b"secret")
    (root / ".hidden").write_bytes(b"secret")
    (root / "empty.txt").touch()
    corpus = load_corpus(str(root))
    assert corpus.hash == expected.hash
    assert corpus.num_files == 2


@pytest.mark.parametrize("shard", ["iid", "by_file"])
def test_heldout_bytes_are_never_sampled(tmp_path: Path, shard: Shard) -> None:
    root = folder(tmp_path, 100, num_bytes=60)
    for k in range(100):
        marked = bytes([HELD if k % 50 == 49 else TRAINED]) * 60
        (root / f"part{k // 10:02d}" / f"{k % 10}.txt").write_bytes(marked)
    corpus = load_corpus(str(root))
    assert set(corpus.heldout.tolist()) == {HELD}
    for step in range(50):
        for x in batch_of(corpus, step=step, island=step % 2, shard=shard, context=100):
            assert set(x.unique().tolist()) == {TRAINED}


def test_text_file_is_split_98_to_2_without_overlap(tmp_path: Path) -> None:
    content = np.arange(200_000, dtype="<u4").tobytes()  # every aligned word occurs once
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    corpus = load_corpus(str(path))
    assert len(corpus.heldout) == len(content) // 50
    train, heldout = (set(np.frombuffer(part.tobytes(), "<u4").tolist()) for part in (corpus.train, corpus.heldout))
    assert not train & heldout
    assert train | heldout == set(range(200_000))
    assert corpus.num_files == 1


def test_large_text_file_holds_out_blocks_from_all_over(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(np.repeat(np.arange(200, dtype=np.uint8), 64 * 1024).tobytes())
    assert sorted(set(load_corpus(str(path)).heldout.tolist())) == [49, 99, 149, 199]


@pytest.mark.parametrize(
    ("name", "dtype", "top", "vocab"), [("a.bin", "<u2", 50_256, 50_304), ("a.u32.bin", "<u4", 128_255, 128_256)]
)
def test_token_file_round_trip(tmp_path: Path, name: str, dtype: str, top: int, vocab: int) -> None:
    tokens = np.random.default_rng(0).integers(0, top, 20_000).astype(dtype)
    tokens[123] = top
    corpus = load_corpus(str(token_file(tmp_path, name, tokens)))
    assert isinstance(corpus.train, np.memmap)
    assert np.array_equal(np.concatenate([corpus.train, corpus.heldout]), tokens)
    assert len(corpus.heldout) == 400
    assert corpus.vocab == vocab
    x, y = batch_of(corpus, batch=64)
    assert x.dtype == y.dtype == torch.int64
    windows = {bytes(tokens[i : i + 33].tobytes()) for i in range(20_000 - 400 - 32)}
    for inputs, last in zip(x, y[:, -1:], strict=True):
        assert torch.cat([inputs, last]).numpy().astype(dtype).tobytes() in windows


@pytest.mark.parametrize("shard", ["iid", "by_file"])
def test_sampling_is_pure(tmp_path: Path, shard: Shard) -> None:
    root = folder(tmp_path, 20)
    one, other = load_corpus(str(root)), load_corpus(str(root))
    first = [batch_of(one, step=step, shard=shard) for step in range(10)]
    np.random.seed(7)  # noqa: NPY002 - the global generators must not matter
    torch.manual_seed(7)
    for step in reversed(range(10)):
        x, y = batch_of(other, step=step, shard=shard)
        assert torch.equal(x, first[step][0])
        assert torch.equal(y, first[step][1])
        assert torch.equal(x[:, 1:], y[:, :-1])


def test_batches_differ_in_every_coordinate() -> None:
    corpus = load_corpus("stdlib")
    places = list(itertools.product(range(3), repeat=4))
    batches = {
        batch_of(corpus, seed=seed, island=island, num_islands=3, step=step, first=8 * part)[0].numpy().tobytes()
        for seed, island, step, part in places
    }
    assert len(batches) == len(places) == 81


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_an_islands_batch_is_the_same_however_it_is_shared(size: int) -> None:
    corpus = load_corpus("stdlib")
    whole = batch_of(corpus, step=5, batch=4 * size)
    parts = [batch_of(corpus, step=5, first=k * size, batch=size) for k in range(4)]
    for got, expected in zip(map(torch.cat, zip(*parts, strict=True)), whole, strict=True):
        assert torch.equal(got, expected)


def test_windows_start_everywhere_evenly(tmp_path: Path) -> None:
    tokens = np.arange(1010, dtype="<u2")
    corpus = load_corpus(str(token_file(tmp_path, "a.bin", tokens)))  # 990 train tokens, so 958 starts at context 32
    starts = torch.cat([batch_of(corpus, step=step, batch=100)[0][:, 0] for step in range(200)])
    counts = torch.bincount(starts, minlength=958)
    assert counts.shape == (958,)
    assert counts.min() > 0, "the first and the last start are reached too"
    # chi-square with 957 degrees of freedom: mean 957, standard deviation sqrt(2 * 957) = 43.7; five of them
    expected = 20_000 / 958
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 957) < 5 * 43.7


def test_islands_are_disjoint_by_file_and_cover_all(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder(tmp_path, 12)))  # the last is held out: 11 train files, letters 0..10
    seen = [set[int](), set[int](), set[int]()]
    for step in range(100):
        for island in range(3):
            x, y = batch_of(corpus, island=island, num_islands=3, step=step, context=50, shard="by_file")
            seen[island] |= set(x.unique().tolist()) | set(y.unique().tolist())
    assert seen == [{0, 3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8}]


def test_by_file_windows_are_pieces_of_the_islands_own_text(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    root.mkdir()
    lengths = [1, 40, 3, 700, 2, 55, 90, 8, 5]
    generator = np.random.default_rng(0)
    contents = [generator.integers(0, 256, n, dtype=np.uint8).tobytes() for n in lengths]
    for k, content in enumerate(contents):
        (root / f"{k}.txt").write_bytes(content)
    corpus = load_corpus(str(root))
    for island in range(2):
        own = b"".join(contents[k] for k in range(8) if k % 2 == island)
        for step in range(20):
            x, y = batch_of(corpus, island=island, step=step, shard="by_file")
            for window in torch.cat([x, y[:, -1:]], dim=1):
                assert window.numpy().astype(np.uint8).tobytes() in own


def test_hash_changes_with_contents_and_split(tmp_path: Path) -> None:
    root = folder(tmp_path, 60)
    hashes = [load_corpus(str(root)).hash]
    assert load_corpus(str(root)).hash == hashes[0]
    (root / "part00" / "3.txt").write_bytes(b"x" * 300)
    hashes.append(load_corpus(str(root)).hash)  # a training file
    (root / "part04" / "9.txt").write_bytes(b"x" * 300)
    hashes.append(load_corpus(str(root)).hash)  # the held-out file
    (root / "part00" / "0.txt").unlink()
    (root / "part00" / "1.txt").write_bytes(bytes([0]) * 300 + bytes([1]) * 300)
    hashes.append(load_corpus(str(root)).hash)  # the same bytes in fewer files
    assert len(set(hashes)) == 4


def test_heldout_sequences_are_fixed_spread_and_do_not_overlap(tmp_path: Path) -> None:
    tokens = np.arange(65_000, dtype="<u2").repeat(50)[: 50 * 60_000]
    tokens[-60_000:] = np.arange(60_000)  # 60,000 are held out, each number once
    corpus = load_corpus(str(token_file(tmp_path, "a.bin", tokens)))
    x, y = heldout_sequences(corpus, context=100)
    assert x.shape == y.shape == (512, 100)
    assert len(y.unique()) == y.numel(), "no token is predicted twice"
    assert (x[0, 0].item(), y[-1, -1].item()) == (0, 59_999)
    gaps = x[:, 0].diff()
    assert gaps.max() - gaps.min() <= 1
    assert torch.equal(heldout_sequences(load_corpus(corpus.source), context=100)[0], x)


def test_heldout_sequences_overlap_evenly_where_little_is_held_out(tmp_path: Path) -> None:
    corpus = load_corpus(str(token_file(tmp_path, "a.bin", np.arange(50_000, dtype="<u2"))))  # 1,000 are held out
    x, y = heldout_sequences(corpus, context=100)
    assert x.shape == (512, 100)
    assert torch.equal(y, x + 1)
    assert set(x[:, 0].diff().tolist()) == {1, 2}
    assert (x[0, 0].item(), y[-1, -1].item()) == (49_000, 49_999)


def test_sources_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "odd.u32.bin").write_bytes(b"123456")
    (tmp_path / "bare").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.bin").write_bytes(b"1234")
    cases = {
        "missing.txt": 'missing.txt" does not exist; use "stdlib"',
        "empty.txt": 'empty.txt" is an empty file',
        "odd.bin": "has 3 bytes, not a multiple of 2",
        "odd.u32.bin": "has 6 bytes, not a multiple of 4",
        "bare": "a folder with 0 non-empty files",
        "shards": "holds the token file a.bin",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_corpus(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_what_the_system_does_not_let_one_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r'^data.source = "x+" cannot be read: File name too long; use "stdlib"'):
        load_corpus("x" * 300)
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ValueError, match=r"file.txt/below\" does not exist"):
        load_corpus(str(tmp_path / "file.txt" / "below"))

    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # not by mode bits: root may read everything
    with pytest.raises(ValueError, match=r"texts\" cannot be read at .*texts/part00/0.txt: Permission denied"):
        load_corpus(str(folder(tmp_path, 2)))


def test_a_corpus_too_short_for_the_context_is_one_line(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder(tmp_path, 4, num_bytes=40)))  # 120 to train on, 40 held out; 80 and 40 by file
    with pytest.raises(ValueError, match=r"has 120 training tokens .* model.context = 120"):
        batch_of(corpus, context=120)
    assert batch_of(corpus, context=119)[0].shape == (8, 119)
    with pytest.raises(ValueError, match=r"has 40 training tokens for island 1, .* model.context = 50"):
        batch_of(corpus, island=1, context=50, shard="by_file")
    with pytest.raises(ValueError, match=r"holds out 40 tokens, .* model.context = 40"):
        heldout_sequences(corpus, context=40)
    assert heldout_sequences(corpus, context=39)[0].shape == (512, 39)


def test_the_launchers_check_refuses_what_an_island_would_refuse(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder(tmp_path, 4, num_bytes=40)))  # 120 to train on, 40 held out; 80 and 40 by file
    check_fits(corpus, context=39, num_islands=3, shard="by_file")
    for context, num_islands, shard, message in (
        (120, 2, "iid", "has 120 training tokens for island 0"),
        (40, 2, "by_file", "has 40 training tokens for island 1"),
        (40, 2, "iid", "holds out 40 tokens"),
        (8, 4, "by_file", "a training file for each of 4 islands"),
    ):
        with pytest.raises(ValueError, match=message):
            check_fits(corpus, context=context, num_islands=num_islands, shard=shard)  # pyright: ignore[reportArgumentType]


def test_the_check_needs_no_torch() -> None:
    probe = "import sys; from dtrain.data.corpus import check_fits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False, cwd=Path(__file__).parents[2]).returncode == 0


def test_more_islands_than_files_is_one_line(tmp_path: Path) -> None:
    corpus = load_corpus(str(folder(tmp_path, 3)))
    with pytest.raises(ValueError, match=r"each of 3 islands, .* has 2; use"):
        batch_of(corpus, num_islands=3, shard="by_file")

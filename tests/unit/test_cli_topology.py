"""Does ``dtrain topology`` say what the matrices say, and does a run find its graph's file again?"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from dtrain.config import load_job
from dtrain.launch.cli import run_command
from dtrain.recipes import resolve
from dtrain.topology import NAMES
from tests.unit.small_run import opened, write_job_file

NUMBERS = ("lambda2", "spectral gap", "rounds", "wires a round", "bytes a round", "articulation points")


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(["topology", *words]) == 0, capsys.readouterr().err
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_all_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(capsys, monkeypatch)
    assert [line.split()[0].partition(":")[0] for line in lines[1:]] == list(NAMES)


def test_a_ring_of_eight(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """lambda2 = (1 + sqrt 2) / 3; ln 1e-3 / ln lambda2 = 31.8; int8:64 has 1 + 2/64 bytes a parameter, to two neighbours."""
    lines = said(capsys, monkeypatch, "ring", "--islands", "8", "--codec", "int8:64", "--numel", "64000")
    numbers = {name: line.removeprefix(name).split()[0] for line in lines for name in NUMBERS if line.startswith(name + " ")}
    assert numbers == dict(zip(NUMBERS, ("0.8047", "0.1953", "32", "2", "132,000", "none"), strict=True))
    assert lines[-8:] == ["0: 1 7", *(f"{i}: {i - 1} {i + 1}" for i in range(1, 7)), "7: 0 6"]



@pytest.mark.parametrize(
    ("words", "last"),
    [
        (("one_peer_ring", "--islands", "4"), ["round 0: 0-1 2-3", "round 1: 0-3 1-2", "and again from round 0"]),
        (("one_peer_exponential", "--islands", "3"), ["round 1: 0>2 1>0 2>1", "and again from round 0"]),
        (("coloured", "--graph", "path", "--islands", "4"), ["round 0: 0-1 2-3", "round 1: 1-2", "and again from round 0"]),
        (("directed", "--graph", "cycle", "--islands", "3"), ["0: 1", "1: 2", "2: 0"]),
        (("graph", "--graph", "rings:2", "--islands", "4", "--server", "all:4:1"), ["round 15: 0-1 0-2 0-3 1-2 1-3 2-3", "..."]),
        (("random_pairs", "--islands", "2"), ["round 15: 0-1", "..."]),
    ],
)
def test_rounds_are_written_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], last: list[str]
) -> None:
    assert said(capsys, monkeypatch, *words)[-len(last) :] == last


def test_it_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "star.png"
    assert said(capsys, monkeypatch, "star", "--islands", "5", "--out", str(out))[-1] == f"drawn: {out}"
    head = out.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (1000, 1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rign",), "topology = 'rign' is not known; use one of complete, ring"),
        (("ring", "--islands", "1"), 'sync.topology = "ring" needs at least 2 islands, got 1'),
        (("complete", "--islands", "1025"), "--islands 1025: its matrix takes too long to look at; use at most 1024"),
        (("graph",), 'sync.topology = "graph" is made of the edges of a graph; name it in sync.graph'),
        (("ring", "--codec", "int3"), "codec 'int3' is not known"),
        (("ring", "--out", "ring.jpg"), "--out ring.jpg: pictures are drawn as PNG"),
    ],
)
def test_what_it_cannot_show_is_one_line(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    assert run_command(["topology", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"dtrain: {message}")
    assert printed.err.count("\n") == 1


def test_a_run_keeps_where_its_edges_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    Path("links.edges").write_text("0 1\n")
    run = opened("sync.recipe=dpsgd", "sync.every=1", "sync.topology=graph", "sync.graph=./links.edges").run
    assert load_job(run / "job.toml").sync.graph == str(Path("links.edges").resolve())


def test_a_row_of_ones_own_names_a_graph_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder; a family stays a family."""
    (tmp_path / "links.edges").write_text("0 1\n1 2\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import replace\nfrom dtrain.recipes import RECIPES\n"
        'file = replace(RECIPES["dpsgd"], topology="graph", graph="links.edges")\nfamily = replace(file, graph="rings:1")\n'
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resolve("../mine.py:file", {}, 3).graph == str(tmp_path / "elsewhere" / ".." / "links.edges")
    assert resolve("../mine.py:family", {}, 3).graph == "rings:1"

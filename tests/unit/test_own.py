"""Does a method from somebody's own file run like the project's, and does ``dtrain check`` see what it breaks?"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from dtrain.config import load_job
from dtrain.contract import steppers
from dtrain.launch.cli import run_command
from dtrain.optim import AccumAdamW
from dtrain.recipes import RECIPES, resolve
from tests.unit.small_run import opened, write_job_file

MINE = '''
import torch
from dtrain.algorithm import Algorithm
from dtrain.recipes import Recipe


def method(recipe, mixing):
    """A neighbour's parameters, half of each, as fp32 bytes."""

    def bind(layout, peers):
        def init(b):
            return {"other": torch.zeros_like(b.x), "sent": torch.zeros_like(b.x)}

        def send(b, state, link):
            state["sent"].copy_(b.x)
            for peer in link.row.sends:
                link.post(peer, state["sent"].view(torch.uint8))
            for peer, _ in link.row.recvs:
                link.expect(peer, 4 * b.x.numel())
            yield
            state["other"].copy_(state["sent"])
            for peer, weight in link.row.recvs:
                theirs = link.received(peer).view(torch.float32)
                state["other"].add_(theirs - state["sent"], alpha=weight * SHARE)

        def land(b, state):
            b.x.add_(state["other"] - state["sent"])

        return Algorithm(init, send, land)

    return bind


SHARE = 1.0
row = Recipe("mine", "half of a neighbour's", "my own", "own", "parameters", 2, "neighbours", "one_peer_ring", combine="gossip",
             delay=1, method=method)
named = Recipe("named", "dpsgd in a hurry", "my own", "dpsgd", "parameters", 3, "neighbours", "ring", combine="gossip")
lacks = Recipe("lacks", "no method", "my own", "own", "parameters", 1)
'''


@pytest.fixture(autouse=True)
def in_a_folder_with_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(textwrap.dedent(MINE))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    status = run_command(list(words))
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_it_keeps_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, err = said(capsys, "check", "mine.py:row")
    assert (status, err) == (0, "")
    assert len(lines) == 7
    assert all(line.startswith("kept ") for line in lines)


BREAKS = {
    "takes a thousandth too much": (
        'weight * SHARE',
        'weight * (1.001 if peers.node == 0 else 1)',
        "mixing keeps the mean of all islands",
    ),
    "moves the mean": ('weight * SHARE', 'weight * (1 + peers.node)', "mixing keeps the mean of all islands"),
    "forgets its state": ('"other": torch.zeros_like(b.x), "sent"', '"sent"', "KeyError"),
    "is random": ('theirs - state["sent"]', 'theirs - state["sent"] + 1e-3 * torch.rand_like(theirs)', "twice is the same bits"),
    "keeps state elsewhere": ('b.x.add_(state["other"]', 'HERE[0] *= 0.999; b.x.mul_(HERE[0]).add_(state["other"]', "saved"),
    "blows up": ("b.x.add_(", "b.x.mul_(1e30).add_(", "every parameter stays finite"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_what_it_breaks_is_seen(capsys: pytest.CaptureFixture[str], what: str) -> None:
    good, bad, promise = BREAKS[what]
    assert good in MINE
    Path("bad.py").write_text("HERE = [1.0]\n" + MINE.replace(good, bad))
    if promise == "KeyError":
        with pytest.raises(KeyError, match="other"):
            run_command(["check", "bad.py:row"])
        return
    status, lines, err = said(capsys, "check", "bad.py:row")
    assert status == 1
    assert any(line.startswith("BROKEN") and promise in line for line in lines), lines
    assert err.startswith("dtrain: bad.py:row breaks ")


def changed(*changes: tuple[str, str]) -> str:
    text = MINE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    name = f"changed{sum(1 for _ in Path().iterdir())}.py"  # a process loads a file once
    Path(name).write_text(text)
    return f"{name}:row"


SLOW = ('"parameters", 2,', '"parameters", 4,'), ("delay=1", "delay=4")
"""Rounds every 4 steps, that fly for 4: the last 3 of them know nothing of what was sent."""


def test_a_round_that_throws_training_away_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing else is wrong with it: it mixes well, and the mean stays where nobody trains."""
    thrown = changed(*SLOW, ('b.x.add_(state["other"] - state["sent"])', 'b.x.copy_(state["other"])'))
    status, lines, _ = said(capsys, "check", thrown)
    assert status == 1
    assert [line.split(":")[0] for line in lines if not line.startswith("kept ")] == [
        "BROKEN  what islands train outlives their rounds"
    ]


def test_what_happens_beyond_the_first_chunk_of_a_codec_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = ("delay=1", 'delay=1, codec="topk:64/4096:2"')
    beyond = ("            yield\n", '            yield\n            state["sent"][4096:] += 1e-3\n')
    status, lines, _ = said(capsys, "check", changed(chunks, beyond))
    assert status == 1
    assert any(line.startswith("BROKEN  mixing keeps the mean") for line in lines), lines


def test_what_a_row_says_nothing_of_is_said_to_be_unchecked(capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, err = said(capsys, "check", changed((', combine="gossip",\n', ",\n")))
    assert (status, err) == (0, "")
    skipped = [line for line in lines if not line.startswith("kept ")]
    assert len(skipped) == 3
    assert all(line.startswith("skipped ") and 'not checked, because the row says combine = "mean"' in line for line in skipped)


def test_a_recipe_is_checked_with_the_optimizer_that_it_is_defined_with() -> None:
    model = torch.nn.Linear(2, 2)
    for name, every in (("decent_adam", 1), ("accum_adam", 4)):
        (optimizer,) = steppers(model, RECIPES[name], 0.1)
        assert isinstance(optimizer, AccumAdamW)
        assert optimizer.param_groups[0]["every"] == every
    kinds = {name: [type(optimizer) for optimizer in steppers(model, RECIPES[name], 0.1)] for name in ("dpsgd", "muloco")}
    assert kinds == {"dpsgd": [torch.optim.SGD], "muloco": [torch.optim.Muon, torch.optim.SGD]}


QUICK = ("dpsgd", "push_sum", "accum_adam", "muloco")
CHECKED = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES if name != "dadao"]


@pytest.mark.slow
def test_a_resume_is_the_same_bits_with_fewer_threads_than_cores(capsys: pytest.CaptureFixture[str]) -> None:
    """dilocox multiplies matrices where its rounds are carried."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        status, lines, err = said(capsys, "check", "dilocox")
    finally:
        torch.set_num_threads(before)
    assert (status, err) == (0, ""), lines


@pytest.mark.parametrize("name", CHECKED)
def test_the_projects_own_recipes_keep_them_too(capsys: pytest.CaptureFixture[str], name: str) -> None:
    status, lines, err = said(capsys, "check", name)
    assert (status, err) == (0, ""), lines


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:row", "there is no file"),
        ("mine.py:raw", "mine.py has no row raw; define raw = dtrain.recipes.Recipe(...) there"),
        ("mine.py:SHARE", "mine.py has no row SHARE"),
        ("mine.py:lacks", 'sync.algorithm = "own" is for a row of your own file that has a method'),
    ],
)
def test_what_is_no_row_is_one_line(capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    status, lines, err = said(capsys, "check", name)
    assert (status, lines) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_rounds_are_in_flight_where_a_resume_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """A method that keeps what arrived beside its state, with rounds every 5 steps that fly for 2."""
    beside = MINE.replace('"other": torch.zeros_like(b.x), "sent"', '"sent"').replace('state["other"]', "mine[0]")
    held = "        mine = [None]\n\n        def init(b):\n            mine[0] = torch.zeros_like(b.x)"
    beside = beside.replace("        def init(b):", held, 1)
    beside = beside.replace('"parameters", 2,', '"parameters", 5,').replace("delay=1", "delay=2")
    Path("bad.py").write_text(beside)
    status, lines, _ = said(capsys, "check", "bad.py:row")
    assert status == 1
    assert any(line.startswith("BROKEN") and "saved after" in line for line in lines), lines


def test_bytes_that_are_no_wire_may_be_kept(capsys: pytest.CaptureFixture[str]) -> None:
    raw = MINE.replace('{"other"', '{"raw": torch.zeros(4 * b.x.numel(), dtype=torch.uint8), "other"')
    kept = 'state["raw"].copy_(state["sent"].view(torch.uint8)); state["other"].copy_'
    Path("raw.py").write_text(raw.replace('state["other"].copy_', kept))
    status, lines, err = said(capsys, "check", "raw.py:row")
    assert (status, err) == (0, ""), lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("yield", "yield yield"), "line 20: invalid syntax; mend the file of sync.recipe"),
        (("Algorithm(init, send, land)", "Algorithm(init, send, land, grad=send)"), 'where its row says payload = "gradients"'),
    ],
)
def test_a_file_that_cannot_work_is_one_line(capsys: pytest.CaptureFixture[str], change: tuple[str, str], message: str) -> None:
    Path("bad.py").write_text(MINE.replace(*change))
    status, lines, err = said(capsys, "check", "bad.py:row")
    assert (status, lines) == (2, [])
    assert message in err
    assert err.count("\n") == 1


def test_own_is_no_algorithm_of_the_projects_rows() -> None:
    for name, algorithm in (("dpsgd", "own"), ("mine.py:row", "dpsgd")):
        with pytest.raises(ValueError, match=r'sync\.algorithm = "own" is for a row of your own file'):
            resolve(name, {"algorithm": algorithm}, 4)


def test_a_job_and_join_take_it_from_any_folder() -> None:
    write_job_file()
    run = opened("sync.recipe=mine.py:row").run
    sync = load_job(run / "job.toml").sync
    assert sync.recipe == f"{Path('mine.py').absolute()}:row"
    assert (sync.algorithm, sync.every, sync.delay) == ("own", 2, 1)
    assert resolve("mine.py:row", {"every": 5}, 4).every == 5
    assert resolve("mine.py:named", {}, 4).algorithm == "dpsgd"

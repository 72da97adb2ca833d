"""Does somebody's own topology or codec run like the project's, and is one that breaks its contract refused, with the reason?"""

from __future__ import annotations

import hashlib
import os
import py_compile
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dtrain
from dtrain.assemble import assemble
from dtrain.bucket import whole
from dtrain.config import load_job
from dtrain.connect import Connection, connect_local
from dtrain.errors import NonFinite, WireError
from dtrain.launch.cli import run_command
from dtrain.link import Peers
from dtrain.own import digest, load_named
from dtrain.own_codec import check_codec, codec_of
from dtrain.own_topology import LOOK, check_topology, mixing_of
from dtrain.recipes import RECIPES, resolve, with_steps
from dtrain.topology import mixing
from dtrain.topology.consensus import matrix
from dtrain.wire import HEADER_BYTES
from tests.islands import run_islands, sgd_step
from tests.oracle.test_gossip import LR, problem
from tests.unit.small_run import opened, write_job_file

MINE = '''
import random
from itertools import count
import torch
from dtrain.recipes import Recipe
from dtrain.topology import Round


def rows(index, node, num_nodes):
    """The ring's pairs in a random order of the islands, drawn anew every third round."""
    order = list(range(num_nodes))
    random.Random(f"mine/{index // 3}").shuffle(order)
    place = (order.index(node) - index) % num_nodes
    if num_nodes % 2 and place == num_nodes - 1:
        return Round(1.0, (), ())
    peer = order[((place ^ 1) + index) % num_nodes]
    return Round(0.5, (peer,), ((peer, 0.5),))


class Half:
    """fp16 bytes."""

    def wire_bytes(self, numel):
        return 2 * numel

    def encode(self, x, out):
        out.copy_(x.clamp(-65504, 65504).half().view(torch.uint8))

    def decode(self, wire, out):
        out.copy_(wire.clone().view(torch.float16))


half = Half()
NUMBER, CALLS = 3, count()
row = Recipe("mine", "half of a neighbour's", "my own", "dpsgd", "parameters", 1, "neighbours", "mine.py:rows",
             codec="mine.py:half", combine="gossip", delay=1)
fed = Recipe("fed", "averaged as halves", "my own", "diloco", "pseudo_gradients", 4, codec="mine.py:half", error_feedback=True)
'''


@pytest.fixture(autouse=True)
def in_a_folder_with_mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)


def with_mine(old: str, new: str, name: str = "bad.py") -> str:
    assert old in MINE
    Path(name).write_text(MINE.replace(old, new))
    return name


@pytest.mark.parametrize("name", ["row", pytest.param("fed", marks=pytest.mark.slow)])
def test_rows_that_use_them_keep_their_promises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From another folder: what a row names lies beside it."""
    file = Path("mine.py").absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run_command(["check", f"{file}:{name}"]) == 0, capsys.readouterr().err
    assert all(line.startswith("kept ") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_an_own_topology_is_its_matrices(n: int) -> None:
    check_topology("mine.py:rows", None, n)
    mixed = mixing_of("mine.py:rows", None, 0, None)
    for index in (0, 1, 5, 3 * LOOK):
        w = matrix(mixed, index, n)
        np.testing.assert_array_equal(w, w.T)
        assert sorted(np.diag(w)) == [0.5] * (n - n % 2) + [1.0] * (n % 2)
    assert mixed.in_degree(0, n) == 1
    served = mixing_of("mine.py:rows", None, 0, "all:2:2")
    np.testing.assert_array_equal(matrix(served, 3, n), matrix(mixed, 2, n))
    assert served.in_degree(0, n) == min(2, n - 1)


def test_the_projects_names_are_what_they_were() -> None:
    check_topology("ring", None, 4)
    np.testing.assert_array_equal(matrix(mixing_of("ring", None, 0, None), 0, 4), matrix(mixing("ring", None, 0), 0, 4))


def test_it_is_shown_and_a_run_keeps_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["topology", "mine.py:rows", "--islands", "4"]) == 0
    assert "round 15: " in capsys.readouterr().out
    write_job_file()
    run = opened("sync.recipe=dpsgd", "sync.every=1", "sync.topology=mine.py:rows", "sync.codec=mine.py:half").run
    sync = load_job(run / "job.toml").sync
    assert (sync.topology, sync.codec) == (f"{Path('mine.py').absolute()}:rows", f"{Path('mine.py').absolute()}:half")


BAD_ROWS = {
    "weights": ("((peer, 0.5),)", "((peer, 0.4),)", "round 0: the row of island 0 sums to 0.9, and rows and columns"),
    "columns": (
        "return Round(0.5, (peer,), ((peer, 0.5),))",
        "return Round(*((0.5, (peer,), ((peer, 0.5),)) if node < peer else (0.25, (peer,), ((peer, 0.75),))))",
        "round 0: the column of island 0 sums to 1.25",
    ),
    "late": ("((peer, 0.5),)", "((peer, 0.5 - 0.1 * (index == 9)),)", "round 9: the row of island 0 sums to 0.9"),
    "deaf": ("    peer = ", "    if node == 0:\n        return Round(1.0, (), ())\n    peer = ", "which does not hear it"),
    "silent": ("Round(0.5, (peer,),", "Round(0.5, (peer,) if node else (),", "which sends nothing; add it to sends there"),
    "nobody": ("Round(0.5, (peer,),", "Round(0.5, (peer + 1,),", "; name others, from 0 to 3, once each"),
    "negative": ("Round(0.5, (peer,), ((peer, 0.5),))", "Round(1.5, (peer,), ((peer, -0.5),))", "use numbers of 0 or more"),
    "another each time": ('f"mine/{index // 3}"', 'f"{next(CALLS)}"', "is another when it is asked again; draw"),
    "apart": ("    order = ", "    return Round(0.5, (node ^ 1,), ((node ^ 1, 0.5),))\n    order = ", "islands 2, 3 never hear"),
    "no pairs": ("((peer, 0.5),)", "(peer,)", "round 0: island 0 hears 2; write (peer, weight) for each, as ((1, 0.5),)"),
    "no list of pairs": ("((peer, 0.5),)", "peer", "round 0: island 0 hears 2; write (peer, weight) for each"),
    "no list of peers": ("Round(0.5, (peer,)", "Round(0.5, peer", "round 0: island 0 sends to 2; name islands by whole numbers"),
    "half a peer": ("Round(0.5, (peer,)", "Round(0.5, (peer + 0.5,)", "island 0 sends to (2.5,); name islands by whole numbers"),
    "half a peer heard": ("((peer, 0.5),)", "((0.5, peer),)", "round 0: island 0 hears (0.5, 2); write (peer, weight)"),
    "text": ("((peer, 0.5),)", "((peer, '0.5'),)", "round 0: island 0 has a weight of '0.5'; use numbers of 0 or more"),
    "text of its own": ("Round(0.5, (peer", "Round('0.5', (peer", "round 0: island 0 has a weight of '0.5'"),
    "two arguments": ("rows(index, node, num_nodes):", "rows(index, node, num_nodes=4, *, seed):", "has no function rows"),
    "nothing": ("    order = ", "    return 3\n    order = ", "round 0 gives island 0 3; return a dtrain.topology.Round"),
}


@pytest.mark.parametrize("what", BAD_ROWS)
def test_rows_that_are_no_matrix_are_refused_before_anything_starts(capsys: pytest.CaptureFixture[str], what: str) -> None:
    old, new, message = BAD_ROWS[what]
    name = with_mine(old, new)
    assert run_command(["topology", f"{name}:rows", "--islands", "4"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve("dpsgd", {"topology": f"{name}:rows"}, 4)


def test_rounds_after_the_first_are_looked_at_where_they_begin() -> None:
    """Weights go wrong, or more is heard than there is room for, in a round that no check before the start has seen."""
    late = with_mine("((peer, 0.5),)", "((peer, 0.5 - 0.1 * (index == 70)),)", "late.py")
    check_topology(f"{late}:rows", None, 4)
    with pytest.raises(ValueError, match=r"round 70: the row of island 0 sums to 0\.9"):
        mixing_of(f"{late}:rows", None, 0, None).rows(70, 1, 4)
    all_of_a_sudden = (
        "    if index == 90:\n        others = [n for n in range(num_nodes) if n != node]\n"
        "        return Round(1 / num_nodes, tuple(others), tuple((n, 1 / num_nodes) for n in others))\n    order = "
    )
    many = with_mine("    order = ", all_of_a_sudden, "many.py")
    check_topology(f"{many}:rows", None, 4)
    with pytest.raises(ValueError, match="round 90 lets island 0 hear 3 others, and none of the first 64 rounds more than 1"):
        mixing_of(f"{many}:rows", None, 0, None).rows(90, 2, 4)


def test_numbers_of_numpy_are_numbers() -> None:
    name = with_mine("Round(0.5, (peer,), ((peer, 0.5),))", "Round(half.of(0.5), [peer], [(half.no(peer), half.of(0.5))])")
    Path(name).write_text(Path(name).read_text() + "\nimport numpy as np\nhalf.of, half.no = np.float32, np.int64\n")
    mixed = mixing_of(f"{name}:rows", None, 0, None)
    assert mixed.rows(5, 1, 4) == mixing_of("mine.py:rows", None, 0, None).rows(5, 1, 4)
    assert [type(part) for part in mixed.rows(5, 1, 4).recvs[0]] == [int, float]


def test_a_function_is_asked_once_an_island_and_round() -> None:
    """By whoever asks in a process; of the first rounds twice before, to see that it says the same."""
    name = with_mine("    order = ", "    next(CALLS)\n    order = ")
    calls = load_named(f"{name}:CALLS", "topology")[2]
    assert isinstance(calls, count)
    for _ in range(3):
        assert resolve("dpsgd", {"topology": f"{name}:rows"}, 6).topology == f"{name}:rows"
    assert next(calls) == 2 * 6 * LOOK
    for _ in range(2):
        mixed = mixing_of(f"{name}:rows", None, 0, None)
        for index in (100, 101):
            for node in range(6):
                assert mixed.in_degree(node, 6) == len(mixed.rows(index, node, 6).recvs) == 1
    assert next(calls) == 2 * 6 * LOOK + 1 + 2 * 6


def test_rings_of_ones_own_that_fall_apart_need_a_server() -> None:
    apart = with_mine("    order = ", "    peer = node ^ 1\n    return Round(0.5, (peer,), ((peer, 0.5),))\n    order = ")
    with pytest.raises(ValueError, match="islands 2, 3 never hear of island 0; add edges, or rounds with a server"):
        resolve("dpsgd", {"topology": f"{apart}:rows"}, 4)
    assert resolve("dpsgd", {"topology": f"{apart}:rows", "server": "all:1:2"}, 4).server == "all:1:2"


BAD_CODECS = {
    "size": ("return 2 * numel", "return 2.0 * numel", "with 1 elements wire_bytes is 2.0; return a whole number from 1"),
    "changes x": ("out.copy_(x.", "out.copy_(x.mul_(0.5).", "encode changes x; work on a copy"),
    "another each time": ("x.clamp", "(x + next(CALLS)).clamp", "writes others the second time; fill all, without chance"),
    "leaves": ("out.copy_(x.clamp(-65504, 65504).half().view(torch.uint8))", "out[1:] = 3", "leaves bytes of out"),
    "changes wire": ("wire.clone()", "wire.zero_()", "decode changes the wire"),
    "half done": ("out.copy_(wire.clone().view(torch.float16))", "out[1:].copy_(wire.view(torch.float16)[1:])", "fill all of it"),
    "infinite": ("x.clamp(-65504, 65504).half()", "(x * 1e9).half()", "or not finite"),
    "infinite where x is large": ("x.clamp(-65504, 65504)", "x", "1 elements values of 1e+06: decode leaves elements"),
    "0 / 0": ("x.clamp(-65504, 65504)", "(x / x.abs().max())", "with 1 elements zeros: decode leaves elements"),
    "no copy": ("half = Half()", "half = Half()\nhalf.lock = __import__('threading').Lock()", "cannot be copied for each bucket"),
    "a class": ("half = Half()", "half = Half", "has no codec half; define half there, an object with wire_bytes"),
    "not there": ("half = Half()", "whole = Half()", "has no codec half"),
}


@pytest.mark.parametrize("what", BAD_CODECS)
def test_a_codec_that_breaks_its_contract_is_refused(what: str) -> None:
    old, new, message = BAD_CODECS[what]
    name = with_mine(old, new)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        check_codec(f"{name}:half")
    assert message in str(caught.value)


def test_an_own_codec_codes_mixes_and_knows_a_wire_that_is_not_its_own() -> None:
    """fp16 keeps 11 bits: half an ulp is 2^-11 of a value."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(1))
    bound = codec_of("mine.py:half", error_feedback=False).bind(whole("x", x))
    wire, state = bound.new_wire(x.device), bound.init(x.device)
    bound.encode(x, wire, state)
    bound.check(wire)
    assert wire.numel() == bound.wire_bytes == 32 + 600
    y = torch.ones(300)
    bound.decode_add(wire, y, weight=0.5)
    torch.testing.assert_close(y, 1 + 0.5 * x.half().float(), rtol=0, atol=0)
    z = x.clone()
    bound.mix(z, [wire, wire], [-0.25, 0.75])
    torch.testing.assert_close(z, x + 0.5 * x, rtol=2.0**-10, atol=1e-6)
    other = with_mine("fp16 bytes", "the same in another file", "other.py")
    for change, message in ((40, "checksum does not fit"), (16, "header is of another codec")):
        bad = wire.clone()
        bad[change] ^= 1
        with pytest.raises(WireError, match=message):
            bound.check(bad)
    with pytest.raises(WireError, match="header is of another codec"):
        codec_of(f"{other}:half", error_feedback=False).bind(whole("x", x)).check(wire)
    with pytest.raises(WireError, match="a wire of 631 bytes"):
        bound.check(wire[:-1])
    with pytest.raises(NonFinite):
        bound.encode(torch.full((300,), float("inf")), wire, state)


def test_inf_or_nan_of_a_codec_is_never_in_a_wire_that_is_used() -> None:
    """One that passes what is tried at its load, and fails on what a run brings."""
    name, cpu = f"{with_mine('x.clamp(-65504, 65504)', 'x')}:half", torch.device("cpu")
    x = torch.tensor([1.0, 1e6])
    for feedback in (False, True):
        bound = codec_of(name, error_feedback=feedback).bind(whole("x", x))
        with pytest.raises(NonFinite, match="an own codec makes inf or NaN of a payload of values up to 1e"):
            bound.encode(x, bound.new_wire(cpu), bound.init(cpu))
    bound = codec_of(name, error_feedback=False).bind(whole("x", x))
    wire = bound.new_wire(cpu)
    bound.encode(x / 1e6, wire, {})
    bound.check(wire)
    wire[HEADER_BYTES:] = torch.full((2,), float("nan"), dtype=torch.float16).view(torch.uint8)
    said = zlib.crc32(bytes(wire[HEADER_BYTES:].tolist()), zlib.crc32(bytes(wire[: HEADER_BYTES - 8].tolist())))
    wire[HEADER_BYTES - 8 : HEADER_BYTES] = torch.tensor(list(said.to_bytes(8, "little")), dtype=torch.uint8)
    with pytest.raises(WireError, match="a wire that an own codec makes inf or NaN of"):
        bound.check(wire)


def test_islands_in_one_process_share_no_room_of_a_codec() -> None:
    """Both have filled it before either empties it."""
    room = "self.room = x.clamp(-65504, 65504).half(); TOGETHER.wait(5); out.copy_(self.room.view(torch.uint8))"
    name = with_mine("out.copy_(x.clamp(-65504, 65504).half().view(torch.uint8))", room)
    Path(name).write_text("import threading\nTOGETHER = threading.Barrier(2)\n" + Path(name).read_text())
    codec, layout = codec_of(f"{name}:half", error_feedback=False), whole("x", torch.zeros(3))

    def coded(node: int) -> Tensor:
        bound, y = codec.bind(layout, node), torch.zeros(3)
        wire = bound.new_wire(y.device)
        bound.encode(torch.full((3,), 1.0 + node), wire, {})
        bound.decode_add(wire, y, weight=1.0)
        return y

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(coded, range(2))
    assert (one.tolist(), two.tolist()) == ([1.0] * 3, [2.0] * 3)


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_error_feedback_keeps_what_it_lost(decay: float) -> None:
    """Sum of what was sent + residual + what it forgot = sum of inputs, to fp32's rounding of 20 sums of values up to 4."""
    bound = codec_of("mine.py:half", error_feedback=True, feedback_decay=decay).bind(whole("x", torch.zeros(100)))
    cpu = torch.device("cpu")
    wire, state, sent, put = bound.new_wire(cpu), bound.init(cpu), torch.zeros(100), torch.zeros(100)
    for k in range(20):
        sent += (1 - decay) * state["residual"]
        x = 0.2 * torch.randn(100, generator=torch.Generator().manual_seed(k))
        bound.encode(x, wire, state)
        bound.decode_add(wire, sent, weight=1.0)
        put += x
    assert float(state["residual"].abs().max()) > 0
    torch.testing.assert_close(sent + state["residual"], put, rtol=0, atol=80 * 4 * 2.0**-24)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("choco", {"codec": "mine.py:half"}, "choco codes differences by the project's own kernels"),
        ("choco", {"topology": "mine.py:rows"}, "round 1, of 64 that were looked at, is another than round 0; use another"),
        ("dpsgd", {"topology": "mine.py:rows", "graph": "ring"}, 'has no effect with sync.topology = "mine.py:rows" of your own'),
        ("dpsgd", {"topology": "mine.py:half"}, "mine.py has no function half; define def half(index, node, num_nodes) there"),
        ("dpsgd", {"topology": "nowhere.py:rows"}, "sync.topology = 'nowhere.py:rows': there is no file"),
        ("dpsgd", {"codec": "mine.py:NUMBER"}, "sync.codec = 'mine.py:NUMBER': mine.py has no codec NUMBER"),
        ("dpsgd", {"codec": 8}, "codec = 8 is not allowed"),
    ],
)
def test_what_does_not_fit_is_one_line(recipe: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        resolve(recipe, changes, 4)
    assert message in str(caught.value)


@pytest.mark.parametrize("axis", ["topology", "codec"])
def test_islands_with_another_file_are_refused_and_with_the_same_elsewhere_not(axis: str) -> None:
    Path("copy").mkdir()
    Path("copy/mine.py").write_text(MINE)
    Path("copy/theirs.py").write_text(MINE + "\n")
    word = {"topology": "rows", "codec": "half"}[axis]

    def island(connection: Connection, files: tuple[str, str]) -> None:
        model = problem(2).model(connection.node)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        own = f"{files[connection.node]}:{word}"
        topology, codec = (own, None) if axis == "topology" else (None, own)
        with dtrain.join(model, optimizer, recipe="dpsgd", topology=topology, codec=codec, link=connection):
            sgd_step(model, optimizer)

    run_islands(2, lambda connection: island(connection, ("mine.py", "copy/mine.py")))
    with pytest.raises(ValueError, match="has another recipe than island 0"):
        run_islands(2, lambda connection: island(connection, ("mine.py", "copy/theirs.py")))


def test_one_island_alone_may_use_them() -> None:
    model = problem(2).model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with dtrain.join(model, optimizer, recipe="diloco", every=1, codec="mine.py:half", link=connect_local(1)[0]):
        sgd_step(model, optimizer)


@pytest.mark.parametrize("name", [*RECIPES, "mine.py:row"])
def test_every_recipe_takes_an_own_codec_or_is_refused_in_one_line(name: str) -> None:
    """What passes has its code, bound to a bucket."""
    refuses = name in ("local", "local_sgd", "choco", "beer", "dadao")
    codes = "" if refuses else RECIPES[name].algorithm if name in RECIPES else "dpsgd"
    try:
        recipe = resolve(name, {"codec": "mine.py:half"}, 4)
    except ValueError as e:
        assert (codes, "\n" in str(e)) == ("", False)  # noqa: PT017  (most pass)
        return
    assert recipe.algorithm == codes
    assemble(with_steps(recipe, 1000), 0, 4).methods[0](whole("x", torch.zeros(50)), Peers(1, 4))


def test_the_bytes_that_run_are_those_of_the_digest() -> None:
    """Not what is cached of a file as long and as old as it."""
    file, old, new = Path("stale.py"), b"NUMBER = 1\n", b"NUMBER = 2\n"
    file.write_bytes(old)
    os.utime(file, (1e9, 1e9))
    py_compile.compile(str(file), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    file.write_bytes(new)
    os.utime(file, (1e9, 1e9))
    _, _, number = load_named("stale.py:NUMBER", "codec")
    assert (number, digest("stale.py:NUMBER")) == (2, hashlib.sha256(new).hexdigest())

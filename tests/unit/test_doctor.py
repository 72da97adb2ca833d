"""Does the doctor find what is wrong, and name what mends it? Also where torch, numba and triton are what is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain import checkpoint
from dtrain.build import build_recipe
from dtrain.config import load_job, parse_job
from dtrain.kernels import cache_folder
from dtrain.launch import doctor, doctor_meet, doctor_net, doctor_room
from dtrain.launch.cli import run_command
from dtrain.launch.doctor import Answer, Asked, Finding, Gpu, Size, Torch
from dtrain.launch.doctor_meet import Clocks, Way, compare_clocks, greeted, look_over, serve
from dtrain.launch.doctor_net import Reached, reach
from dtrain.launch.doctor_torch import size_of
from tests.dist.job import QUICKSTART, ROOT, SMALL
from tests.unit.small_run import contents, refused, write_job_file

CPU = Torch(None, gloo=True, nccl=None, gpus=(), gpu_error="", cache="", compiled=True)
HOPPER = Gpu("H100", (9, 0), 80 * 10**9, 79 * 10**9)


def on_gpus(count: int) -> Torch:
    return replace(CPU, cuda="13.0", nccl="2.28.3", gpus=(HOPPER,) * count)


def asked(**sections: dict[str, object]) -> Asked:
    return Asked(parse_job(sections, where="job.toml"), ("job.toml",))


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def told(capsys: pytest.CaptureFixture[str], *words: str, status: int) -> dict[str, dict[str, str]]:
    """What ``dtrain doctor --json`` finds, by name."""
    assert run_command(["doctor", *words, "--json"]) == status
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["name"]: line for line in lines if "name" in line}


# ---- versions


def test_what_is_missing_or_broken_is_found_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch cannot load a library, numba is not there, and triton takes its process with it."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')\n")
    (tmp_path / "numba.py").write_text("raise ModuleNotFoundError(\"No module named 'numba'\", name='numba')\n")
    (tmp_path / "triton.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.delenv("DTRAIN_KERNELS", raising=False)
    found = told(capsys, str(QUICKSTART), f"job.dir={tmp_path}", status=1)
    torch, numba, triton = (found[name] for name in ("torch", "numba", "triton"))
    assert torch["state"] == "fail"
    assert "cannot be imported: OSError: libcudart.so.13: cannot open" in torch["what"]
    assert torch["remedy"].endswith("-m pip install --force-reinstall 'torch>=2.11'")
    assert (numba["state"], numba["what"]) == ("fail", "not installed (the CPU's kernels)")
    assert numba["remedy"].endswith("-m pip install numba")
    assert (triton["state"], triton["what"]) == ("warn", "cannot be imported: SIGSEGV (only a GPU needs it)")
    assert {found[name]["state"] for name in ("python", "pydantic", "disk", "interfaces", "link.port")} == {"ok"}


def test_it_starts_where_nothing_that_it_looks_for_can_be_imported(tmp_path: Path) -> None:
    names = ("torch", "numba", "triton")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise ImportError('it is broken')\n")
    done = subprocess.run(
        [sys.executable, "-m", "dtrain.launch", "doctor", str(QUICKSTART), "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    broken = {line["name"] for line in lines if "cannot be imported: ImportError: it is broken" in line.get("what", "")}
    assert broken == set(names)


def test_a_torch_that_is_too_old_is_one_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, number in (("torch", "2.9.1+cpu"), ("numba", "1.0"), ("triton", "4.0")):
        (tmp_path / f"{name}.py").write_text(f"__version__ = {number!r}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    found = told(capsys, status=1)
    assert found["torch"]["what"] == "2.9.1+cpu, and dtrain needs 2.11 or newer"
    assert found["torch"]["remedy"].endswith("-m pip install 'torch>=2.11'")
    assert "dtrain with torch" not in found


def test_a_torch_with_which_dtrain_cannot_be_imported_is_a_finding() -> None:
    said = doctor.of_torch(Answer(("2.13.0",), "ImportError: libgloo"))
    torch, ours = doctor.torch_itself(said)
    assert (torch.state, ours.state, ours.what) == ("ok", "fail", "cannot be imported: ImportError: libgloo")


def test_the_oldest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f">={doctor.PYTHON}" == project["requires-python"]
    assert {f"torch>={doctor.TORCH}", f"pydantic>={doctor.PYDANTIC}"} <= set(project["dependencies"])
    needed = {re.split(r"[>;]", need)[0] for need in project["dependencies"]}
    assert {*doctor.OTHERS, "torch", "pydantic", "numba", "triton"} == needed


def test_an_extra_that_the_job_asks_for_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said = doctor.Said(torch=CPU, size=Size(1, 1, 1))
    job = asked(sim={"problem": "ridge", "clock": "poisson", "rates": "sdp"})
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (gone,) = doctor.of_job(job, said)
    assert (gone.name, gone.state, gone.what) == ("cvxpy", "fail", 'not installed, and sim.rates = "sdp" needs it')
    assert gone.remedy.endswith("-m pip install cvxpy")
    own = asked(model={"hf": "a/model"}, data={"source": "hf:a/set"}, log={"tensorboard": True, "wandb": "p"})
    assert [found.name for found in doctor.of_job(own, said)] == ["transformers", "datasets", "tensorboard", "wandb"]
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    assert [finding.state for finding in doctor.of_job(job, said)] == ["ok"]
    assert list(doctor.of_job(asked(), said)) == []


# ---- what computes


@pytest.mark.parametrize(
    ("torch", "sections", "state", "remedy"),
    [
        (CPU, {}, "ok", ""),
        (CPU, {"link": {"transport": "nccl"}}, "fail", "dtrain run job.toml link.transport=c10d"),
        (on_gpus(2), {"link": {"transport": "nccl"}}, "ok", ""),
        (on_gpus(2), {"islands": {"ranks": 4}, "train": {"batch": 4}}, "fail", "dtrain run job.toml islands.ranks=2"),
        (on_gpus(1), {}, "warn", "dtrain sim job.toml"),
    ],
)
def test_gpus_are_held_against_what_the_job_needs(
    torch: Torch, sections: dict[str, dict[str, object]], state: str, remedy: str
) -> None:
    found = list(doctor.gpus(torch, asked(**sections), driver=""))[-1]
    assert (found.state, found.remedy) == (state, remedy)


def test_a_torch_without_gloo_stops_a_job_and_one_for_cpus_leaves_a_gpu_idle() -> None:
    assert [f.state for f in doctor.backends(replace(CPU, gloo=False), None)] == ["fail", "ok"]
    (idle,) = doctor.gpus(CPU, None, driver="570.1")
    assert (idle.state, "--index-url" in idle.remedy) == ("warn", True)


# ---- room


@pytest.mark.parametrize("recipe", ["muloco", "accum_adam"])
def test_a_checkpoint_is_as_large_as_was_said(recipe: str, tmp_path: Path) -> None:
    """But for the generator's state, 5 kB, and what little else is no tensor of the model's size: groups, counters, names."""
    changes = (*SMALL, "train.steps=4", "train.batch=2", "train.checkpoint_every=4", f"sync.recipe={recipe}")
    assert run_command(["sim", str(QUICKSTART), f"job.dir={tmp_path}", "job.name=run", *changes]) == 0
    run = tmp_path / "run"
    job, saved = load_job(run / "job.toml"), checkpoint.load_island(run, 4, 0)
    said = size_of(job, build_recipe(job), vocab=256)
    assert said.parameters == sum(t.numel() for name, t in saved.items() if name.startswith("model."))
    assert 0 <= sum(t.numel() * t.element_size() for t in saved.values()) - said.checkpoint_bytes < 10_000


def test_a_disk_is_held_against_the_checkpoints(tmp_path: Path) -> None:
    """Two islands' checkpoints, of which two are kept while a third is written, and three models of no size."""
    free, job = doctor_room.shutil.disk_usage(tmp_path).free, asked(train={"keep": 2})
    sizes = {"ok": free // 8, "warn": free // 4, "fail": 2 * free}
    found = {state: doctor_room.disk(tmp_path / "runs" / "one", job, Size(1, 0, one)) for state, one in sizes.items()}
    assert {state: finding.state for state, finding in found.items()} == {state: state for state in sizes}
    assert found["fail"].remedy.startswith(("du -xh", "dtrain run job.toml job.dir="))
    never = asked(train={"checkpoint_every": 0})
    assert doctor_room.disk(tmp_path, never, Size(1, 0, sizes["fail"])).state == "ok", "none is written"


def test_what_is_looked_at_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    assert doctor_room.cannot_write(tmp_path) == ""
    assert doctor_room.cannot_write(tmp_path / "not" / "yet") == ""
    assert doctor_room.cannot_write(tmp_path / "file") == f"{tmp_path / 'file'} is no folder"
    assert contents(tmp_path) == before


def test_a_file_where_the_numba_cache_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    found = doctor_room.numba_cache(replace(CPU, cache=str(cache_folder()), compiled=False))
    assert (found.state, f"{tmp_path / 'cache'} is no folder" in found.what) == ("warn", True)
    assert re.fullmatch(r"export NUMBA_CACHE_DIR=/\S+", found.remedy)


def test_limits_are_held_against_the_job() -> None:
    """The launcher of 2 x 300 islands' ranks has 1,200 connections, and some files beside."""
    many = asked(islands={"count": 300, "ranks": 2}, train={"batch": 2})
    assert doctor_room.open_files(many, 1024, 4096).remedy == "ulimit -n 1456"
    assert doctor_room.open_files(many, 1456, 4096).state == "ok"
    assert doctor_room.open_files(None, 1024, 4096).state == "ok"
    pair, size = asked(islands={"threads": 4}), Size(10**6, 4 * 10**6, 0)
    assert doctor_room.cores(CPU, pair, 8).state == "ok"
    assert doctor_room.cores(CPU, pair, 6).remedy == "dtrain run job.toml islands.threads=3"
    assert doctor_room.cores(CPU, pair, 1).remedy == "dtrain sim job.toml"
    assert doctor_room.memory(CPU, pair, size, 40 * 10**6).state == "ok"
    assert doctor_room.memory(CPU, pair, size, 39 * 10**6).remedy == "dtrain run job.toml islands.count=1"
    assert doctor_room.memory(on_gpus(2), pair, size, 10**6).state == "ok", "it is the GPUs' memory that counts"


def test_a_container_may_have_less_than_its_machine(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable: 3000 kB\n")
    assert doctor_room.free_memory(tmp_path, tmp_path) == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 900\n")
    assert doctor_room.free_memory(tmp_path, tmp_path) == 1500
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor_room.usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert doctor_room.usable_cores(tmp_path) == 1


# ---- ports


def test_a_port_that_is_held_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = by_name(doctor_net.local_network(asked(link={"port": port})))["link.port"]
    assert found.state == "fail"
    assert found.what.startswith(f"{port} is in use by ")
    assert found.what.endswith(f", process {os.getpid()}")
    (other,) = re.findall(r"^dtrain run job.toml link.port=(\d+)$", found.remedy)
    socket.create_server(("127.0.0.1", int(other))).close()
    assert by_name(doctor_net.local_network(asked(link={"port": port})))["link.port"].state == "ok"


def test_a_port_is_open_refused_or_of_no_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert doctor_net.closed(reach("127.0.0.1", port)) == "open"
    assert reach("127.0.0.1", port).how == "refused"
    hows: tuple[doctor_net.How, ...] = ("refused", "blocked", "silent")
    said = {how: doctor_net.refusal("meeting", "far", 29400, Reached(how, "no answer")) for how in hows}
    assert len({finding.what for finding in said.values()}) == len({finding.remedy for finding in said.values()}) == 3
    assert said["refused"].remedy == "dtrain doctor --serve 29400  # on far"
    assert said["blocked"].remedy == "iptables -I INPUT -p tcp --dport 29400 -j ACCEPT  # on far"
    assert "timed out" in said["silent"].what


def test_an_interface_that_is_not_there_is_found_with_one_that_is() -> None:
    found = by_name(doctor_net.local_network(asked(link={"interface": "nope0"})))["link.interface"]
    assert (found.state, found.what) == ("fail", "nope0 is no interface of this machine")
    name = found.remedy.removeprefix("dtrain run job.toml link.interface=")
    assert doctor_net.interfaces()[name]
    assert by_name(doctor_net.local_network(asked(link={"interface": name})))["gloo ports"].state == "ok"


def test_what_must_be_let_in_is_said_with_the_kernels_own_ports(tmp_path: Path) -> None:
    (tmp_path / "range").write_text("40000\t41000\n")
    assert doctor_net.ephemeral_ports(tmp_path / "range") == (40000, 41000)
    first, last = doctor_net.ephemeral_ports()
    meeting, gloo = doctor_net.routes(asked(link={"interface": "lo", "advertise": "far", "port": 29400}), None)
    assert (meeting.target, meeting.ports, gloo.ports) == ("far", "29400", f"{first}-{last}")
    assert [route.ports for route in doctor_net.routes(asked(), None)] == ["any", "any"], "nothing leaves loopback"
    assert doctor_net.routes(None, ("10.0.0.2", 29400))[0].target == "10.0.0.2"


# ---- another machine


class Scripted(socket.socket):
    """A way of d1 and d2 ns to a clock that is theta ns ahead; a question after the other, each with its own ways."""

    def __init__(self, theta: int, ways: list[tuple[int, int]]) -> None:
        super().__init__()
        self.now, self._theta, self._ways, self._said = 10**18, theta, iter(ways), b""

    def sendall(self, data: bytes, flags: int = 0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        d1, d2 = next(self._ways)
        there, works = self.now + d1 + self._theta, 1000
        self._said, self.now = struct.pack("!qq", there, there + works), self.now + d1 + works + d2

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return self._said


def test_the_clock_is_found_by_the_shortest_round_trip_to_half_of_it() -> None:
    """The error is (d1 - d2) / 2 exactly, which is half a round trip where one of the two ways takes no time."""
    theta = -7_000_000_000
    with Scripted(theta, [(900, 40_000), (3000, 1000), (50_000, 50_000)]) as way:
        found = compare_clocks(way, clock=lambda: way.now, questions=3)
    assert found.rtt_s == pytest.approx(4e-6)
    assert found.within_s == pytest.approx(2e-6)
    assert found.skew_s * 1e9 == pytest.approx(theta + (3000 - 1000) / 2)
    with Scripted(theta, [(0, 5000)]) as way:
        found = compare_clocks(way, clock=lambda: way.now, questions=1)
    assert abs(found.skew_s - theta / 1e9) == pytest.approx(found.within_s)


@contextmanager
def answering(clock: Callable[[], int] = time.time_ns) -> Iterator[int]:
    """The port of an answering side, which is closed at the end of the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def answers() -> None:
        with suppress(OSError):  # the listener is shut down below
            serve(listener, 60, clock=clock, say=len)

    thread = threading.Thread(target=answers, daemon=True)
    thread.start()
    yield port
    listener.shutdown(socket.SHUT_RDWR)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_clock_that_is_off_is_found_and_the_way_is_looked_over() -> None:
    with answering(lambda: time.time_ns() + 5_000_000_000) as port, socket.create_connection(("127.0.0.1", port)) as asks:
        assert greeted(asks)
        way = look_over(asks)
    assert abs(way.clocks.skew_s - 5) <= way.clocks.within_s
    assert (way.there.how, way.back) == ("open", "open")
    assert min(way.up_bits_per_s, way.down_bits_per_s) > 0
    found = by_name(doctor_meet._of_way(way, "far", None))
    assert (found["clock"].state, found["clock"].remedy) == ("warn", "timedatectl set-ntp true")
    assert "is 5 s ahead" in found["clock"].what


def test_who_answers_is_bounded_in_bytes_and_in_time() -> None:
    with answering() as port, socket.create_connection(("127.0.0.1", port)) as asks:
        assert greeted(asks)
        asks.sendall(b"D" + struct.pack("!I", doctor_meet.MOST_BYTES + 1))
        assert asks.recv(1) == b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        begun = time.monotonic()
        serve(listener, 0.05)
        assert time.monotonic() - begun >= 0.05
        assert listener.fileno() == -1


def test_nothing_is_written_to_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_meet, "_GREETING_S", 0.05)
    monkeypatch.setattr(doctor_meet, "answer", lambda process: Answer((), "DistStoreError"))
    monkeypatch.setattr(doctor_meet, "start", lambda *arguments: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (found,) = doctor_meet.meet("127.0.0.1", listener.getsockname()[1], None)
        heard, _ = listener.accept()
        with heard:
            assert heard.recv(1) == b""
    assert (found.state, "neither a meeting point nor a doctor" in found.what) == ("fail", True)


def test_a_link_that_is_slower_than_the_job_says_is_to_be_planned_with() -> None:
    way = Way(Clocks(0.0, 0.01, 0.02), 5e6, 6e6, Reached("blocked"), "silent")
    found = by_name(doctor_meet._of_way(way, "far", asked(link={"rate": "10mbit"})))
    assert found["link"].remedy == "dtrain plan job.toml --link 5mbit --rtt 20ms"
    assert found["clock"].state == "ok"
    opened = "iptables -I INPUT -p tcp --dport {}:{} -j ACCEPT".format(*doctor_net.ephemeral_ports())
    assert (found["gloo there"].remedy, found["gloo back"].remedy) == (f"{opened}  # on far", opened)
    assert by_name(doctor_meet._of_way(way, "far", asked(link={"rate": "5mbit"})))["link"].state == "ok"


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no.toml"], "no job file at no.toml"),
        (["job.toml", "sync.evry=5"], "on the command line: unknown key sync.evry"),
        (["--meet", "far"], "--meet far: write HOST:PORT with a port from 1 to 65535"),
        (["--meet", "far:0"], "--meet far:0: write HOST:PORT"),
        (["--meet", "far:1", "--serve", "1"], "--serve answers and --meet asks: give one of them on each machine"),
        (["--for", "3s"], "--for 3s is how long --serve answers"),
        (["--serve", "0", "--for", "0s"], "--for 0s: say how long to answer"),
        (["--serve", "0", "--for", "soon"], "'soon' is not a time"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_job_file()
    assert refused(capsys, "doctor", *arguments).startswith(said)


def test_a_finding_that_is_not_ok_has_a_remedy() -> None:
    with pytest.raises(AssertionError):
        Finding("disk", "fail", "full")

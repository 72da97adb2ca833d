"""What does the doctor say of islands that are not alike, or not here, and what does it hold for those that ask it at once?"""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtrain.launch import doctor, doctor_islands, doctor_meet, doctor_room
from dtrain.launch.doctor import Answer, Finding, Size
from tests.unit.test_doctor import CPU, asked, by_name, on_gpus

THERE = Answer(("0.19.8",))
HERE_AND_FAR: list[dict[str, object]] = [{"ranks": 2}, {"ranks": 8, "launcher": "manual"}]


# ---- engines


def of_deepspeed(path: Path, said: Answer = THERE, **sections: dict[str, object]) -> dict[str, Finding]:
    """What is found for two islands, of which the second has two ranks of that engine."""
    islands = {"each": [{}, {"engine": "deepspeed", "ranks": 2}], "deepspeed": str(path)}
    return by_name(doctor_islands.of_islands(asked(islands=islands, **sections), said))


def test_deepspeeds_file_is_read_as_a_run_would_read_it(tmp_path: Path) -> None:
    path = tmp_path / "my zero.json"
    gone = of_deepspeed(path)["islands.deepspeed"]
    assert (gone.state, "cannot be read: No such file" in gone.what) == ("fail", True)
    subprocess.run(gone.remedy, shell=True, check=True)  # what a person is told to type
    well = of_deepspeed(path)
    assert (well["islands.deepspeed"].state, well["islands.deepspeed"].what) == ("ok", f"{path}, stage 2 of ZeRO")
    assert (well["deepspeed"].state, "deepspeed's step" in well) == ("ok", False)
    assert well["islands"].what == "0: 1 rank, ddp, here; 1: 2 ranks, deepspeed, here"
    for text, words in (
        ("{", "is not valid JSON"),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization.stage = 0 shards nothing"),
        ('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4}', "train_micro_batch_size_per_gpu = 4, and"),
    ):
        path.write_text(text)
        found = of_deepspeed(path)["islands.deepspeed"]
        assert (found.state, words in found.what) == ("fail", True), found
        assert found.remedy == f"${{EDITOR:-vi}} '{path}'"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    step = of_deepspeed(path, sync={"recipe": "allreduce"})["deepspeed's step"]
    assert (step.state, "exchanges gradients before each update" in step.what) == ("fail", True)
    missing = of_deepspeed(path, Answer((), "ModuleNotFoundError: No module named 'deepspeed'"))["deepspeed"]
    assert (missing.state, missing.remedy.endswith("-m pip install deepspeed")) == ("fail", True)


def test_deepspeed_is_imported_where_an_island_here_needs_it_and_torch_is_not() -> None:
    zero = {"engine": "deepspeed", "ranks": 2}
    for each, needs in (([{}, zero], True), ([{}, zero | {"launcher": "manual"}], False)):
        assert doctor_islands.needs_deepspeed(asked(islands={"each": each, "deepspeed": "zero.json"})) is needs
    code = "import sys, dtrain.launch.doctor_islands; print([name for name in ('torch', 'numba') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- tables


def test_what_is_started_here_is_held_against_this_machine_and_no_more() -> None:
    """Two ranks here and eight elsewhere."""
    job = asked(islands={"each": HERE_AND_FAR, "threads": 1}, train={"batch": 8}, link={"interface": "lo"})
    assert list(doctor.gpus(on_gpus(2), job, driver=""))[-1].what == "one for each of 2 ranks"
    few = list(doctor.gpus(on_gpus(1), job, driver=""))[-1]
    assert (few.state, few.remedy) == ("fail", "dtrain run job.toml islands.each.0.ranks=1")
    assert doctor_room.cores(CPU, job, 2).state == "ok"
    assert doctor_room.memory(CPU, job, Size(10**6, 4 * 10**6, 0), 36 * 10**6).state == "ok", "two copies, and what diloco keeps"
    short = doctor_room.memory(CPU, job, Size(10**6, 4 * 10**6, 0), 35 * 10**6)
    assert (short.state, short.remedy) == ("fail", "dtrain plan job.toml --gpu h100"), "tables are as many as islands"
    assert doctor_room.open_files(job, 1024, 4096).what == "1,024 a process"
    assert doctor_room.open_files(job, 275, 4096).remedy == "ulimit -n 276", "the launcher is connected with all ten"
    far = asked(islands={"each": [{"launcher": "manual"}] * 2})
    assert doctor_room.cores(CPU, far, 1).state == "ok"


def test_what_starts_islands_elsewhere_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [{}, {"launcher": "ssh", "host": "far"}, {"launcher": "ssh"}, {"launcher": "slurm"}]
    job = asked(islands={"each": tables}, link={"interface": "lo"})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    gone = by_name(doctor_islands.of_islands(job, None))
    assert (gone["ssh"].state, gone["ssh"].remedy) == ("fail", "apt-get install openssh-client")
    assert gone["ssh"].what == "not installed, and islands 1, 2 would be started over it"
    assert (gone["hosts"].what, gone["hosts"].remedy) == ("no host for island 2", "dtrain run job.toml --hosts HOST2")
    assert (gone["slurm"].state, gone["slurm"].what) == ("warn", "no sbatch and no srun here, for island 3")
    assert gone["slurm"].remedy.startswith("dtrain slurm job.toml --island 3 --meet HOST:PORT --submit")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    there = by_name(doctor_islands.of_islands(job, None))
    assert (there["ssh"].what, there["slurm"].state) == ("/bin/ssh, for islands 1, 2", "ok")
    assert "0: 1 rank, ddp, here; 1: 1 rank, ddp, over ssh at far; 2: 1 rank, ddp, over ssh; 3: " in there["islands"].what
    assert list(doctor_islands.of_islands(asked(), None)) == []


def test_islands_elsewhere_need_an_interface_and_each_here_one_that_is_there() -> None:
    alone = by_name(doctor_islands.of_islands(asked(islands={"each": HERE_AND_FAR}, train={"batch": 8}), None))
    assert (alone["link.interface"].state, "gloo stays on loopback" in alone["link.interface"].what) == ("fail", True)
    each: list[dict[str, object]] = [{"interface": "nope0"}, {"interface": "nope1", "launcher": "manual"}, {"interface": "lo"}]
    found = by_name(doctor_islands.of_islands(asked(islands={"each": each}, link={"interface": "lo"}), None))
    assert {name for name, finding in found.items() if finding.state == "fail"} == {"islands.each.0.interface"}
    assert found["islands.each.0.interface"].what == "nope0 is no interface of this machine"


# ---- who asks


class Written(socket.socket):
    """That notes what is written, and who asks has asked for so many bytes."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts, self._asks = list[memoryview](), [struct.pack("!I", count), b"D"]

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return self._asks.pop() if self._asks else b""

    def sendall(self, data: memoryview, flags: int = 0) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.parts.append(data)


def test_what_all_who_ask_are_sent_is_held_once() -> None:
    """Of as many as may ask at once each gets MOST_BYTES, in parts of one small buffer that all share."""
    for count in (doctor_meet.MOST_BYTES, 2**16 + 3, 0):
        with Written(count) as asks:
            doctor_meet._Answers(asks, time.time_ns).until_the_end()
            greeting, *parts = asks.parts
            assert bytes(greeting) == b"dtrain doctor 1\n"
            assert sum(map(len, parts)) == count
            assert {id(part.obj) for part in parts} <= {id(doctor_meet._NOTHING.obj)}
    assert len(doctor_meet._NOTHING) == 2**16

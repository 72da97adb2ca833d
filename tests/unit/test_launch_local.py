"""Are islands started, started again, and ended, whatever happens? Under real torchrun, with small scripts as islands."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dtrain
from dtrain.config import parse_job
from dtrain.launch import meeting, processes
from dtrain.launch.islands import Launch, command, environment, last_lines
from dtrain.launch.launcher_word import read_word
from dtrain.sections import LinkSection

PACKAGE_ROOT = Path(dtrain.__file__).parents[1]
DEADLINE_S = 60.0  # a launch takes 5 s on two idle cores: three imports of torch

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ``dtrain run`` on a script; whatever is left of it at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *overrides: str) -> subprocess.Popen[str]:
        (tmp_path / "job.toml").write_text('[job]\nname = "stub"\n')
        (tmp_path / "script.py").write_text(script)
        line = [sys.executable, "-m", "dtrain.launch", "run", "job.toml", *overrides, "--", "script.py", "--flag", "1"]
        env = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
        launcher = subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(launcher)
        return launcher

    yield run
    for launcher in started:
        launcher.kill()
        launcher.communicate()
    for pid in members(tmp_path):
        os.kill(pid, signal.SIGKILL)


def members(tmp_path: Path) -> list[int]:
    """Processes of the run, found by its folder and not by the launcher's tag."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"DTRAIN_RUN={tmp_path}/".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


LOOPBACK = "0100007F"  # 127.0.0.1 as /proc/net/tcp writes it


def listening(pids: list[int]) -> list[str]:
    """The addresses, in hexadecimal, on which these processes listen."""
    inodes = {link for pid in pids for link in open_files(pid)}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


def open_files(pid: int) -> list[str]:
    found: list[str] = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(descriptor))
        except FileNotFoundError:  # closed just now
            continue
    return found


def poll(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    ends = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < ends, f"{what}: not within {deadline_s} s"
        time.sleep(0.02)


KILLED_ONCE = """
import json, os, signal, sys, time
from pathlib import Path

run, island, epoch = Path(os.environ["DTRAIN_RUN"]), os.environ["DTRAIN_ISLAND"], os.environ["DTRAIN_EPOCH"]
print("island", island, "epoch", epoch, sys.argv[1:], flush=True)
names = ("DTRAIN_NUM_ISLANDS", "DTRAIN_JOB", "DTRAIN_MEET", "DTRAIN_RESUME_STEP", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
whole = run / f"{island}.{epoch}.tmp"
whole.write_text(json.dumps({name: os.environ[name] for name in names}))
whole.rename(run / f"{island}.{epoch}.json")
if (island, epoch) == ("1", "0"):
    os.kill(os.getpid(), signal.SIGKILL)
while island == "0" and not (run / "1.1.json").exists():
    time.sleep(0.05)
if island == "0":
    from dtrain.membership import meeting_store
    print("regroup", meeting_store(os.environ["DTRAIN_MEET"], 30).get("regroup").decode())
"""


@pytest.mark.timeout(90)
def test_a_killed_island_is_started_again_in_the_next_epoch(start: Start, tmp_path: Path) -> None:
    launcher = start(KILLED_ONCE, "islands.threads=3")
    out, err = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 0, err
    lines = out.splitlines()
    assert "island 0 epoch 0 ['--flag', '1']" in lines, "rank 0 of island 0 is shown"
    assert "island 1 was lost and is started again; all islands go on from step 0" in lines
    assert "regroup 1:0" in lines
    run = tmp_path / "runs" / "stub"
    first, again = (json.loads((run / name).read_text()) for name in ("1.0.json", "1.1.json"))
    assert first == again
    host, port = first.pop("DTRAIN_MEET").split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    assert first == {
        "DTRAIN_NUM_ISLANDS": "2",
        "DTRAIN_JOB": str(run / "job.toml"),
        "DTRAIN_RESUME_STEP": "0",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "3",
    }
    assert members(tmp_path) == []
    word = read_word(run)
    assert word is not None
    assert (word.epoch, word.restarts, word.notes, word.exit_status) == (1, (0, 1), ("", ""), 0)


@pytest.mark.timeout(90)
def test_an_error_of_a_script_ends_all_with_its_traceback_and_its_line(start: Start, tmp_path: Path) -> None:
    launcher = start(
        "import os, time\n"
        "if os.environ['DTRAIN_ISLAND'] == '1':\n"
        "    raise ValueError('data.source = \"x\" is not there;\\nname a file')\n"
        "time.sleep(600)\n"
    )
    _, err = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 2
    lines = err.splitlines()
    assert lines[0].startswith("the end of ")
    assert lines[0].endswith("stderr.log:")
    assert any("script.py" in line and "line 3" in line for line in lines), "where it was raised"
    assert lines[-1] == 'dtrain: island 1: data.source = "x" is not there; name a file'
    word = read_word(tmp_path / "runs" / "stub")
    assert word is not None
    assert (word.exit_status, word.message) == (2, 'island 1: data.source = "x" is not there; name a file')
    assert members(tmp_path) == []


@pytest.mark.timeout(90)
def test_an_island_that_gives_up_on_a_peer_leaves_a_resumable_run(start: Start, tmp_path: Path) -> None:
    launcher = start("from dtrain.errors import PeerLost\nraise PeerLost([1], 'nothing for 300 s')\n", "islands.count=1")
    _, err = launcher.communicate(timeout=DEADLINE_S)
    said = "dtrain: island 0: lost island 1: nothing for 300 s; resume with: "
    assert (launcher.returncode, err) == (75, said + "dtrain run runs/stub/job.toml --resume -- script.py --flag 1\n")


@pytest.mark.timeout(90)
def test_a_script_that_never_starts_shows_its_traceback(start: Start) -> None:
    launcher = start("import no_such_module_anywhere\n", "islands.count=1")
    _, err = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in err
    assert err.splitlines()[-1] == "dtrain: island 0 failed before the first step"


SHOWN = """
import json, os, sys
from pathlib import Path

folder = Path(sys.argv[-1]) if "DTRAIN_RUN" not in os.environ else Path(os.environ["DTRAIN_RUN"])
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
"""
OURS = {
    *("DTRAIN_RUN", "DTRAIN_JOB", "DTRAIN_ISLAND", "DTRAIN_NUM_ISLANDS", "DTRAIN_MEET", "DTRAIN_EPOCH", "DTRAIN_RESUME_STEP"),
    *("DTRAIN_LAUNCH", "DTRAIN_PARENT", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
}
ALIKE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("ROLE_NAME", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
)


@pytest.mark.timeout(120)
def test_a_rank_has_the_environment_of_a_plain_torchrun_and_ours_besides(start: Start, tmp_path: Path) -> None:
    launcher = start(SHOWN, "islands.count=1", "islands.ranks=2")
    _, err = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 0, err
    plain = ["--standalone", "--nnodes=1", "--nproc-per-node=2", "script.py", str(tmp_path)]
    line = [sys.executable, "-m", "torch.distributed.run", *plain]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        ours, theirs = (json.loads((f / f"rank{rank}.json").read_text()) for f in (tmp_path / "runs" / "stub", tmp_path))
        assert ours.keys() - OURS == theirs.keys() - OURS
        assert ours.keys() >= OURS
        assert {"MASTER_ADDR", "MASTER_PORT"} <= ours.keys()
        assert {name: ours[name] for name in ALIKE} == {name: theirs[name] for name in ALIKE}


STUBBORN = """
import os, signal, subprocess, sys, time
from pathlib import Path

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
Path(os.environ["DTRAIN_RUN"], "ready" + os.environ["DTRAIN_ISLAND"]).touch()
time.sleep(600)
"""


@pytest.mark.timeout(90)
def test_ctrl_c_ends_also_a_script_that_ignores_it_within_five_seconds(start: Start, tmp_path: Path) -> None:
    launcher = start(STUBBORN)
    run = tmp_path / "runs" / "stub"
    poll(lambda: (run / "ready0").exists() and (run / "ready1").exists(), DEADLINE_S, "both islands run")
    begun = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=DEADLINE_S)
    assert time.monotonic() - begun < 5.0, err
    assert members(tmp_path) == []
    said = "dtrain: stopped at step 0; resume with: dtrain run runs/stub/job.toml --resume -- script.py --flag 1\n"
    assert (launcher.returncode, err) == (130, said)


@pytest.mark.timeout(90)
def test_no_rank_survives_a_launcher_that_is_killed(start: Start, tmp_path: Path) -> None:
    launcher = start(STUBBORN.replace("child = ", "child = None and "), "islands.count=1", "islands.ranks=2")
    run = tmp_path / "runs" / "stub"
    poll((run / "ready0").exists, DEADLINE_S, "the island runs")
    poll(lambda: len(members(tmp_path)) == 3, DEADLINE_S, "torchrun and two ranks run")
    ranks = members(tmp_path)
    poll(lambda: len(listening([launcher.pid, *ranks])) == 2, DEADLINE_S, "the meeting point and torchrun's store listen")
    assert set(listening([launcher.pid, *ranks])) == {LOOPBACK}
    launcher.kill()
    poll(lambda: members(tmp_path) == [], 5.0, "all ranks ended")


def test_processes_are_found_by_their_tag_and_by_their_island() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = [
        subprocess.Popen(sleeper, env={processes.TAG_VARIABLE: tag, "DTRAIN_ISLAND": island}, start_new_session=True)
        for tag, island in (("mine", "0"), ("mine", "1"), ("other", "0"))
    ]
    first, second, other = started
    try:
        poll(lambda: len(processes.tagged("mine")) == 2, 5.0, "both have their environment")
        assert sorted(processes.tagged("mine")) == sorted([first.pid, second.pid])
        assert processes.tagged("mine", island=1) == [second.pid]
        processes.end("mine", [second], island=1)
        assert (first.poll(), second.poll(), other.poll()) == (None, -signal.SIGTERM, None)
        processes.end("mine", [first])
        assert first.poll() == -signal.SIGTERM
        assert other.poll() is None
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_the_meeting_point_is_on_loopback_unless_the_job_says_otherwise() -> None:
    for link, bound in (({}, "127.0.0.1"), ({"advertise": "localhost"}, "127.0.0.1"), ({"interface": "lo"}, "127.0.0.1")):
        listener, meet = meeting.listen(LinkSection.model_validate(link))
        with listener:
            assert listener.getsockname()[0] == bound
            assert meet == f"{link.get('advertise', '127.0.0.1')}:{listener.getsockname()[1]}"
    listener, meet = meeting.listen(LinkSection.model_validate({"advertise": "head.example.org"}))
    with listener:
        assert listener.getsockname()[0] == "0.0.0.0"
        assert meet == f"head.example.org:{listener.getsockname()[1]}"


def test_a_port_that_is_taken_and_an_interface_that_is_not_there_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"link.port = {port} cannot be opened on 127.0.0.1.*in use.*free one"):
            meeting.listen(LinkSection.model_validate({"port": port}))
    with pytest.raises(ValueError, match=r"link.interface = 'nope0' is not an interface of this machine; it has .*lo"):
        meeting.listen(LinkSection.model_validate({"interface": "nope0"}))


def test_the_rank_that_failed_first_is_shown_and_not_its_echo(tmp_path: Path) -> None:
    def write(rank: int, text: str, at_s: int) -> Path:
        log = tmp_path / "logs" / "island1" / "torchrun" / "epoch0_x" / "attempt_0" / str(rank) / "stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text(text)
        os.utime(log, (at_s, at_s))
        return log

    assert last_lines(tmp_path, 1) == (tmp_path / "logs" / "island1", [])
    traceback = "Traceback (most recent call last):\n"
    write(0, "a warning\n", 1)
    write(1, traceback + "RuntimeError: connection closed by peer\n", 9)
    cause = write(2, traceback + "ZeroDivisionError: division by zero\n", 8)
    log, lines = last_lines(tmp_path, 1)
    assert (log, lines[-1]) == (cause, "ZeroDivisionError: division by zero")


def test_threads_share_the_cores_and_torchrun_runs_the_resolved_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    job = parse_job({"islands": {"count": 2, "ranks": 2}})
    launch = Launch(job, tmp_path, "127.0.0.1:1", "tag")
    assert environment(launch, 1, 3, 500)["OMP_NUM_THREADS"] == "3"
    assert environment(launch, 1, 3, 500)["DTRAIN_RESUME_STEP"] == "500"
    many = Launch(parse_job({"islands": {"count": 64}}), tmp_path, "127.0.0.1:1", "tag")
    assert environment(many, 0, 0, 0)["OMP_NUM_THREADS"] == "1"
    assert command(launch, 0, 0)[-3:] == ["dtrain.launch", "train", str(tmp_path / "job.toml")]

"""Do the launcher and its part at another site understand each other? With a store in this process in place of TCP, and no
islands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from dtrain import checkpoint, metrics
from dtrain.config import Job, parse_job
from dtrain.launch import islands, part, part_words
from dtrain.launch.cli import run_command
from dtrain.launch.elsewhere import Call, There, by_hand, by_ssh, job_sent
from dtrain.launch.islands import Launch
from dtrain.launch.part_words import Joined, Line, Order, Report
from dtrain.launch.run_folder import Choice, open_part
from dtrain.launch.status import Reader
from dtrain.metrics import ErrorNote
from tests.unit.small_run import commit, refused

EACH = {"each": [{}, {"launcher": "manual", "ranks": 2}]}
LINK = {"interface": "lo", "timeout_s": 9.0}


def job_of(**sections: object) -> Job:
    return parse_job({"islands": EACH, "link": LINK, "train": {"batch": 4}} | sections)


# ---- the command lines


def test_the_command_of_a_site_and_that_of_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRAIN_KERNELS", raising=False)
    launch = Launch(job_of(), tmp_path, "10.0.0.1:4711", "tag")
    call = Call(Path("my job.toml"), ("train.steps=5",), resume=True)
    assert by_hand(call, launch, 1) == "dtrain run 'my job.toml' train.steps=5 --island 1 --meet 10.0.0.1:4711 --resume"
    named = Launch(job_of(job={"name": "run-2"}), tmp_path, "h:1", "tag", script=("a.py", "--x"))
    own = Call(launch.run / "job.toml", resume=True)
    assert str(launch.run) + "-island1/job.toml --island 1" in by_hand(own, launch, 1), "the site has a run folder of its own"
    said = by_hand(Call(Path("j.toml"), fresh_name=True), named, 1)
    assert said == "dtrain run j.toml job.name=run-2 --island 1 --meet h:1 -- a.py --x"

    far = {"launcher": "ssh", "host": "user@far", "workdir": "/srv/my run", "python": "/opt/venv/bin/python"}
    launch = Launch(parse_job({"islands": {"each": [{}, far]}}), tmp_path, "10.0.0.1:4711", "tag")
    *ssh, line = by_ssh(Call(Path("j.toml"), fresh=True, ssh_config=Path("ssh.conf")), launch, 1)
    assert ssh == ["ssh", "-o", "BatchMode=yes", "-F", "ssh.conf", "user@far", "--"]
    part_of = "/opt/venv/bin/python -m dtrain.launch run - --island 1 --meet 10.0.0.1:4711 --fresh"
    assert line == f"cd '/srv/my run' && exec {part_of}"
    for file, there in ((f"{Path.cwd()}/mine/a.py", "./mine/a.py"), ("/else/a.py", "/else/a.py"), ("a.py", "a.py")):
        scripted = replace(launch, script=(file, "--x"))
        line = by_ssh(Call(Path("j.toml"), fresh=True), scripted, 1)[-1]
        assert line == f"cd '/srv/my run' && exec {part_of} -- {there} --x", "as the job's files are named"
    monkeypatch.setenv("DTRAIN_KERNELS", "reference")
    line = by_ssh(Call(Path("j.toml"), fresh=True), launch, 1)[-1]
    assert line == f"cd '/srv/my run' && exec env DTRAIN_KERNELS=reference {part_of}"
    like_here = Launch(parse_job({"islands": {"each": [{"launcher": "ssh", "host": "b"}]}}), tmp_path, "h:1", "tag")
    words = shlex.split(by_ssh(Call(Path("j.toml")), like_here, 0)[-1])
    assert (words[:2], words[6]) == (["cd", str(Path.cwd())], sys.executable)


def test_each_island_has_its_own_ranks_and_interface(tmp_path: Path) -> None:
    launch = Launch(job_of(islands={"each": [{"interface": "eth7"}, {"ranks": 2}]}), tmp_path, "127.0.0.1:1", "tag")
    assert ["--nproc-per-node=1" in islands.command(launch, k, 0) for k in (0, 1)] == [True, False]
    assert "--nproc-per-node=2" in islands.command(launch, 1, 0)
    assert [islands.environment(launch, k, 0, 0)["GLOO_SOCKET_IFNAME"] for k in (0, 1)] == ["eth7", "lo"]


# ---- the launcher, beside a part that the test plays


class Site:
    """What a part says, said by the test."""

    def __init__(self, store: HashStore) -> None:
        self.line, self.beat = Line(store, 1, "n"), 0
        assert part_words.join(store, 1, Joined("n", "far", "/srv/run")).nonce == "n"

    def says(self, **what: object) -> None:
        self.beat += 1
        order = self.line.ordered()
        self.line.report(Report(self.beat, **({"done": order.number if order else 0} | what)))  # pyright: ignore[reportArgumentType]


def test_what_a_part_reports_becomes_the_files_of_an_island_here(tmp_path: Path) -> None:
    store, said = HashStore(), list[str]()
    there = There(Launch(job_of(), tmp_path, "h:1", "tag"), 1, store, Call(Path("j.toml")), said.append)
    there.prepare(0, lost=True)
    assert said == ["island 1 is started at its site, by: dtrain run j.toml --island 1 --meet h:1"]
    now = there._called_at
    assert there.look(now + 3).note == "waiting for its site, 3 s of 9"
    assert not there.ready()

    site = Site(store)
    site.says()
    assert there.look(now + 4).state == "running"
    assert there.ready()
    assert said[1:] == ["island 1 has come: its files are in far:/srv/run"]
    there.start(0, 40)
    assert site.line.ordered() == Order(1, "start", 0, 40)
    assert not there.ready()
    site.says(done=0, state="failed", error=ErrorNote("bug", "of before"))
    assert there.look(now + 5).state == "running", "it speaks of before it heard the order"
    assert there.written() == set()

    status = {"state": "waiting", "step": 41, "steps": 50, "waiting_for": [0], "waited_s": 1.0, "timeout_s": 9.0}
    site.line.say_batch(1, ['{"step": 41, "island": 1, "loss": 1.0}'])
    site.line.say_batch(2, ['{"step": 42, "island": 1, "loss": 2.0}', '{"step": 43, "island": 1, "loss": 3.0}'])
    site.says(state="running", status=status, written=(40, 45), batches=2)
    look = there.look(now + 6)
    assert (look.state, look.says_state, look.note) == ("running", True, "")
    assert metrics.read_json(tmp_path / "logs" / "island1" / "status.json") == status
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [41, 42, 43]
    assert there.written() == {40, 45}
    assert there.look(now + 12).note == "nothing heard of its site, 6 s of 9"
    assert len(metrics.read(tmp_path / "metrics.jsonl")) == 3, "no report is taken twice"

    site.says(state="failed", error=ErrorNote("user", "no data"), log=("/srv/log", "Traceback", "ValueError"), batches=2)
    failed = there.look(now + 13)
    assert (failed.state, failed.kind, failed.message) == ("failed", "user", "no data")
    assert there.end_of_log() == ("far:/srv/log", ["Traceback", "ValueError"])
    there.prepare(40, lost=True)
    assert site.line.ordered() == Order(2, "set_back", 0, 40)
    assert (there.look(now + 13).state, there.ready()) == ("running", False)
    site.says(state="failed", batches=2)
    assert there.look(now + 14).state == "failed"
    assert there.ready()
    there.start(1, 40)
    assert not (tmp_path / "logs" / "island1" / "error.json").exists(), "of the earlier start"
    site.says(state="done", part={"island": 1}, batches=2)
    assert there.look(now + 15).state == "done"
    assert metrics.read_json(tmp_path / "logs" / "island1" / "part.json") == {"island": 1}
    there.say_end(0, "")
    assert site.line.ordered() == Order(4, "end")
    assert not there.has_ended()
    site.says(state="gone", batches=2)
    assert there.has_ended()


def test_a_site_is_waited_for_as_long_as_the_link_allows(tmp_path: Path) -> None:
    store = HashStore()
    there = There(Launch(job_of(), tmp_path, "h:1", "tag"), 1, store, Call(Path("j.toml")), lambda text: None)
    there.prepare(0, lost=True)
    late = there.look(there._called_at + 9.1)
    assert (late.state, late.kind, late.message) == ("failed", "resumable", "it did not come from its site within 9 s")
    site = Site(store)
    site.says(state="running")
    now = there._called_at + 9.2
    assert there.look(now).state == "running"
    silent = there.look(now + 9.1)
    assert (silent.kind, silent.message) == ("resumable", "nothing was heard of its site, far, for 9 s")
    site.says(state="gone")
    assert there.look(now + 9.2).message == "it was stopped at its site, far"


def test_why_ssh_failed_is_its_own_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = parse_job({"islands": {"each": [{}, {"launcher": "ssh", "host": "far"}]}, "link": LINK})
    (tmp_path / "job.toml").write_text("[job]\n")
    for status, kind in ((2, "user"), (255, "resumable")):
        words = f"cat > {tmp_path}/stdin; echo 'dtrain: far: no route' >&2; exit {status}"
        monkeypatch.setattr("dtrain.launch.elsewhere.by_ssh", lambda *_, words=words: ["sh", "-c", words])
        there = There(Launch(job, tmp_path, "h:1", "tag"), 1, HashStore(), Call(Path("j.toml")), lambda text: None)
        there.prepare(0, lost=True)
        (ssh,) = there.agents()
        assert ssh.wait(timeout=30) == status
        assert there.look(there._called_at + 1).state == "running", "a last word may be on its way"
        look = there.look(there._called_at + 4)
        assert (look.state, look.kind, look.message) == ("failed", kind, "far: no route")
        assert (tmp_path / "stdin").read_text() == "[job]\n"
        assert there.end_of_log() == (str(tmp_path / "logs" / "island1" / "site.log"), ["dtrain: far: no route"])
        there.hang_up()


def test_ssh_is_given_the_job_as_its_host_names_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ssh").write_text(f"#!/bin/sh\ncat > {tmp_path}/stdin\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    far = {"launcher": "ssh", "host": "far", "workdir": "/srv"}
    job = parse_job({"islands": {"each": [{}, far]}, "data": {"source": f"{tmp_path}/text.txt"}, "link": LINK})
    launch = Launch(job, tmp_path, "h:1", "tag")
    there = There(launch, 1, HashStore(), Call(Path("j.toml")), lambda text: None)
    there.prepare(0, lost=True)
    (ssh,) = there.agents()
    assert ssh.wait(timeout=30) == 0
    sent = (tmp_path / "stdin").read_text()
    assert sent == job_sent(launch, 1)
    assert parse_job(tomllib.loads(sent)).data.source == "./text.txt"
    there.hang_up()


# ---- the part, under a launcher that the test plays


@pytest.fixture
def at_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> part.Part:
    def start(launch: Launch, island: int, epoch: int, step: int) -> subprocess.Popen[bytes]:
        (tmp_path / "started").write_text(f"{island} {epoch} {step}")
        return subprocess.Popen(["true"])

    monkeypatch.setattr(islands, "start", start)
    return part.Part(Launch(job_of(), tmp_path, "h:1", "tag"), 1)


def write_step(run: Path, step: int) -> None:
    checkpoint.save_island(run, step, 1, {"model.w": torch.zeros(1)}, rank=0, num_ranks=1)


def test_a_part_goes_back_with_the_launcher_and_no_further(at_site: part.Part, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_step(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {s}, "island": 1, "loss": 0.5}}\n' for s in (10, 20, 30)))
    assert at_site.look()[1].written == (10, 20, 30)
    at_site.follow([10])
    assert checkpoint.committed(tmp_path) == [10]

    at_site.carry_out(Order(1, "set_back", 1, 20))
    lines, report = at_site.look()
    assert (report.done, report.state, report.written, lines) == (1, "idle", (10, 20), [])
    assert checkpoint.committed(tmp_path) == [10, 20], "the launcher's word counts, though it died before it said so"
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [10, 20]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "island": 1, "loss": 0.5}\n')
    lines, report = at_site.look()
    assert (len(lines), report.batches) == (1, 2)

    assert part.Part(at_site.launch, 1).look()[0] == [], "another start of the part says none of them again"

    at_site.carry_out(Order(2, "start", 1, 20))
    assert (tmp_path / "started").read_text() == "1 1 20"
    assert at_site.agent is not None
    at_site.agent.wait()
    assert at_site.look()[1].state == "done"
    at_site.follow([20])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000020"]

    (tmp_path / "started").unlink()
    at_site.carry_out(Order(2, "start", 1, 20))
    assert not (tmp_path / "started").exists(), "an order is carried out once"
    missing, earlier = "no checkpoint of island 1 at step 40", "give both --resume"
    for order, words in ((Order(3, "start", 0, 40), missing), (Order(4, "start"), earlier)):
        at_site.carry_out(order)
        report = at_site.look()[1]
        assert (report.done, report.state) == (order.number, "failed")
        assert report.error is not None
        assert (report.error.kind, words in report.error.message) == ("user", True)
    assert checkpoint.committed(tmp_path) == [20], "nothing was dropped"
    assert not (tmp_path / "started").exists()


def test_only_one_part_joins_for_an_island_and_with_the_same_job() -> None:
    store = HashStore()
    part_words.say_job(store, job_of())
    as_it_likes = job_of(job={"dir": "/srv", "name": "x"}, data={"source": "/else"}, islands=EACH | {"threads": 2})
    part_words.check_job(store, as_it_likes, 1)
    for job, island, words in (
        (job_of(), 0, "--island 0: the launcher starts that island itself; of those it waits for others: 1"),
        (job_of(train={"batch": 4, "lr": 0.5}), 1, "train.lr = 0.5 differs from the launcher's 0.006; give both the same"),
        (job_of(islands={"each": [{}, {"ranks": 4}]}), 1, "islands.each.1.ranks = 4 differs from the launcher's 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            part_words.check_job(store, job, island)
    first, second = Joined("a", "host", "/run"), Joined("b", "other", "/run")
    assert part_words.join(store, 1, first) == part_words.join(store, 1, second) == first
    store.set("part/1/b/report", '{"beat": "x"}')
    with pytest.raises(ValueError, match="the meeting point holds what no dtrain of this version says"):
        Line(store, 1, "b").reported()


# ---- the command line


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(
        '[job]\nname = "small"\n[[islands.each]]\n[[islands.each]]\nlauncher = "ssh"\n[link]\ninterface = "lo"\n'
    )


@pytest.mark.usefixtures("in_a_folder")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--island", "1"], "--island and --meet go together"),
        (["--meet", "h:1"], "--island and --meet go together"),
        (["--island", "1", "--meet", "nowhere"], "--meet 'nowhere' is no address; write HOST:PORT"),
        (["--island", "2", "--meet", "h:1"], "--island 2 of 2 islands; the last is island 1"),
        (["--island", "1", "--meet", "h:1", "--fresh-name"], "--fresh-name is the launcher's to say"),
        (["--island", "1", "--meet", "h:1", "--hosts", "a"], "--hosts is the launcher's to say"),
        (["--hosts", "a,b"], "--hosts names 2 hosts for 1 tables [[islands.each]]"),
        (["islands.each=[{}]", "--hosts", "a,b"], "--hosts names 2 hosts for 0 tables"),
        (["--ssh-config", "gone"], "--ssh-config gone is no file"),
        ([], 'islands.each.1.launcher = "ssh" without a host'),
        (["link.interface=", "islands.each.1.host=b"], "island 1 is not started here, and the meeting point listens on loop"),
    ],
)
def test_what_cannot_be_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "job.toml", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("in_a_folder")
def test_profile_runs_no_island_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["profile", "job.toml", "islands.each.1.host=b"]) == 2
    assert 'island 1 runs elsewhere, and dtrain profile looks at islands here' in capsys.readouterr().err


@pytest.mark.usefixtures("in_a_folder")
def test_a_wrong_address_is_one_line_after_the_links_limit(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "job.toml", "link.timeout_s=0.3", "--island", "1", "--meet", "127.0.0.1:1"]
    assert run_command(words) == 75, "as where a peer is lost"
    err = capsys.readouterr().err
    assert err.startswith("dtrain: no launcher at 127.0.0.1:1 within 0.3 s (Connection refused); is it running, and is this the ")
    assert err.count("\n") == 1
    how = Reader(Path("runs/small-island1")).read().how
    assert how == f"ended with exit status 75: {err.removeprefix('dtrain: ').rstrip()}", "dtrain status tells it too"


@pytest.mark.usefixtures("in_a_folder")
def test_hosts_and_restarts_are_kept_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Job] = []

    def look(job: Job, run: Path, **options: object) -> object:
        from dtrain.launch.local import Outcome

        found.append(job)
        return Outcome(75, "looked")

    monkeypatch.setattr("dtrain.launch.local.run_local", look)
    words = ["run", "job.toml", "--max-restarts", "7", "--hosts", "b"]
    assert run_command(words) == 75
    Path("plain.toml").write_text('[job]\nname = "plain"\n[islands]\ncount = 3\n[link]\ninterface = "lo"\n')
    assert run_command(["run", "plain.toml", "--hosts", "a,b,c"]) == 75
    assert run_command(["run", "job.toml", "--resume", "islands.each.1.host=d"]) == 75, "an island may move"
    first, plain, again = found
    assert (first.islands.max_restarts, first.island(1).host, first.elsewhere) == (7, "b", [1])
    assert [plain.island(k).host for k in range(3)] == ["a", "b", "c"]
    assert (again.islands.max_restarts, again.island(1).host) == (7, "d")
    capsys.readouterr()
    said = refused(capsys, "run", "job.toml", "--resume", "islands.each.1.ranks=2")
    assert "islands.each.1.ranks = 2 differs from the run's 1" in said
    commit(Path("runs/small"), 20, 2)
    (Path("runs/small") / "logs" / "island0").mkdir(parents=True)
    more = ["islands.count=3", "islands.each=[{},{},{}]"]
    said = refused(capsys, "run", "runs/small/job.toml", "--resume", *more)
    assert "islands.count = 3 differs from the run's 2, whose checkpoints lie on several hosts and cannot be merged here" in said


@pytest.mark.usefixtures("in_a_folder")
def test_the_folder_of_a_part_is_its_own_and_not_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    with open_part(Path("job.toml"), ("islands.each.1.host=b",), Choice(), 1) as opened:
        assert (opened.run, opened.job.job.name) == (Path("runs/small-island1"), "small-island1")
        kept = opened.run / "kept"
        kept.touch()
        (opened.run / "logs" / "island1").mkdir(parents=True)
        with pytest.raises(ValueError, match="in use by another dtrain"), open_part(Path("job.toml"), (), Choice(resume=True), 1):
            pass
    words = ["run", "job.toml", "--island", "1", "--meet", "127.0.0.1:1"]
    assert "runs/small-island1 holds a run already" in refused(capsys, *words)
    for path in (Path("job.toml"), Path("runs/small-island1/job.toml")):
        with open_part(path, (), Choice(resume=True), 1) as opened:
            assert (opened.run, opened.job.job.name, kept.exists()) == (Path("runs/small-island1"), "small-island1", True)
            assert (opened.run / "logs").exists()
    with open_part(Path("job.toml"), (), Choice(fresh=True), 1) as opened:
        assert not (opened.run / "logs").exists()

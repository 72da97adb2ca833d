"""Does the script of ``dtrain slurm`` start every rank where it should, go on with a run, and end as the run does?"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtrain.config import load_job
from dtrain.launch import outside, slurm
from dtrain.launch.cli import run_command
from dtrain.launch.slurm import Asked, Where, layout
from tests.unit.small_run import refused, write_job_file

STUB = Path(__file__).with_name("slurm_stub.py")
ODD = "it's a \"folder\" of $HOME"  # each of these means something to a shell
IB = "link.interface=ib0"
RANKS = ("islands.ranks=4", "train.batch=4")
FAR = 'islands.each=[{launcher = "ssh", host = "gate", ranks = 2}, {}, {launcher = "manual"}, {launcher = "slurm", ranks = 2}]'
SCRIPT = ("--", "train.py", "--name", "it's $mine")


@pytest.fixture(autouse=True)
def in_a_folder_of_an_odd_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ODD).mkdir()
    monkeypatch.chdir(tmp_path / ODD)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SUBMITTED", str(tmp_path / "submitted"))
    write_job_file()
    for name in (SCRIPT[1], "it's mine"):
        Path(name).touch()


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder for PATH: the stub under all its names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "ip", "dtrain", "python"):
        (folder / name).write_text(f"#!{sys.executable} -IS\n" + STUB.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def written(*words: str) -> str:
    out = Path("job.sbatch")
    at = words.index("--") if "--" in words else len(words)
    assert run_command(["slurm", "job.toml", *words[:at], "--output", str(out), "--force", *words[at:]]) == 0
    return out.read_text(encoding="utf-8")


JOBS = {
    "two islands": (IB,),
    "four islands": (IB, "islands.count=4", "--time", "2-12:00:00", "--account", "phys-1", "--gpus-per-node", "1"),
    "an override with blanks": (IB, "job.dir=it's here", "sync.recipe=fedavg"),
    "one partition": (IB, "--partition", "long"),
    "partitions": (IB, *("--partition", "a"), *("--partition", "b")),
    "several nodes": (IB, *RANKS, "--gpus-per-node", "2"),
    "several nodes in partitions": (IB, *RANKS, "--nodes-per-island", "4", *("--partition", "a"), *("--partition", "b,c")),
    "one of them": (IB, "--island", "1", "--meet", "login1:29400"),
    "one of them on several nodes": (IB, *RANKS, "--island", "1", "--meet", "login1:29400", "--nodes-per-island", "2"),
    "one in all": ("islands.count=1", "sync.recipe=local", "--setup", "module load 'cuda/12.4'"),
    "a script": (IB, *SCRIPT),
    "a script on one of them": (IB, "--island", "1", "--meet", "login1:29400", *SCRIPT),
    "beside others": (IB, FAR, "islands.count=4", *("--partition", "a"), *("--partition", "b"), *("--ssh-config", "it's mine")),
}


@pytest.mark.parametrize("words", JOBS.values(), ids=list(JOBS))
def test_bash_and_shellcheck_have_nothing_to_say(words: Sequence[str]) -> None:
    written(*words)
    # SC2016 is about $ between single quotes, as in the folder's name, where it stands for itself.
    for checker in (["bash", "-n"], ["shellcheck", "--shell=bash", "--exclude=SC2016"]):
        done = subprocess.run([*checker, "job.sbatch"], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def options(text: str) -> list[list[str]]:
    """Of each component of the job, as sbatch reads them: up to the first line that is no comment."""
    head = re.match(r"(#.*\n|\n)*", text)
    assert head is not None
    assert "#SBATCH" not in text[head.end() :], "sbatch would not see it"
    words = [line.removeprefix("#SBATCH ") for line in head[0].splitlines() if line.startswith("#SBATCH ")]
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "hetjob":
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def test_islands_of_one_partition_are_one_allocation_and_of_several_its_components() -> None:
    (one,) = options(written(*JOBS["four islands"]))
    for word in ("--job-name=small", "--requeue", "--signal=B:USR1@120", "--nodes=4", "--ntasks-per-node=1", "--exclusive"):
        assert word in one
    assert {"--mem=0", "--gpus-per-node=1", "--time=2-12:00:00", "--account=phys-1"} <= set(one)
    first, second = options(written(*JOBS["several nodes in partitions"]))
    assert {"--partition=a", "--nodes=4"} <= set(first)
    assert {"--partition=b,c", "--nodes=4", "--exclusive", "--mem=0"} <= set(second)
    assert "--requeue" not in second
    assert len(options(written(IB, *("--partition", "a"), *("--partition", "a")))) == 1


def allocation(*, apart: bool, nodes: Sequence[Sequence[str]]) -> dict[str, str]:
    groups = {f"SLURM_JOB_NODELIST_HET_GROUP_{k}": ",".join(group) for k, group in enumerate(nodes)}
    whole = {"SLURM_JOB_NODELIST": ",".join(node for group in nodes for node in group)}
    return {"SLURM_JOB_ID": "40007", **(groups if apart else whole)}


def start(text: str, stubs: Path, tasks: int, said: dict[str, str]) -> subprocess.Popen[str]:
    """Slurm's side: the script begins somewhere else, with the job's environment."""
    Path("job.sbatch").write_text(text, encoding="utf-8")
    ours = {"RUN": str(Path("runs/small").absolute()), "TASKS": str(tasks), "PATH": f"{stubs}:{os.environ['PATH']}"}
    command = ["bash", str(Path("job.sbatch").absolute())]
    return subprocess.Popen(command, cwd="/", env={**os.environ, **ours, **said}, stdout=subprocess.PIPE, text=True)


def ended(text: str, stubs: Path, tasks: int, said: dict[str, str]) -> int:
    with start(text, stubs, tasks, said) as script:
        script.communicate(timeout=60)
    return script.returncode


def calls(*names: str) -> list[dict[str, Any]]:
    path = Path(os.environ["CALLS"])
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [call for call in found if call["name"] in names]


def at_stubs(stubs: Path) -> tuple[str, str]:
    return "--setup", f'export PATH={stubs}:"$PATH"'


def test_an_island_of_one_node_is_a_dtrain_run_and_joins_the_launcher(stubs: Path) -> None:
    text = written(IB, "sync.every=10", "islands.threads=3", *at_stubs(stubs))
    assert ended(text, stubs, 2, allocation(apart=False, nodes=[["n1"], ["n2"]])) == 0
    launcher, *joined = sorted(calls("dtrain"), key=lambda call: "--island" in call["arguments"])
    words = ["run", str(Path("runs/small-slurm/40007/job.toml").absolute()), IB, "sync.every=10", "islands.threads=3"]
    words += ['islands.each=[{launcher = "slurm"}, {launcher = "slurm"}]', "link.advertise=10.0.0.7", "link.port=20007"]
    assert launcher["arguments"] == words
    assert launcher["cwd"] == os.getcwd()
    assert "SLURM_PROCID" not in launcher["environment"], "it is no step of its own"
    found = {call["environment"]["SLURMD_NODENAME"]: call for call in joined}
    for k, node in enumerate(("n1", "n2")):
        assert found[node]["arguments"] == [*words, "--island", str(k), "--meet", "10.0.0.7:20007"]
        assert found[node]["environment"]["OMP_NUM_THREADS"] == "3"
        assert Path(f"runs/small-slurm/40007/island{k}-{node}.log").is_file()
    assert all("--export=ALL" in call["arguments"] for call in calls("srun"))
    assert [call["arguments"][0] for call in calls("scontrol")] == ["show"], "nothing is queued again"


def test_what_is_trained_is_what_was_submitted(stubs: Path) -> None:
    """An edit of the job file while the job waits in the queue is another experiment's."""
    wrote = Path("job.toml").read_text() + "# $(false) `false` \\\n# END_OF_JOB\n"
    Path("job.toml").write_text(wrote)
    text = written(IB, *at_stubs(stubs))
    Path("job.toml").write_text("[train]\nsteps = 77\n")
    assert ended(text, stubs, 2, allocation(apart=False, nodes=[["n1"], ["n2"]])) == 0
    copies = {call["arguments"][1] for call in calls("dtrain")}
    assert len(copies) == 1
    assert Path(copies.pop()).read_text() == wrote


def test_a_line_of_the_job_file_is_not_taken_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.loggers.require", lambda *_, **__: None)
    Path("job.toml").write_text(f'{Path("job.toml").read_text()}[log]\nwandb = """\nEND_OF_JOB\n"""\n')
    text = written(IB)
    copied = text[text.index("[job]") : text.index("\nEND_OF_JOB1\n") + 1]
    assert tomllib.loads(copied)["log"]["wandb"] == "END_OF_JOB\n"


def test_the_same_script_goes_on_with_the_run(stubs: Path) -> None:
    text, place = written(IB, *at_stubs(stubs)), allocation(apart=False, nodes=[["n1"], ["n2"]])
    assert ended(text, stubs, 2, place) == 0
    Path(os.environ["CALLS"]).unlink()
    assert ended(text, stubs, 2, place) == 0
    assert [call["arguments"][-1] for call in calls("dtrain")] == ["--resume"] * 3


def test_every_rank_runs_somebodys_script(stubs: Path) -> None:
    """With its arguments, after all that is dtrain's."""
    text = written(IB, *at_stubs(stubs), *SCRIPT)
    assert "sync.recipe" not in text, "the script may say that"
    assert shlex.join(["--setup", at_stubs(stubs)[1], *SCRIPT]) in text, "what wrote it"
    place = allocation(apart=False, nodes=[["n1"], ["n2"]])
    assert ended(text, stubs, 2, place) == 0
    assert ended(text, stubs, 2, place) == 0
    found = [call["arguments"] for call in calls("dtrain")]
    assert [words[-len(SCRIPT) :] for words in found] == [list(SCRIPT)] * 6
    assert sum(words[-len(SCRIPT) - 1] == "--resume" for words in found) == 3


@pytest.mark.parametrize("apart", [False, True])
def test_islands_of_other_launchers_stay_theirs(stubs: Path, apart: bool) -> None:
    """Slurm has nodes for two of four; the launcher starts the first over ssh, and says what the third's site types."""
    partitions = ("--partition", "a", "--partition", "b") if apart else ()
    text = written(IB, FAR, "islands.count=4", *partitions, "--ssh-config", "it's mine", *at_stubs(stubs))
    nodes = [word for part in options(text) for word in part if word.startswith("--nodes=")]
    assert nodes == (["--nodes=1"] * 2 if apart else ["--nodes=2"])
    assert ended(text, stubs, 2, allocation(apart=apart, nodes=[["n1"], ["n2"]])) == 0
    launcher, *joined = sorted(calls("dtrain"), key=lambda call: "--island" in call["arguments"])
    each = launcher["arguments"][5]  # after the file and what was typed
    assert each.startswith('islands.each=[{ranks = 2, launcher = "ssh", host = "gate"}, {launcher = "slurm"}, {launcher = "man')
    assert load_job(Path("job.toml"), ("islands.count=4", each)).elsewhere == [0, 1, 2, 3], "none is the launcher's own child"
    assert launcher["arguments"][-2:] == ["--ssh-config", "it's mine"]
    at = {call["environment"]["SLURMD_NODENAME"]: call["arguments"] for call in joined}
    assert [at[node][at[node].index("--island") + 1] for node in ("n1", "n2")] == ["1", "3"]
    assert "--ssh-config" not in (*at["n1"], *at["n2"])
    lines = text.splitlines()
    assert "# island 0: over ssh on gate" in lines
    assert "# island 2: at its site, by what the launcher prints into the log" in lines


def torchrun_of(call: dict[str, Any]) -> Any:
    """What torch's own parser makes of it, with the end that ``islands.command`` gives it."""
    from torch.distributed.run import get_args_parser

    assert call["arguments"][:2] == ["-m", "torch.distributed.run"]
    return get_args_parser().parse_args([*call["arguments"][2:], "-m", "dtrain.launch"])


@pytest.mark.parametrize("apart", [False, True])
def test_an_island_of_several_nodes_joins_and_has_a_torchrun_on_each(stubs: Path, apart: bool) -> None:
    partitions = ("--partition", "a", "--partition", "b") if apart else ()
    text = written(IB, *RANKS, "--gpus-per-node", "2", *partitions, *at_stubs(stubs))
    nodes = [["n1", "n2"], ["n3", "n4"]]
    assert ended(text, stubs, 4, allocation(apart=apart, nodes=nodes)) == 0
    joined = sorted(call["arguments"][-4:] for call in calls("dtrain") if "--island" in call["arguments"])
    assert joined == [["--island", "0", "--meet", "10.0.0.7:20007"], ["--island", "1", "--meet", "10.0.0.7:20007"]]
    found = {call["environment"]["SLURMD_NODENAME"]: call for call in calls("python")}
    assert set(found) == {"n1", "n2", "n3", "n4"}
    for k, island in enumerate(nodes):
        for rank, node in enumerate(island):
            torchrun = torchrun_of(found[node])
            assert "DTRAIN_PARENT" not in found[node]["environment"], "its ranks have another parent"
            assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.node_rank) == ("2", "2", rank)
            assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("static", f"{island[0]}:20008")
            assert torchrun.rdzv_id == "epoch0"
            assert Path(f"runs/small-slurm/40007/island{k}-{node}.log").is_file()
    groups = [word for call in calls("srun") for word in call["arguments"] if word.startswith("--het-group")]
    assert sorted(groups) == (["--het-group=0", "--het-group=1"] if apart else [])
    assert all("--gpus-per-node=2" in call["arguments"] for call in calls("srun"))


def test_a_torchrun_is_started_in_whatever_locale(stubs: Path) -> None:
    """Where bash writes letters that its locale lacks in a way of its own, which Python does not read."""
    text = written(IB, *RANKS, "--gpus-per-node", "2", "job.dir=né", *at_stubs(stubs))
    said = {"LC_ALL": "C", "PYTHONUTF8": "1"}
    assert ended(text, stubs, 4, {**allocation(apart=False, nodes=[["n1", "n2"], ["n3", "n4"]]), **said}) == 0
    logs = sorted(word for call in calls("srun") for word in call["arguments"] if word.startswith("--output="))
    assert logs == [f"--output={Path('né/small-slurm/40007').absolute()}/island{k}-%N.log" for k in (0, 1)]


def test_one_island_joins_a_launcher_elsewhere(stubs: Path) -> None:
    text = written(IB, "--island", "1", "--meet", "login1:29400", *at_stubs(stubs))
    assert ended(text, stubs, 1, allocation(apart=False, nodes=[["n9"]])) == 0
    (joined,) = calls("dtrain")
    copy = str(Path("runs/small-slurm/40007/job.toml").absolute())
    assert joined["arguments"] == ["run", copy, IB, "--island", "1", "--meet", "login1:29400"]
    assert "--job-name=small-island1" in options(text)[0]


@pytest.mark.parametrize(
    ("words", "head"),
    [
        ((IB,), ["read -r _ _ _ head _ < <(ip -4 -oneline address show dev ib0)", "head=${head%/*}", "port=$((20000 +"]),
        ((IB, "link.port=29401", "link.advertise=gate"), ["head=gate", "port=29401"]),
        ((IB, "link.port=29401", "--meet", "login9:29402"), ["head=login9", "port=29402"]),
        ((IB, "link.port=29401", "link.advertise=$(gate)"), ["head='$(gate)'", "port=29401"]),
        (("islands.count=1", "sync.recipe=local"), ["head=127.0.0.1", "port=$((20000 +"]),
    ],
)
def test_islands_meet_where_the_launcher_listens(words: Sequence[str], head: list[str]) -> None:
    lines = written(*words).splitlines()
    (at,) = [k for k, line in enumerate(lines) if line == "meet=$head:$port"]
    for line, wanted in zip(lines[at - len(head) : at], head, strict=True):
        assert line.startswith(wanted)
    assert '    "link.advertise=$head"' in lines[at:]


def signalled(text: str, stubs: Path, number: signal.Signals, said: dict[str, str]) -> tuple[int, str]:
    """Its exit status, and what it prints, where Slurm sends it a signal while the run goes on."""
    place = allocation(apart=False, nodes=[["n1"], ["n2"]])
    with start(text, stubs, 2, {**place, **said, "HANGS": "1"}) as script:
        limit = time.monotonic() + 60
        while not Path("runs/small/hangs").exists():
            assert time.monotonic() < limit
            time.sleep(0.02)
        script.send_signal(number)
        printed, _ = script.communicate(timeout=60)
    return script.returncode, printed


@pytest.mark.parametrize(
    ("number", "said", "status", "queued"),
    [
        (signal.SIGUSR1, {"COMMITS": "1"}, 0, ["40007"]),
        (signal.SIGUSR1, {}, 143, []),  # a start that gets to no checkpoint would be one of many
        (signal.SIGTERM, {"COMMITS": "1"}, 143, []),
    ],
)
def test_a_signal_ends_the_run_and_the_one_before_the_limit_queues_it_again(
    stubs: Path, number: signal.Signals, said: dict[str, str], status: int, queued: list[str]
) -> None:
    assert signalled(written(IB, *at_stubs(stubs)), stubs, number, said)[0] == status
    assert [call["arguments"][1] for call in calls("scontrol") if call["arguments"][0] == "requeue"] == queued


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("words", [SCRIPT, ("train.checkpoint_every=0",)], ids=["script", "no checkpoints"])
def test_what_would_begin_anew_is_never_queued_again(stubs: Path, words: tuple[str, ...], number: signal.Signals) -> None:
    """There is no checkpoint, nor does the text speak of one."""
    text = written(IB, *at_stubs(stubs), *words)
    assert "--no-requeue" in options(text)[0]
    assert "--requeue" not in options(text)[0]
    about = [line for line in text.splitlines() if "checkpoint" in line and "checkpoint_every=0" not in line]
    assert about
    assert all("dtrain has no checkpoint of " in line for line in about)
    status, printed = signalled(text, stubs, number, {})
    assert status == 143
    assert ("stopped before the time limit, and not queued again" in printed) == (number == signal.SIGUSR1)
    assert [call["arguments"][0] for call in calls("scontrol")] == ["show"]


@pytest.mark.parametrize(
    ("said", "status", "queued"),
    [
        ({"ENDS": "75", "COMMITS": "1"}, 0, 1),
        ({"ENDS": "75"}, 75, 0),  # no checkpoint is newer than its start: it would fail so again
        ({"ENDS": "2", "COMMITS": "1"}, 2, 0),  # a person has to change something
        ({"ISLANDS_END": "9", "HANGS": "1"}, 9, 0),  # the launcher does not see it, and is stopped
        ({"ISLANDS_END": "9", "HANGS": "1", "COMMITS": "1"}, 0, 1),
        ({"ISLANDS_END": "9", "ENDS": "2"}, 2, 0),  # it does, and its word counts
        ({"ISLANDS_END": "143", "HANGS": "1", "PREEMPTED": "2026-11-27T12:00:00"}, 0, 1),  # for another job, whose turn it is
    ],
)
def test_a_failure_is_tried_again_where_the_run_got_on(stubs: Path, said: dict[str, str], status: int, queued: int) -> None:
    text = written(IB, *at_stubs(stubs)).replace("gone 15", "gone 1")
    place = allocation(apart=False, nodes=[["n1"], ["n2"]])
    assert ended(text, stubs, 2, {**place, **said}) == status
    assert sum(call["arguments"] == ["requeue", "40007"] for call in calls("scontrol")) == queued


def test_it_is_submitted_and_the_number_printed(
    stubs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{stubs}:{os.environ['PATH']}")
    assert run_command(["slurm", "job.toml", IB, "--submit"]) == 0
    assert capsys.readouterr().out == "4711\n"
    assert run_command(["slurm", "job.toml", IB]) == 0
    assert capsys.readouterr().out.replace(" --submit", "") == Path(os.environ["SUBMITTED"]).read_text()
    assert [call["arguments"] for call in calls("sbatch")] == [["--parsable"]]
    (stubs / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    assert refused(capsys, "slurm", "job.toml", IB, "--submit") == "sbatch refused the script: sbatch: error: Invalid account"


def test_a_file_is_never_overwritten_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.sh").write_text("mine")
    assert "overwrite it with --force" in refused(capsys, "slurm", "job.toml", IB, "--output", "mine.sh")
    assert run_command(["slurm", "job.toml", IB, "--output", "mine.sh", "--force"]) == 0
    assert "written: mine.sh; submit it with: sbatch mine.sh" in capsys.readouterr().out
    assert Path("mine.sh").read_text().startswith("#!/usr/bin/env bash\n")
    assert sorted(path.name for path in Path().iterdir()) == ["it's mine", "job.toml", "mine.sh", "train.py"], "nothing else"


def test_islands_of_unlike_size_have_as_many_nodes_as_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    job, tables = load_job(Path("job.toml"), (IB,)), [{"ranks": 16, "interface": "eth1"}, {}]
    wanted = [Where(0, 2, 8, "eth1", None), Where(1, 1, 1, "ib0", None)]
    assert layout(job, tables, Asked(gpus_per_node=8)) == wanted
    for module in (slurm, outside):
        monkeypatch.setattr(module, "tables_of", lambda job: tables)
    text = written(IB, "train.batch=16", "--gpus-per-node", "8")
    assert 'torchruns 0 "$(nodes 0 1)" 2 8 --nodelist="$(nodes 0 2)"\njoin 1 --nodelist="$(nodes 2 1)"\n' in text
    assert """'islands.each=[{ranks = 16, interface = "eth1", launcher = "slurm"}, {launcher = "slurm"}]'""" in text

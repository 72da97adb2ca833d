"""Does a lab work for somebody who is not root? In a user namespace where we are another user, who may make some of her own."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from dtrain.launch.cli import run_command
from tests.dist.job import QUICKSTART, ROOT, SMALL

AS_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
NESTED = (*AS_USER, "unshare", "--user", "--map-root-user", "--net", "--mount", "true")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def user() -> None:
    """Skipped where the kernel gives no namespaces to users, which is what there is to be tested."""
    tools = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if tools or subprocess.run(NESTED, capture_output=True, check=False).returncode:
        pytest.skip(f"needs {', '.join(tools) or 'a kernel that gives ordinary users namespaces'}")


def lab_of_user(*lines: list[str], timeout_s: float = 100) -> list[tuple[int, str]]:
    """Exit status and output of each ``dtrain lab`` command line, each at a login of its own, when the last
    one's folder is gone. All in one shell: its user namespace is what the user is."""
    commands = [shlex.join([sys.executable, "-m", "dtrain.launch", "lab", *line]) for line in lines]
    script = "".join(f"XDG_RUNTIME_DIR=/gone/{login} {command}; echo @$?\n" for login, command in enumerate(commands))
    try:
        done = subprocess.run(
            [*AS_USER, "sh", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=timeout_s, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        for keeper in Path(os.environ["XDG_STATE_HOME"]).glob("*.keeper"):
            with suppress(ProcessLookupError):
                os.kill(int(keeper.read_text().split()[0]), signal.SIGKILL)
    parts = re.split(r"@(\d+)\n", done.stdout)
    return [(int(status), said) for said, status in zip(parts[0::2], parts[1::2], strict=False)]


@pytest.mark.usefixtures("user")
def test_a_user_has_a_lab_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    links = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout
    wrong, none, up, status, down = lab_of_user(
        ["up", "--islands", "1", "--rate", "1mbit"],
        ["status"],
        ["up", "--islands", "2", "--rate", "10mbit"],
        ["status"],
        ["down"],
    )
    assert wrong == (2, "dtrain: --islands 1: a lab joins 2 to 250\n")
    assert none == (2, "dtrain: no lab is up; make one: dtrain lab up --islands 2 --rate 100mbit\n"), "nothing half-made"
    assert (up[0], up[1].partition(";")[0]) == (0, "2 islands, 10 Mbit/s each way")
    shown = [line.split()[:3] for line in status[1].splitlines()[2:]]
    assert shown == [[str(i), f"dtrain-lab-{i}", "10mbit"] for i in (0, 1)]
    assert down == (0, "2 islands removed\n")
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout == links


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("user")
def test_a_user_runs_a_job_over_her_lab(tmp_path: Path) -> None:
    job = (*SMALL, "train.steps=20", "train.batch=4", "sync.every=10", "sync.delay=2", "train.checkpoint_every=0")
    _, (status, said), down = lab_of_user(
        ["up", "--islands", "2", "--rate", "10mbit"],
        ["run", str(QUICKSTART), f"job.dir={tmp_path}", *job],
        ["down"],
        timeout_s=350,
    )
    assert status == 0, said
    assert [line.split()[0] for line in said.splitlines()[-2:]] == ["0", "1"]
    assert (tmp_path / "quickstart" / "model.safetensors").exists()
    assert down == (0, "2 islands removed\n")


def test_where_the_kernel_refuses_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, script in (
        ("unshare", "echo 'unshare: unshare failed: Operation not permitted' >&2; exit 1"),
        *((tool, "exit 1") for tool in ("ip", "tc", "nsenter")),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    up = ["lab", "up", "--islands", "2", "--rate", "1mbit"]
    why = "unshare: unshare failed: Operation not permitted"
    refused = f"a lab needs root here, as this kernel gives other users no namespaces ({why})"
    none = "no lab is up; make one: dtrain lab up --islands 2 --rate 100mbit"
    for words, message in ((up, f"{refused}; use sudo"), (["lab", "status"], none)):
        assert run_command(words) == 2
        assert capsys.readouterr().err == f"dtrain: {message}\n"
    assert run_command(["lab", "down"]) == 0
    assert capsys.readouterr().out == "no lab was up\n"
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "unshare" else tool)
    assert run_command(up) == 2
    assert capsys.readouterr().err == "dtrain: a lab without root needs unshare, which this machine lacks: install util-linux\n"

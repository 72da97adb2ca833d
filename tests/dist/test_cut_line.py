"""What happens when the line between two islands is cut for half a minute? They wait, visibly, and go on when it
heals.

The job runs in a network namespace of its own, and the packets of the islands' connections (not the launcher's, nor
torchrun's) are dropped there. Needs root, ip, ss and iptables. """

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.job import SMALL, assert_same_weights, logs, run, started, steps_written, until
from tests.dist.test_interrupted import processes_of_island

CUT_S = 30
JOB = (*SMALL, "train.steps=400", "train.checkpoint_every=0", "sync.every=10", "sync.delay=5", "train.batch=4")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[str]:
    tools = [tool for tool in ("ip", "ss", "iptables") if shutil.which(tool) is None]
    assert not tools, f"needs {', '.join(tools)}: apt-get install iproute2 iptables"
    assert os.geteuid() == 0, "needs root to make a network namespace"
    name = f"dtrain-cut-{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        ip("netns", "del", name)


def link_ports(namespace: str, launcher: int) -> set[tuple[int, int]]:
    """Both ends' ports of every connection between a process of island 0 and one of island 1."""
    owner: dict[tuple[int, int], int] = {}
    islands = {pid: island for island in (0, 1) for pid in processes_of_island(launcher, island)}
    for line in ip("netns", "exec", namespace, "ss", "-Htnp", "state", "established").splitlines():
        ends = re.findall(r":(\d+)\s", line)
        pid = re.search(r"pid=(\d+)", line)
        if pid and int(pid[1]) in islands:
            owner[int(ends[0]), int(ends[1])] = islands[int(pid[1])]
    return {(here, there) for (here, there), island in owner.items() if owner.get((there, here)) == 1 - island}


def longest_wait_s(output: Path) -> int:
    return max((int(s) for s in re.findall(r"waiting for island \d+, (\d+) s", output.read_text())), default=0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_line_that_is_cut_for_half_a_minute_costs_nothing_but_time(tmp_path: Path, namespace: str) -> None:
    calm = run(tmp_path, "calm", *JOB)
    rules = ("netns", "exec", namespace, "iptables")
    with started(tmp_path, "cut", *JOB, prefix=("ip", "netns", "exec", namespace)) as process:
        until(lambda: steps_written(tmp_path / "cut") >= 60, "60 lines of metrics")
        ports = link_ports(namespace, process.pid)
        assert ports
        for here, there in ports:
            ip(*rules, "-A", "INPUT", "-p", "tcp", "--sport", str(here), "--dport", str(there), "-j", "DROP")
        until(lambda: longest_wait_s(tmp_path / "cut.out") >= CUT_S, f"a wait of {CUT_S} s to be shown")
        before = steps_written(tmp_path / "cut")
        assert before < 800, "the islands went on while the line was cut"
        ip(*rules, "-F")
        process.wait(timeout=180)
    assert process.returncode == 0, (tmp_path / "cut.out").read_text() + logs(tmp_path / "cut")
    assert_same_weights(calm, tmp_path / "cut")

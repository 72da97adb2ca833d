"""What do tests have instead of a cluster? A Slurm of one machine, whose jobs are real: each node is an address of loopback."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.dist.job import ROOT, alive, until

SBATCH = """#!/usr/bin/env bash
# The job begins at once, elsewhere, with the environment of who submits it; what it ends with is kept.
[[ $* == --parsable ]] || exit 1
cat >@folder/job.sbatch
export SLURM_JOB_ID=@job SLURM_JOB_NODELIST=@nodes
(
    cd / && bash @folder/job.sbatch
    echo "$?" >@folder/status.new && mv @folder/status.new @folder/status
) >>@folder/job.log 2>&1 </dev/null &
echo @job
"""

SRUN = """#!/usr/bin/env bash
# The command once a node, with what Slurm says to a task. Where one fails the others are ended, as --kill-on-bad-exit has it.
while [[ $1 == --* ]]; do
    case $1 in
        --nodelist=*) IFS=, read -ra nodes <<<"${1#*=}" ;;
        --nodes=*) count=${1#*=} ;;
        --output=*) output=${1#*=} ;;
    esac
    shift
done
if ((${#nodes[@]} != count)); then
    echo "srun: error: $count nodes of ${nodes[*]}" >&2
    exit 1
fi
pids=()
trap 'kill "${pids[@]}" 2>/dev/null' TERM
for k in "${!nodes[@]}"; do
    SLURM_NODEID=$k SLURM_PROCID=$k SLURM_LOCALID=0 SLURM_NTASKS=$count SLURMD_NODENAME=${nodes[k]} \\
        "$@" >>"${output//%N/${nodes[k]}}" 2>&1 </dev/null &
    pids+=("$!")
done
status=0
for _ in "${pids[@]}"; do
    wait -n || { status=$?; kill "${pids[@]}" 2>/dev/null; }
done
exit "$status"
"""

SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) tr , '\\n' <<<"$3" ;;
    *) echo "$*" >>@folder/scontrol.log ;;
esac
"""

PYTHON = """#!/bin/sh
PYTHONPATH=@root OF_TEST=@folder exec @python @words"$@"
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    folder: Path

    @property
    def setup(self) -> str:
        """The line of the script by which its words are these."""
        return f'export PATH={self.folder / "bin"}:"$PATH"'

    @property
    def python(self) -> Path:
        """An interpreter that finds dtrain here, however it is started."""
        return self.folder / "bin" / "python"

    @property
    def script(self) -> Path:
        """As it was submitted."""
        return self.folder / "job.sbatch"

    def ended(self, timeout_s: float) -> int:
        """Waits for the job; its exit status."""
        until((self.folder / "status").exists, "the job's end", timeout_s, pause_s=0.05)
        return int((self.folder / "status").read_text())

    def said(self) -> str:
        logs = [self.folder / "job.log", *sorted(self.folder.parent.rglob("*-slurm/**/*.log"))]
        return "\n".join(f"--- {log}\n{log.read_text(errors='replace')[-4000:]}" for log in logs if log.exists())

    def check_all_ended(self, timeout_s: float = 20) -> None:
        """No process of the test is left but for its sshd, once the job's own shell is gone."""
        until(lambda: not _of_test(self.folder.parent), "the end of all that the job started", timeout_s, pause_s=0.05)


@contextmanager
def running_slurm(folder: Path, *nodes: str) -> Iterator[Slurm]:
    """For one job, on these nodes. Whatever happens, nothing of the test whose folder it is survives the block."""
    slurm = Slurm(folder / "slurm")
    (slurm.folder / "bin").mkdir(parents=True)
    words = {
        "@folder": shlex.quote(str(slurm.folder)), "@nodes": ",".join(nodes), "@job": str(40000 + _free_ports() - 20000),
        "@root": shlex.quote(str(ROOT)), "@python": shlex.quote(sys.executable),
    }  # fmt: skip
    programs = {
        "sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL,
        "python": PYTHON.replace("@words", ""), "dtrain": PYTHON.replace("@words", "-m dtrain.launch "),
    }  # fmt: skip
    for name, text in programs.items():
        for word, value in words.items():
            text = text.replace(word, value)
        (slurm.folder / "bin" / name).write_text(text, encoding="utf-8")
        (slurm.folder / "bin" / name).chmod(0o755)
    try:
        yield slurm
    finally:
        for sign in (signal.SIGSTOP, signal.SIGKILL):
            for pid in (pids := _of_test(folder)):
                _signal(pid, sign)
        until(lambda: not any(map(alive, pids)), "its processes to be gone")


def _free_ports() -> int:
    """The port that a script makes of its job's number, and torchrun's after it."""
    for port in range(20000 + os.getpid() % 5000, 30000, 2):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no two free ports in a row")


def _of_test(folder: Path) -> list[int]:
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:  # it ended just now
            continue
        ours = bytes(folder) in words + environment and b"sshd" not in words.split(b"\0")[0]
        if ours and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def _signal(pid: int, sign: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, sign)


def check_script(script: Path) -> None:
    """By those who read it."""
    for checker in (["bash", "-n"], ["shellcheck", "--shell=bash"]):
        done = subprocess.run([*checker, str(script)], capture_output=True, text=True, check=False, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr

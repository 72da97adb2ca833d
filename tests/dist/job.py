"""How do tests run a small real job? Through ``dtrain run`` in a process of its own, which they may kill as a
whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "launch" / "jobs" / "quickstart.toml"

SMALL = (
    "model.layers=2",
    "model.width=32",
    "model.heads=2",
    "model.context=32",
    "train.warmup=5",
    "train.eval_every=0",
    "link.rate=none",
    "link.rtt=0ms",
    "islands.threads=1",
)
"""A model of 41 thousand parameters: a step takes about 5 ms, so that a test is over in seconds."""


def command(folder: Path, name: str, *arguments: str, job: Path = QUICKSTART) -> list[str]:
    return [
        sys.executable,
        "-m",
        "dtrain.launch",
        "run",
        str(job),
        f"job.dir={folder}",
        f"job.name={name}",
        *arguments,
    ]


def run(folder: Path, name: str, *arguments: str, timeout_s: float = 110, job: Path = QUICKSTART) -> Path:
    """Run a job to its end; the run folder. What it printed is shown where it fails."""
    done = subprocess.run(
        command(folder, name, *arguments, job=job),
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}\n{logs(folder / name)}"
    return folder / name


@contextmanager
def started(
    folder: Path, name: str, *arguments: str, prefix: Sequence[str] = (), job: Path = QUICKSTART
) -> Iterator[subprocess.Popen[str]]:
    """A job that runs; whatever happens, nothing of it survives the block."""
    output = (folder / f"{name}.out").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [*prefix, *command(folder, name, *arguments, job=job)],
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_tree(process)
        output.close()


def kill_tree(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and to all that it started, all stopped first so that none can react to another's
    death."""
    everyone = [process.pid, *descendants(process.pid)]
    for sign in (signal.SIGSTOP, signal.SIGKILL):
        for pid in everyone:
            try:
                os.kill(pid, sign)
            except ProcessLookupError:
                continue
    process.wait(timeout=30)
    until(lambda: not any(alive(pid) for pid in everyone), "the killed processes to be gone")


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        parents.setdefault(parent, []).append(int(stat.parent.name))
    out: list[int] = []
    queue = [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        out += children
        queue += children
    return out


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true: Callable[[], bool], what: str, timeout_s: float = 90, pause_s: float = 0.002) -> None:
    """Poll until a condition holds; the pause keeps two cores free for what is waited for."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(pause_s)


def steps_written(run_folder: Path) -> int:
    path = run_folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def logs(run_folder: Path) -> str:
    parts = []
    for path in sorted((run_folder / "logs").rglob("*")):
        if path.is_file() and path.suffix in (".log", ".json", ""):
            parts.append(f"--- {path.relative_to(run_folder)}\n{path.read_text(errors='replace')[-2000:]}")
    return "\n".join(parts)


def final_weights(run_folder: Path) -> dict[str, torch.Tensor]:
    weights = {f"merged.{k}": v for k, v in load_file(run_folder / "model.safetensors").items()}
    for path in sorted((run_folder / "islands").glob("*.safetensors")):
        weights |= {f"{path.stem}.{k}": v for k, v in load_file(path).items()}
    return weights


def assert_same_weights(one: Path, other: Path) -> None:
    a, b = final_weights(one), final_weights(other)
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, {different[0]} first"

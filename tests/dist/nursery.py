"""How does a child of the harness start without importing torch again? Forked from a process that has, and has no threads yet.

An import of torch and of what its optimizers import at their first call is most of a small test's time: 3 s of a core for
each child. A child is a process like any other: its own pid, output and environment, and Python's own end. What forked
children share is Python's hash seed, and with it the order of sets of strings, which islands must not depend on; so the
harness keeps two of these processes, each with a seed of its own, and neighbours come from different ones.

    python -m tests.dist.nursery FD

reads from a socket one request a child: JSON, with the descriptors of its stdout, its stderr and where to say what became of
it, which is a line with its pid and then one with its exit status (negative: the signal)."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from dtrain.launch.processes import PARENT_VARIABLE, die_with_parent

ROOT = Path(__file__).parents[2]
MOST_BYTES = 1 << 20
"""Of a request: an environment and a few calls."""


class Request(TypedDict):
    arguments: list[str]
    env: dict[str, str]


class Nursery:
    """The parent's end."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What is read when a library is loaded must be there before the fork; the rest comes with each request.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}
        with theirs:
            command = [sys.executable, "-m", "tests.dist.nursery", str(theirs.fileno())]
            env |= {PARENT_VARIABLE: str(os.getpid())}
            self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        self._socket = ours

    def start(self, arguments: list[str], env: Mapping[str, str], fds: tuple[int, int, int]) -> None:
        """``python ARGUMENTS`` with this environment, where ARGUMENTS are a script's path or ``-m tests.dist.child CALLS``."""
        request: Request = {"arguments": arguments, "env": dict(env)}
        socket.send_fds(self._socket, [json.dumps(request).encode()], fds)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(timeout=30)


def main(descriptor: int) -> None:
    die_with_parent()
    _import_all()
    with socket.socket(fileno=descriptor) as requests:
        while True:
            text, fds, _, _ = socket.recv_fds(requests, MOST_BYTES, 3)
            with suppress(ChildProcessError):  # no keeper is left
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not text:
                return
            nursery = os.getpid()
            if os.fork() == 0:
                break
            for fd in fds:
                os.close(fd)
    os.environ[PARENT_VARIABLE] = str(nursery)
    die_with_parent()
    _keep(json.loads(text), *fds)


def _keep(request: Request, stdout: int, stderr: int, said: int) -> None:
    """The keeper forks the child and says what became of it; in the child this returns when its program has."""
    keeper = os.getpid()
    child = os.fork()
    if child:
        os.write(said, f"{child}\n".encode())
        os.write(said, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        os._exit(0)
    os.close(said)
    for ours, its in ((stdout, 1), (stderr, 2)):
        os.dup2(ours, its)
        os.close(ours)
    os.environ.clear()
    os.environ.update({**request["env"], PARENT_VARIABLE: str(keeper)})
    arguments = request["arguments"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _import_all() -> None:
    """All that a child would, short of what starts a thread."""
    import torch

    import dtrain.engine  # noqa: F401
    import tests.dist.child  # noqa: F401
    from dtrain.kernels import prepare

    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]).zero_grad()  # torch._dynamo comes with the first optimizer
    if os.environ.get("DTRAIN_KERNELS") != "triton":
        prepare(torch.device("cpu"), (), lambda: None)


if __name__ == "__main__":
    main(int(sys.argv[1]))

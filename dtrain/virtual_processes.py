"""How do several processes run one simulation, and how do all of them end with the first?

The others are started as commands of their own and not forked: this process may have threads (OpenMP's, the kernels', a
caller's), and a fork has the locks that they held, but not them. They build their islands from the job. That costs the time of
their imports, 3 s, so it is for runs that are longer (virtual_share.py). Each has a socket to each other, so whoever ends,
however it ends, is missed by all; Ctrl-C goes to the first alone, which ends the rest."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import combinations
from types import TracebackType

from torch import Tensor

from dtrain.config import Job
from dtrain.errors import PeerLost
from dtrain.virtual import Account, Shapes, frozen
from dtrain.virtual_job import link_model, numel_of, simulation_of
from dtrain.virtual_problem import Problem, begin
from dtrain.virtual_share import owners_of
from dtrain.virtual_sockets import ANOTHER_IS_GONE, Done, Gone, Line, Task, carry, memory
from dtrain.virtual_windows import windows

_END_S = 5.0
"""In which a process ends whose sockets are closed, or its window is long."""


@dataclass(frozen=True, slots=True)
class _Other:
    process: subprocess.Popen[bytes]
    line: Line
    nodes: list[int]


class Islands:
    """All islands of a job, wherever they live; a context, at whose end no other process is left. ``run`` once."""

    def __init__(self, job: Job, shapes: Shapes, problem: Problem, first_step: int = 0, *, with_parameters: bool) -> None:
        """``problem``: ``problem_of`` the job. ``with_parameters``: whether those of all islands are asked for."""
        self._job, self._owners = job, owners_of(job, numel_of(shapes))
        self._with_parameters = with_parameters
        self._others: list[_Other] = []
        with ExitStack() as undo:
            undo.callback(self._end)
            self._start(shapes, first_step)
            here = _nodes(self._owners, 0)
            self._part, link = simulation_of(job, shapes, problem, first_step, here)
            self.accounts: list[Account] = [Account() for _ in self._owners]
            self.resent_bytes = link.resent_bytes
            self.parameters: list[Tensor] = []
            """Where islands begin, and after ``run`` where they end; none where nobody asks for them."""
            if with_parameters:
                of_here = dict(zip(here, self._part.parameters, strict=True))
                nodes = range(len(self._owners))
                self.parameters = [of_here[node] if node in of_here else begin(problem, node) for node in nodes]
            undo.pop_all()

    def __enter__(self) -> Islands:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._end()

    def run(self) -> float:
        """See ``Simulation.run``. Raises PeerLost also where another process has ended."""
        part, steps = self._part, self._job.train.steps
        if not self._others:
            virtual_s = part.run(steps)
            self._note(part.nodes, part.accounts)
            return virtual_s
        try:
            return self._run(steps)
        except Gone:
            raise PeerLost([], self._how_one_ended()) from None

    def _run(self, steps: int) -> float:
        part, lines = self._part, [other.line for other in self._others]
        with frozen():
            failure = carry(windows(part, steps, self._owners, 0, link_model(self._job).least_s), lines, 0, part)
        if failure is not None:
            raise failure.error
        stuck = [part.stuck()]
        self._note(part.nodes, part.accounts)
        for other in self._others:
            done: Done = other.line.receive()
            stuck.append(done.stuck)
            self._note(other.nodes, done.accounts)
            for node, resent_bytes in zip(other.nodes, done.resent_bytes, strict=True):
                self.resent_bytes[node] = resent_bytes
            if self._with_parameters:
                for node in other.nodes:
                    other.line.receive_bytes(memory(self.parameters[node]))
        if first := min((s for s in stuck if s is not None), key=lambda s: s.node, default=None):
            raise first.error
        return max(account.ended_s for account in self.accounts)

    def _note(self, nodes: Sequence[int], accounts: Sequence[Account]) -> None:
        for node, account in zip(nodes, accounts, strict=True):
            self.accounts[node] = account

    # ---- the other processes

    def _start(self, shapes: Shapes, first_step: int) -> None:
        """One a share but the first, a socket between each two, and its task."""
        shares = range(max(self._owners) + 1)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)}
        with ExitStack() as theirs:
            ends: dict[tuple[int, int], socket.socket] = {}
            for a, b in combinations(shares, 2):
                one, other = socket.socketpair()
                ends[a, b], ends[b, a] = one if a == 0 else theirs.enter_context(one), theirs.enter_context(other)
            for share in shares[1:]:
                line = Line(share, ends[0, share])
                files = {other: ends[share, other].fileno() for other in shares if other != share}
                process = subprocess.Popen(
                    # -P: python -m would first look for modules in the folder that it is started in.
                    [sys.executable, "-P", "-m", "dtrain.virtual_child", str(files.pop(0))],
                    stdin=subprocess.DEVNULL, pass_fds=[end.fileno() for (own, _), end in ends.items() if own == share],
                    env=environment, process_group=0,
                )  # fmt: skip
                self._others.append(_Other(process, line, _nodes(self._owners, share)))
                line.send(Task(self._job, shapes, first_step, self._owners, share, files, self._with_parameters))

    def _how_one_ended(self) -> str:
        """Those that still are end as they miss it, or later with this one."""
        for other in self._others:
            other.line.close()
        for other in self._others:
            with suppress(subprocess.TimeoutExpired):
                other.process.wait(_END_S)
        for other in self._others:
            status = other.process.returncode
            if status not in (None, 0, ANOTHER_IS_GONE):
                how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
                least = "sim.processes=1 needs the least memory"
                return f"a process of the simulation, which had {len(other.nodes)} islands, {how}; start it again ({least})"
        return "a process of the simulation has ended; start it again"

    def _end(self) -> None:
        """They have nothing to lose."""
        for other in self._others:
            other.line.close()
            other.process.kill()
            other.process.wait()


def _nodes(owners: Sequence[int], share: int) -> list[int]:
    return [node for node, owner in enumerate(owners) if owner == share]

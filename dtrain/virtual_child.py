"""What does a further process of a simulation do? Its share of the islands, of a job that it is told over a socket, which is also
how it learns that another has ended. No Ctrl-C reaches it, and it writes nothing (virtual_processes.py)."""

from __future__ import annotations

import os
import socket
import sys

import torch

from dtrain.train import cpu_threads
from dtrain.virtual import frozen
from dtrain.virtual_job import link_model, problem_of, simulation_of
from dtrain.virtual_sockets import ANOTHER_IS_GONE, Done, Gone, Line, Task, carry, memory
from dtrain.virtual_windows import windows


def main() -> None:
    """``python -m dtrain.virtual_child FILE_NUMBER``."""
    first = Line(0, socket.socket(fileno=int(sys.argv[1])))
    try:
        task: Task = first.receive()
        others = [Line(share, socket.socket(fileno=number)) for share, number in sorted(task.files.items())]
        _live(task, [first, *others])
    except Gone:
        os._exit(ANOTHER_IS_GONE)
    os._exit(0)  # as the command does: taking torch apart costs 0.7 s of CPU


def _live(task: Task, lines: list[Line]) -> None:
    job, shapes, own = task.job, task.shapes, task.own
    torch.set_num_threads(cpu_threads(job))
    nodes = [node for node, owner in enumerate(task.owners) if owner == own]
    part, link = simulation_of(job, shapes, problem_of(job, shapes), task.first_step, nodes)
    with frozen():
        failure = carry(windows(part, job.train.steps, task.owners, own, link_model(job).least_s), lines, own, part)
    if failure is not None:  # which the first share raises
        return
    lines[0].send(Done(part.stuck(), part.accounts, [link.resent_bytes[node] for node in nodes]))
    if task.with_parameters:
        for x in part.parameters:
            lines[0].send_bytes(memory(x))


if __name__ == "__main__":
    main()

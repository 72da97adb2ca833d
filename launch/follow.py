"""What does another node of an island do? Starts its torchrun whenever the first one does, which joins the launcher for all.

``python -m dtrain.launch.follow JOB.toml RUN ISLAND HOST:PORT``, with DTRAIN_TORCHRUN as on the first node but for the node's
rank. Of each start the launcher tells the epoch and the step at the meeting point.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from torch._C._distributed_c10d import Store

from dtrain.config import load_job
from dtrain.errors import PeerLost
from dtrain.launch import islands
from dtrain.launch.part_words import started
from dtrain.membership import meeting_store

_POLL_S = 0.2
_RESUMABLE = 75


def follow(launch: islands.Launch, island: int, store: Store) -> int:
    """The exit status of the torchruns: 0 when one has ended well. Raises PeerLost where none is to come within link.timeout_s
    after one that did not."""
    epoch = -1
    while True:
        epoch, step = newer(store, island, epoch, launch.job.link.timeout_s)
        environment = {**os.environ, **islands.environment(launch, island, epoch, step)}
        command = islands.command(launch, island, epoch)
        if subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode == 0:
            return 0
        print(f"the torchrun of epoch {epoch} has failed here; waiting for the next", flush=True)


def newer(store: Store, island: int, epoch: int, timeout_s: float) -> tuple[int, int]:
    """(epoch, step) of the island's next start after an epoch; raises PeerLost where the launcher tells none in time."""
    gives_up = time.monotonic() + timeout_s
    while time.monotonic() < gives_up:
        told = started(store, island)
        if told is not None and told[0] > epoch:
            return told
        time.sleep(_POLL_S)
    raise PeerLost((), f"the launcher has told of no start within {timeout_s:g} s")


def reach(meet: str, timeout_s: float) -> Store:
    """The meeting point, which may be late, and its name with it; raises PeerLost where it is not there in time."""
    host, _, port = meet.rpartition(":")
    gives_up = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=timeout_s).close()
            return meeting_store(meet, timeout_s)
        except OSError as e:
            if time.monotonic() > gives_up:
                raise PeerLost((), f"no launcher at {meet} within {timeout_s:g} s ({e.strerror or e})") from None
            time.sleep(_POLL_S)


def main(job_file: str, run: str, island: str, meet: str) -> int:
    job = load_job(Path(job_file))
    try:
        launch = islands.Launch(job, Path(run), meet, tag="", torchruns=islands.take_torchruns())
        return follow(launch, int(island), reach(meet, job.link.timeout_s))
    except PeerLost as e:
        print(f"dtrain: {e}", file=sys.stderr)
        return _RESUMABLE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
